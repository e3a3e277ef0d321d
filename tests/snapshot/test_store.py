from __future__ import annotations

import json
import logging
import math
import os
import shutil
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

import purestep as ps
from purestep import snapshot, tree
from purestep.errors import CorruptSnapshot, SaveFailed, SnapshotError, TemplateMismatch, TreeError
from purestep.snapshot import Store, all_, best, durable_directories, every_steps, free_space, latest, writer


def value(step: int) -> dict:
    return {"w": torch.full((3,), float(step)), "large": torch.arange(300_000) + step, "n": step}


def fill(root: Path, *steps: int, keep=None, **metrics: list[float]) -> Store:
    store = Store(root, keep=keep or all_())
    for i, step in enumerate(steps):
        store.save(step, value(step), metrics={name: values[i] for name, values in metrics.items()})
    store.wait()
    return store


@pytest.fixture(params=["packed", "arrays"])
def layout(request, monkeypatch):
    if request.param == "arrays":
        monkeypatch.setattr("purestep.snapshot.packing.SMALL", 1)


def test_everything_comes_back_and_the_digest_is_the_one_of_the_tree(tmp_path, example, layout):
    with Store(tmp_path) as store:
        store.save(3, example, metrics={"loss": 0.5, "bad": math.nan}, info={"note": ["ü", 1]})
        back = store.restore()
        assert tree.diff(example, back.value) == ()
        assert back.value["tied"] is back.value["weight"]
        assert (back.step, back.metrics["loss"], back.info, back.skipped) == (3, 0.5, {"note": ["ü", 1]}, ())
        assert math.isnan(back.metrics["bad"])
        assert back.digest == store.read_manifest(3).digest == tree.digest(example)
        assert tree.equal(store.restore(like=example).value, example)
        for leaf in tree.leaves(back.value):  # what comes back is memory of its own, that may be written
            if isinstance(leaf, torch.Tensor):
                leaf.reshape(-1).view(torch.uint8).zero_()
            assert not isinstance(leaf, np.ndarray) or leaf.flags.writeable


def test_a_save_is_not_disturbed_by_what_happens_to_the_value(tmp_path, monkeypatch):
    gate = threading.Event()
    real = writer.write
    monkeypatch.setattr(writer, "write", lambda *args, **kwargs: (gate.wait(30), real(*args, **kwargs)))
    state = {"w": torch.ones(400_000), "small": torch.ones(3), "a": np.ones(5), "list": [1]}
    want = tree.digest(state)
    with Store(tmp_path) as store:
        store.save(1, state)
        assert (store.poll(), store.steps()) == ([], [])  # it is still in flight, and `save` has returned
        for leaf in (state["w"], state["small"]):
            leaf.zero_()
        state["a"][:] = 0
        state["list"].append(2)
        gate.set()
        store.wait()
        assert (store.poll(), store.poll(), store.steps()) == ([1], [], [1])
        assert tree.digest(store.restore().value) == want


def test_buffers_of_one_save_are_not_those_of_another_tree(tmp_path):
    with Store(tmp_path, keep=all_()) as store:
        for step, shapes in enumerate([[(5,), (7, 3)], [(7, 3), (5,)], [(400_000,), (2,)], [(400_000,), (2,)]]):
            store.save(step, [torch.full(shape, float(step)) for shape in shapes])
        store.wait()
        for step in range(4):
            assert all(bool((t == step).all()) for t in store.restore(step=step).value)


@pytest.mark.parametrize(
    ("keep", "kept"),
    [
        (latest(), [7]),
        (latest(3), [5, 6, 7]),
        (all_(), [0, 1, 2, 3, 4, 5, 6, 7]),
        (best("loss", 2), [2, 5, 7]),  # the newest stays whatever the policy says
        (best("loss", 1, "max") | every_steps(3), [0, 3, 6, 7]),
        (best("absent"), [7]),
    ],
)
def test_policies(tmp_path, keep, kept):
    losses = [9.0, 5.0, 1.0, 4.0, math.nan, 2.0, 3.0, 6.0]
    store = fill(tmp_path, *range(8), keep=keep, loss=losses)
    assert store.steps() == kept
    assert sorted(path.name for path in tmp_path.iterdir()) == [str(step) for step in kept]


def test_best_and_latest(tmp_path):
    store = fill(tmp_path, 1, 2, 3, 4, loss=[math.nan, 0.3, 0.1, 0.3])
    assert (store.best("loss"), store.best("loss", "max"), store.best("absent"), store.latest()) == (3, 2, None, 4)
    assert (Store(tmp_path / "none").latest(), Store(tmp_path / "none").best("x")) == (None, None)


def test_old_snapshots_are_deleted_only_after_the_new_one_is_durable(tmp_path, monkeypatch):
    store = fill(tmp_path, 1, keep=latest())
    events = []
    real_commit, real_remove = durable_directories.commit, durable_directories.remove
    monkeypatch.setattr(
        durable_directories,
        "commit",
        lambda *a, **k: (events.append("begin"), real_commit(*a, **k), events.append("durable")),
    )
    monkeypatch.setattr(
        durable_directories, "remove", lambda path: (events.append(f"remove {path.name}"), real_remove(path))
    )
    store.save(2, value(2))
    store.wait()
    assert events == ["begin", "durable", "remove 1"]


def test_every_file_of_a_snapshot_is_synced_before_it_is_one(tmp_path, monkeypatch, layout):
    synced: set[str] = set()
    missed = []
    real_sync, real_rename = os.fsync, os.rename

    def rename(source, target):
        if Path(target).name == "1":
            names = {str(path) for path in Path(source).rglob("*")} | {str(source)}
            missed.extend(sorted(names - synced))
            synced.clear()
        real_rename(source, target)

    monkeypatch.setattr(os, "fsync", lambda fd: (synced.add(os.readlink(f"/proc/self/fd/{fd}")), real_sync(fd)))
    monkeypatch.setattr(os, "rename", rename)
    fill(tmp_path, 1)
    assert missed == []
    assert str(tmp_path) in synced  # and the rename itself after it


def test_going_back(tmp_path):
    store = fill(tmp_path, 1, 2, 5)
    for step in (5, 4, 0):
        with pytest.raises(
            SnapshotError, match=rf"step {step} is not after the latest snapshot, of step 5\n(.|\n)*replace=True"
        ):
            store.save(step, value(step))
    store.delete_after(1)
    assert store.steps() == [1]
    store.save(2, value(20))
    store.wait()
    assert store.restore().value["n"] == 20


def test_arguments_are_checked(tmp_path):
    store = Store(tmp_path)
    for step in (-1, 1.5, "3", True):
        with pytest.raises(SnapshotError, match=r"a whole number from 0 up\n  where:   step = "):
            store.save(step, {})
    with pytest.raises(SnapshotError, match="info cannot be written as JSON"):
        store.save(0, {}, info={"x": torch.ones(1)})
    with pytest.raises(SnapshotError, match="metrics of a snapshot are numbers under names"):
        store.save(0, {}, metrics={"x": "high"})
    with pytest.raises(SnapshotError, match="the name 3 is not a string"):
        store.save(0, {}, metrics={3: 1.0})
    with pytest.raises(TreeError, match=r"\['x'\]"):
        store.save(0, {"x": object()})
    store.save(0, {"only": "python"}, metrics={"x": torch.tensor(0.5)})
    assert store.restore().value == {"only": "python"}
    assert store.read_manifest(0).metrics == {"x": 0.5}
    store.close()
    store.close()
    with pytest.raises(SnapshotError, match="the store is closed"):
        store.save(1, {})


def test_mismatch_names_the_step_reads_no_array_and_never_falls_back(tmp_path, monkeypatch):
    store = fill(tmp_path, 1, 2)
    monkeypatch.setattr("purestep.snapshot.orbax_io.read_arrays", lambda *args: pytest.fail("arrays were read"))
    like = value(0) | {"w": torch.zeros(4)}
    with pytest.raises(
        TemplateMismatch, match=r"\['w'\]: stored float32\[3\], template float32\[4\]\n(.|\n)*step 2 in"
    ):
        store.restore(like)


def test_absent_steps(tmp_path):
    with pytest.raises(SnapshotError, match=r"there is no snapshot\n"):
        Store(tmp_path).restore()
    store = fill(tmp_path, 1, 2)
    for read in (lambda: store.restore(step=9), lambda: store.read_manifest(9)):
        with pytest.raises(SnapshotError, match=r"no snapshot of step 9\n(.|\n)*are of steps 1, 2"):
            read()


def test_strays_are_ignored_and_never_deleted(tmp_path):
    store = fill(tmp_path, 5)
    (tmp_path / "99").mkdir()
    (tmp_path / "07").mkdir()
    (tmp_path / "notes").mkdir()
    (tmp_path / "98").write_text("a file")
    (tmp_path / "97").symlink_to(tmp_path / "5")
    shutil.copytree(tmp_path / "5", tmp_path / "50")  # whole, and of another step
    assert (store.steps(), Store(tmp_path).steps()) == ([5], [5])
    for step in (97, 98, 99):  # a save goes beside what has its name
        store.save(step, value(step))
    store.wait()
    assert (store.steps(), Store(tmp_path).steps()) == ([5, 97, 98, 99], [5, 97, 98, 99])
    store.save(99, value(990), replace=True)
    store.wait()
    assert {"97", "98", "99", "97.1", "98.1", "99.2", "07", "notes"} <= {path.name for path in tmp_path.iterdir()}
    assert (tmp_path / "98").read_text() == "a file"
    assert not (tmp_path / "99.1").exists()
    assert store.restore().value["n"] == 990


def test_a_damaged_snapshot_gives_way_to_a_new_one_of_its_step(tmp_path):
    store = fill(tmp_path, 1, 2)
    (tmp_path / "2" / "meta" / "data.json").write_text("{}")
    assert store.latest() == 1
    with pytest.warns(RuntimeWarning, match=r"using step 1 in .*\nstep 2: a file of the snapshot is corrupt"):
        back = store.restore()
    assert (back.step, [step for step, _ in back.skipped]) == (1, [2])
    with pytest.raises(CorruptSnapshot, match=r"step 2 cannot be read\n(.|\n)*restore\(step=1\)"):
        store.restore(step=2)
    with pytest.raises(CorruptSnapshot, match=r"step 2 cannot be read"):
        store.restore(fallback=False)
    store.save(2, value(22))
    store.wait()
    assert store.restore().value["n"] == 22
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "2.1"]


def test_a_step_that_is_saved_again_replaces_itself_and_what_comes_later(tmp_path):
    store = fill(tmp_path, 1, 2, 5)
    for step, kept in ((5, [1, 2, 5]), (5, [1, 2, 5]), (3, [1, 2, 3]), (1, [1])):
        store.save(step, value(10 * step), replace=True)
        store.wait()
        assert store.steps() == Store(tmp_path).steps() == kept
        assert store.restore().value["n"] == 10 * step
    assert len(list(tmp_path.iterdir())) == 1


def test_the_highest_whole_revision_of_a_step_is_read(tmp_path):
    store = fill(tmp_path, 1, 2)
    shutil.copytree(tmp_path / "2", tmp_path / "2.1")  # as a process leaves it that is killed before it deletes
    shutil.copytree(tmp_path / "1", tmp_path / "1.1")
    assert store.steps() == Store(tmp_path).steps() == [1, 2]
    (tmp_path / "2.1" / "meta" / "tree.json").write_text("{}")
    with pytest.warns(RuntimeWarning, match=r"using step 2 in .*\nstep 2: a file of the snapshot is corrupt"):
        assert store.restore(step=2).value["n"] == 2
    store.save(3, value(3))
    store.wait()  # takes what the dead process could not delete, and leaves what is damaged
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1.1", "2.1", "3"]


def test_nothing_is_deleted_when_nothing_whole_would_be_left(tmp_path):
    store = fill(tmp_path, 3, 4)
    with pytest.raises(SnapshotError, match=r"no snapshot of step 2 or before is intact"):
        store.delete_after(2)
    (array,) = (path for path in (tmp_path / "3" / "parts").rglob("*") if path.is_file() and path.stat().st_size > 4000)
    array.write_bytes(array.read_bytes()[:-1] + b"\xff")
    with pytest.raises(SnapshotError, match=r"no snapshot of step 3 or before is intact"):
        store.delete_after(3)
    assert store.steps() == [3, 4]
    store.delete_after(4)


def test_leftovers_of_dead_writers_are_removed_by_the_next(tmp_path):
    fill(tmp_path, 1)
    (tmp_path / f"2{durable_directories.MARK}1234-0" / "parts").mkdir(parents=True)
    reading = Store(tmp_path)
    assert reading.restore().step == 1
    assert len(list(tmp_path.iterdir())) == 2  # a reader removes nothing
    fill(tmp_path, 3)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["1", "3"]


def test_a_failed_save_is_told_once_and_the_next_one_is_saved(tmp_path):
    root = tmp_path / "snapshots"
    root.write_text("a file where the directory belongs")
    store = Store(root, keep=all_())
    store.save(1, value(1))
    with pytest.raises(
        SaveFailed, match=r"the save of step 1 failed\n(.|\n)*FileExistsError(.|\n)*no earlier snapshot"
    ) as caught:
        store.wait()
    assert isinstance(caught.value.__cause__, FileExistsError)
    store.wait()
    assert store.poll() == []
    store.save(2, value(2))
    store._background.join()
    root.unlink()
    with pytest.raises(SaveFailed, match="the save of step 2 failed"):
        store.save(3, value(3))  # tells of step 2, and saves step 3
    store.wait()
    assert (store.poll(), store.steps(), store.restore().value["n"]) == ([3], [3], 3)


def test_a_failure_in_any_phase_leaves_what_was_there(tmp_path, monkeypatch):
    store = fill(tmp_path, 1)
    want = store.restore().digest
    phases = [
        (free_space, "check_room"),
        *((durable_directories, name) for name in ("begin", "write", "fsync_tree", "commit")),
    ]
    for i, (module, name) in enumerate(phases):
        with monkeypatch.context() as patch:
            patch.setattr(module, name, lambda *args, **kwargs: (_ for _ in ()).throw(OSError(5, "Input/output error")))
            store.save(2 + i, value(2))
            with pytest.raises(SaveFailed, match=r"Input/output error(.|\n)*untouched: 1"):
                store.wait()
        assert [path.name for path in tmp_path.iterdir()] == ["1"], name
        assert Store(tmp_path).restore().digest == want
    store.save(9, value(9))
    store.wait()
    assert store.steps() == [1, 9]


def test_poll_tells_of_a_failure_without_waiting(tmp_path, monkeypatch):
    monkeypatch.setattr(
        free_space, "check_room", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(28, "No space left on device"))
    )
    store = Store(tmp_path)
    store.save(1, value(1))
    store._background.join()
    with pytest.raises(SaveFailed, match="No space left on device"):
        store.poll()
    assert store.poll() == []


def test_closing_keeps_the_error_of_the_block(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SaveFailed), Store(tmp_path / "file") as store:
        store.save(1, {})
    with pytest.raises(ZeroDivisionError) as caught, Store(tmp_path / "file") as store:  # noqa: PT012
        store.save(1, {})
        _ = 1 / 0
    assert "the save of step 1 failed" in caught.value.__notes__[0]


def test_functions_of_a_run(tmp_path):
    fill(tmp_path / "snapshots", 1, 2)
    for run_dir in (tmp_path, str(tmp_path), tmp_path / "snapshots"):
        assert snapshot.steps(run_dir) == [1, 2]
        assert ps.restore(run_dir)["n"] == 2
        assert ps.restore(run_dir, like=value(0), step=1)["n"] == 1
        found = snapshot.manifest(run_dir, 2)
        assert (found.step, found.keep, found.environment["world_size"]) == (2, "all_()", 1)
        assert [(leaf.path, leaf.kind, leaf.dtype, leaf.shape) for leaf in found.leaves[:2]] == [
            ("['w']", "tensor", "float32", (3,)),
            ("['large']", "tensor", "int64", (300_000,)),
        ]
        assert all(len(piece.checksum) == 16 for piece in found.pieces)


def test_other_programs_can_read_the_arrays(tmp_path):
    import orbax.checkpoint as ocp

    fill(tmp_path, 4)
    arrays = ocp.PyTreeCheckpointer().restore(tmp_path / "4" / "parts" / "0" / "state")
    assert {name.partition("-")[0] for name in arrays} == {"arena", "1"}
    assert np.array_equal(
        next(array for name, array in arrays.items() if name.startswith("1-")), value(4)["large"].numpy()
    )
    for path in ("meta/data.json", "meta/tree.json", "meta/pieces.json"):
        json.loads((tmp_path / "4" / path).read_text())


def test_the_log_of_the_process_is_left_as_it_was(tmp_path, caplog):
    before = list(logging.root.handlers)
    fill(tmp_path, 1).restore()
    assert logging.root.handlers == before
    assert [record for record in caplog.records if "orbax" in record.pathname] == []
