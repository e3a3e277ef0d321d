"""Copies of a run directory elsewhere: what is listed whenever a copy breaks, what is deleted, what comes back."""

import shutil
import threading

import pytest
import torch
from shared_faulty_fs import Broken, Faulty

import purestep as ps
from purestep.errors import ConfigError, CorruptSnapshot, MissingExtra, SnapshotError
from purestep.remote import copies
from purestep.remote.files import Unreachable
from purestep.snapshot import all_, best, latest
from purestep.snapshot.header import seal

URL = "faulty://bucket/run"


@pytest.fixture(autouse=True)
def faulty():
    Faulty.reset()
    yield Faulty
    Faulty.reset()


@pytest.fixture(scope="module")
def three(tmp_path_factory):
    """A run directory with snapshots of steps 10, 20 and 30, of which 20 is best, and two other files."""
    run_dir = tmp_path_factory.mktemp("three")
    with ps.snapshot.Store(run_dir / "snapshots", keep=all_()) as store:
        for step, loss in ((10, 3.0), (20, 1.0), (30, 2.0)):
            generator = torch.Generator().manual_seed(step)
            tree = {"w": torch.randn(70, 30, generator=generator), "name": "abc", "n": step}
            store.save(step, tree, metrics={"loss": loss}, digests={"w": ps.snapshot.Scope("['w']")})
    (run_dir / "metrics.csv").write_text("step,loss\n10,3.0\n")
    (run_dir / "tensorboard").mkdir()
    (run_dir / "tensorboard" / "events").write_bytes(b"\0\1\2")
    (run_dir / "lock").write_text("1")
    return run_dir


def some(three, directory, *steps):
    """A run directory with some of these snapshots."""
    for step in steps:
        shutil.copytree(three / "snapshots" / str(step), directory / "snapshots" / str(step))
    shutil.copy(three / "metrics.csv", directory)
    return directory


def mirror(run_dir, policy, **options):
    return ps.Remote(URL, tries=1, pause=0, **options).mirror(run_dir, policy)


def names(under):
    return {path.split("/")[4] for path in Faulty.store if path.startswith(f"/bucket/run/{under}/")}


def test_a_copy_that_breaks_at_any_write_is_never_listed_and_loses_nothing(three, tmp_path):
    old, new = some(three, tmp_path / "old", 10), some(three, tmp_path / "new", 20, 30)
    (new / "metrics.csv").write_text("step,loss\n10,3.0\n20,1.0\n30,2.0\n")
    seen = []
    for at in range(1, 100):
        Faulty.reset()
        mirror(old, latest(1)).update()
        Faulty.writes, Faulty.breaks_at = 0, at
        follows = mirror(new, latest(1))
        try:
            follows.update()
        except (Unreachable, SnapshotError):
            broke = True
        else:
            broke = False
        Faulty.mend()
        remote = ps.Remote(URL, tries=1)
        listed = copies.listed(remote.open())
        seen.append([copy.header.step for copy in listed])
        target = tmp_path / f"fetched{at}"
        for copy in listed:
            copies.download(remote.open(), copy, target)  # every listed one is whole: digests and all
        assert ps.snapshot.steps(target) == seen[-1]
        told = copies.record(remote.open())
        copies.download_record(remote.open(), told, target)
        rows = (target / "metrics.csv").read_text().count("\n") - 1
        assert rows == 3 or 30 not in seen[-1]  # a snapshot never knows more than the log
        mirror(new, latest(1)).update()  # the next start
        assert remote.steps() == [30]
        assert names("snapshots") == {"30"}
        if not broke:
            break
    assert seen[0] == [10]
    assert seen[-1] == [30]
    assert [10, 30] in seen, "it broke after the new copy and before the old one was deleted"
    assert [] not in seen
    assert len(seen) > 12


def test_retention_is_that_of_the_policy_over_both_places(three, tmp_path):
    here = mirror(some(three, tmp_path / "a", 10, 20, 30), best("loss", 1) | latest(1))
    here.update()
    assert here.steps() == ps.Remote(URL).steps() == [20, 30]
    # Another machine has only the newest: the best one there stays.
    there = mirror(some(three, tmp_path / "b", 30), best("loss", 1) | latest(1))
    there.update()
    assert ps.Remote(URL).steps() == [20, 30]
    # A policy of its own for the copy.
    mirror(some(three, tmp_path / "c", 30), latest(1), keep=all_()).update()
    assert ps.Remote(URL).steps() == [20, 30]
    # The run has gone back: the later history goes as soon as what is left is there.
    mirror(some(three, tmp_path / "d", 10), latest(1)).update()
    assert ps.Remote(URL).steps() == [10]


def test_nothing_is_deleted_while_the_newest_is_not_there(three, tmp_path, monkeypatch):
    mirror(some(three, tmp_path / "a", 10), latest(1)).update()
    follows = mirror(some(three, tmp_path / "b", 30), latest(1))
    monkeypatch.setattr(copies, "upload", lambda *args: (_ for _ in ()).throw(Unreachable("no")))
    with pytest.raises(Unreachable):
        follows.update()
    follows._prune()
    assert ps.Remote(URL).steps() == [10]


def test_a_step_that_was_saved_again_replaces_its_copy(three, tmp_path):
    a, b = some(three, tmp_path / "a", 10), some(three, tmp_path / "b", 10)
    mirror(a, latest(1)).update()
    shutil.rmtree(b / "snapshots")
    with ps.snapshot.Store(b / "snapshots") as store:
        store.save(10, {"w": torch.zeros(3)})
    mirror(b, latest(1)).update()
    assert ps.Remote(URL).steps() == [10]
    assert names("snapshots") == {"10.1"}
    ps.Remote(URL).fetch(tmp_path / "c")
    assert ps.restore(tmp_path / "c")["w"].tolist() == [0, 0, 0]


def test_the_record_comes_back_and_keeps_two_lists_at_most(three, tmp_path):
    run_dir = some(three, tmp_path / "a", 10)
    shutil.copytree(three / "tensorboard", run_dir / "tensorboard")
    (run_dir / "lock").write_text("7")
    (run_dir / "link").symlink_to("/etc/hostname")
    follows = mirror(run_dir, latest(1))
    for row in range(4):
        with (run_dir / "metrics.csv").open("a") as file:
            file.write(f"{row},0.5\n")
        follows.update()
    target = ps.Remote(URL).fetch(tmp_path / "b")
    found = {str(p.relative_to(target)) for p in target.rglob("*") if p.is_file() and "snapshots" not in p.parts}
    assert found == {"metrics.csv", "tensorboard/events"}
    assert (target / "metrics.csv").read_bytes() == (run_dir / "metrics.csv").read_bytes()
    assert (target / "tensorboard" / "events").read_bytes() == b"\0\1\2"
    assert names("record") - {n for n in names("record") if "-" in n} == {"2.json", "3.json"}
    assert len(names("record")) == 2 + 3  # of contents: two of the log, one of the events


def corrupt(name):
    file = next(Faulty.store[path] for path in sorted(Faulty.store) if path.endswith(name))
    content = bytearray(file.getvalue())
    content[len(content) // 2] ^= 1
    file.seek(0)
    file.write(bytes(content))


def test_a_damaged_copy_is_not_taken(three, tmp_path):
    mirror(some(three, tmp_path / "a", 20, 30), all_()).update()
    corrupt("/30/parts/0/state/arena-0/0")
    remote = ps.Remote(URL, pause=0)
    with pytest.raises(CorruptSnapshot, match=r"a file of the remote copy is corrupt\n  where: .*/30/parts"):
        remote.fetch(tmp_path / "b", step=30)
    assert ps.snapshot.steps(tmp_path / "b") == []
    with pytest.warns(RuntimeWarning, match="cannot be read; using step 20"):
        remote.fetch(tmp_path / "c")
    assert ps.snapshot.steps(tmp_path / "c") == [20]
    corrupt("/20/parts/0/state/arena-0/0")
    with pytest.raises(CorruptSnapshot, match="no snapshot of the remote copy is intact"):
        remote.fetch(tmp_path / "d")
    corrupt("/20/meta/data.json")
    corrupt("/30/copy.json")
    assert remote.steps() == []


def test_digests_are_compared_though_every_file_is_the_one_that_was_copied(three, tmp_path):
    run_dir = some(three, tmp_path / "a", 30)
    broken = next((run_dir / "snapshots" / "30" / "parts").rglob("arena-0/0"))
    content = bytearray(broken.read_bytes())
    content[100] ^= 1
    broken.write_bytes(content)  # the disk had lost a bit before it was copied
    mirror(run_dir, latest(1)).update()
    with pytest.raises(CorruptSnapshot):
        ps.Remote(URL).fetch(tmp_path / "b", step=30)


def test_a_copy_cannot_write_outside_of_its_directory(three, tmp_path):
    mirror(some(three, tmp_path / "a", 30), latest(1)).update()
    files = ps.Remote(URL).open()
    files.write("snapshots/30/copy.json", seal({"format": 1, "files": {"../../x": [1, "0" * 16]}}))
    assert ps.Remote(URL).steps() == []
    files.write("record/9.json", seal({"format": 1, "files": {"/x": [1, "0" * 16]}}))
    assert copies.record(files).number == 0


def test_operations_are_tried_again_but_not_what_cannot_help(three, tmp_path):
    run_dir = some(three, tmp_path / "a", 30)
    Faulty.failures += [Broken("reset by peer")] * 2
    ps.Remote(URL, tries=3, pause=0.001).mirror(run_dir, latest(1)).update()
    Faulty.failures += [Broken("reset by peer")] * 3
    with pytest.raises(Unreachable, match=r"list failed\n  where: .*\n  why: .*Broken: reset by peer"):
        ps.Remote(URL, tries=3, pause=0.001).steps()
    Faulty.failures += [PermissionError("no"), Broken("never asked")]
    with pytest.raises(Unreachable, match="PermissionError: no"):
        ps.Remote(URL, tries=3, pause=0.001).steps()
    assert len(Faulty.failures) == 1


def test_a_snapshot_that_is_being_copied_is_not_deleted_by_the_writer(tmp_path):
    follows = mirror(tmp_path, latest(1))
    Faulty.waits = threading.Event()
    store = ps.snapshot.Store(tmp_path / "snapshots", keep=latest(1), follower=follows)
    with store:
        store.save(1, {"w": torch.ones(3)})
        store.wait()
        for step in (2, 3):
            store.save(step, {"w": torch.ones(3) * step})
            store.wait()
        # 1 is being copied, or its turn was taken by a later one; 2 has given up its turn to 3.
        assert set(store.steps()) >= {3}
        assert 2 not in store.steps() or 1 not in store.steps()
        held = [step for step in store.steps() if step != 3]
        Faulty.waits.set()
        assert follows.wait(20)
    told = follows.report()
    assert told["lost"] is None
    assert {*held, 3} <= {*told["copied"]}, "what was held was held to be copied"
    assert follows.steps() == [3]


def test_push_brings_what_is_missing_and_deletes_nothing(three, tmp_path):
    mirror(some(three, tmp_path / "a", 30), latest(1)).update()
    remote = ps.Remote(URL)
    assert remote.push(some(three, tmp_path / "b", 10, 20)) == [10, 20, 30]
    assert ps.snapshot.steps(remote.fetch(tmp_path / "c")) == [10, 20, 30]
    with pytest.raises(SnapshotError, match="no snapshot of step 11"):
        remote.fetch(tmp_path / "d", step=11)


def test_errors_say_what_to_write():
    with pytest.raises(ConfigError, match="has no protocol"):
        ps.Remote("runs/a")
    with pytest.raises(ConfigError, match="fsspec cannot open this url"):
        ps.Remote("nonsense://a").steps()
    with pytest.raises(ConfigError, match="on_error"):
        ps.Remote(URL, on_error="halt")
    secret = ps.Remote("s3://bucket/a", storage_options={"secret": "abc"})
    assert "abc" not in repr(secret)
    try:
        import s3fs  # noqa: F401
    except ImportError:
        with pytest.raises(MissingExtra, match=r'pip install "purestep\[s3\]"'):
            secret.steps()
