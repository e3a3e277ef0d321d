"""Forks go on from where their parent was; `verify` finds the step and the leaf of a bit that flipped."""

from __future__ import annotations

import json
import shutil
import warnings

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError, SnapshotError, TemplateMismatch
from purestep.loop.saving import DIGESTS
from purestep.record.replay import stored


def loss_fn(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


@ps.experiment
def small(lr=1e-2, *, optimizer="adamw", until=12):
    g = torch.Generator().manual_seed(0)
    data = {"x": torch.randn(20, 4, generator=g), "y": torch.randn(20, 1, generator=g)}
    tx = getattr(ps.optim, optimizer)(lr)
    state = ps.init(lambda: nn.Sequential(nn.Linear(4, 8), nn.Dropout(0.2), nn.Linear(8, 1)), tx, seed=3)
    callbacks = [
        ps.callbacks.snapshots(every=ps.every.steps(3), keep=ps.snapshot.all_()),
        ps.callbacks.log(every=ps.every.steps(1)),
    ]
    batches = ps.data.batches(data, 4, seed=1)
    return ps.Experiment(ps.make_step(loss_fn, tx), state, batches, until=ps.steps(until), callbacks=callbacks)


@pytest.fixture(scope="module")
def parent(tmp_path_factory):
    path = tmp_path_factory.mktemp("fork") / "parent"
    small().fit(run_dir=path)
    return ps.open(path)


def flip(run, at, name="0.weight", place=5):
    """Flip the lowest bit of one weight of a snapshot, with right checksums: as if it had flipped in memory."""
    loop, manifest = stored(run, small(), at)
    leaf = loop.train.params[name]
    leaf.view(torch.int32).view(-1)[place] ^= 1
    elsewhere = run.path / "elsewhere"  # a store takes back what comes after the step that it writes
    with ps.snapshot.Store(elsewhere) as store:
        store.save(at, loop, metrics=manifest.metrics, info=dict(manifest.info), digests=DIGESTS)
    shutil.rmtree(run.path / "snapshots" / str(at))
    (elsewhere / str(at)).rename(run.path / "snapshots" / str(at))


# --- fork -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("at", [6, 8], ids=["at a snapshot", "between two"])
def test_an_unchanged_fork_ends_as_its_parent_did(parent, tmp_path, at):
    child = ps.fork(parent, at=at, run_dir=tmp_path / "child", experiment=small)
    assert (child.why, child.snapshots, child.updates, str(child.parent)) == ("not started", (at,), at, f"parent@{at}")
    (before,) = list(ps.replay(parent, small, at - 1, at))
    assert child.digest == child.parent.digest == before.digest
    assert child.metrics["step"] == list(range(1, at + 1))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = small().fit(run_dir=child.path)
    assert ps.digest(result.state) == parent.digest
    child = ps.open(child.path)
    assert (child.path / "metrics.csv").read_text() == (parent.path / "metrics.csv").read_text()
    assert (child.why, str(child.parent)) == ("reached 12 steps", f"parent@{at}")
    assert [row["at"] for row in json.loads((child.path / "run.json").read_text())["starts"]] == [at]
    assert ps.verify(child, small).ok
    with pytest.raises(ConfigError, match=rf"the run began at {at}, after 2\n"):
        list(ps.replay(child, small, 2, 3))


def test_another_learning_rate_goes_on_without_a_warning(parent, tmp_path):
    child = ps.fork(parent.path, at=6, run_dir=tmp_path / "child", experiment=small)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        result = small(1e-4).fit(run_dir=child.path)
    assert result.loop.cursor.batches == 12
    assert ps.digest(result.state) != parent.digest
    table = ps.runs(tmp_path)
    assert table["child"].settings["lr"] == 1e-4
    assert "parent@6" in repr(table)
    assert ps.verify(child.path, small).ok


def test_what_cannot_be_forked_is_refused_and_leaves_nothing(parent, tmp_path):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(ConfigError, match="a fork begins in a directory of its own"):
        ps.fork(parent, at=6, run_dir=tmp_path / "full", experiment=small)
    with pytest.raises(TemplateMismatch):
        ps.fork(parent, at=6, run_dir=tmp_path / "child", experiment=small(optimizer="lion"))
    with pytest.raises(SnapshotError, match=r"the run that goes on here is not the one that was saved"):
        ps.fork(parent, at=7, run_dir=tmp_path / "child", experiment=small(0.5))
    with pytest.raises(SnapshotError, match=r"the run that goes on here is not the one that was saved"):
        ps.fork(parent, at=2, run_dir=tmp_path / "child", experiment=small(0.5))  # from the beginning
    with pytest.raises(ConfigError, match="at must be a whole number >= 1"):
        ps.fork(parent, at=0, run_dir=tmp_path / "child", experiment=small)
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


# --- verify -----------------------------------------------------------------------------------------------------------


def test_a_right_run_is_verified(parent):
    found = ps.verify(parent, small)
    assert found.ok
    assert found.first is None
    assert [(span.first, span.last) for span in found.spans] == [(0, 3), (3, 6), (6, 9), (9, 12)]
    assert [(span.first, span.last) for span in ps.verify(parent, small, every=3).spans] == [(0, 3), (9, 12)]
    assert [(span.first, span.last) for span in ps.verify(parent, small, every=9).spans] == [(9, 12)]
    assert "the same bits" in repr(found)
    assert "verified" in found._repr_html_()


def test_a_flipped_bit_in_a_snapshot_is_found_with_its_step_and_leaf(tmp_path):
    small().fit(run_dir=tmp_path)
    run = ps.open(tmp_path)
    flip(run, 6)
    assert run.state(small().state, step=6) is not None  # no checksum can tell
    found = ps.verify(tmp_path, small)
    assert not found.ok
    assert [span.equal for span in found.spans] == [True, False, False, True]
    first = found.first
    assert (first.first, first.last) == (3, 6)
    (difference,) = first.differences
    assert (difference.path, difference.elements, difference.max_ulp) == ("state.params['0.weight']", 1, 1)
    assert "at 6, computed from 3: 1 leaf differs: state.params['0.weight']: float32[8, 4], 1 differ" in repr(found)
    assert "state.params[&#x27;0.weight&#x27;]" in found._repr_html_()


@pytest.mark.parametrize("gone", [False, True])
def test_a_flipped_bit_where_a_fork_began_is_found(tmp_path, gone):
    """The run that went on from it is consistent in itself: only the parent can tell."""
    small().fit(run_dir=tmp_path / "parent")
    child = ps.fork(tmp_path / "parent", at=6, run_dir=tmp_path / "child", experiment=small)
    flip(child, 6, "2.bias", 0)
    small().fit(run_dir=child.path)
    if gone:
        (tmp_path / "parent").rename(tmp_path / "elsewhere")
    found = ps.verify(child.path, small)
    assert [(span.first, span.last, span.equal) for span in found.spans] == [(6, 6, False), (6, 9, True), (9, 12, True)]
    assert "6, of the parent  DIFFERS" in repr(found)
    assert "at 6, where the fork began: " in repr(found)
    if gone:
        assert found.first.found == "not the state of the parent"
    else:
        assert [difference.path for difference in found.first.differences] == ["state.params['2.bias']"]


def test_damage_is_a_finding(tmp_path):
    small().fit(run_dir=tmp_path)
    for path in (tmp_path / "snapshots" / "6" / "parts").rglob("*"):
        if path.is_file():
            path.write_bytes(path.read_bytes()[:-1] + b"!")
    found = ps.verify(tmp_path, small)
    assert [span.equal for span in found.spans] == [True, True, False, True]  # the digest of it is still right
    assert found.first.found.startswith("damaged: ")


def test_another_code_is_found(parent):
    with pytest.warns(ps.loop.RunChangedWarning) as said:
        found = ps.verify(parent, small(2e-2))
    assert len(said) == 1
    assert not any(span.equal for span in found.spans)


# --- resumed under other settings -------------------------------------------------------------------------------------


@pytest.fixture
def changed(tmp_path):
    """A run of 12 steps, resumed after 6 with a tenth of the learning rate."""
    small(1e-2, until=6).fit(run_dir=tmp_path / "run")
    with pytest.warns(ps.loop.RunChangedWarning, match="lr"):
        small(1e-3, until=12).fit(run_dir=tmp_path / "run")
    return ps.open(tmp_path / "run")


def test_each_span_is_made_with_its_own_settings(changed, tmp_path):
    assert [changed.settings_at(at)["lr"] for at in (1, 6, 7, 12)] == [1e-2, 1e-2, 1e-3, 1e-3]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert ps.verify(changed, small).ok
        assert [r.position for r in ps.replay(changed, small, 4, 9)] == [5, 6, 7, 8, 9]
        assert [r.digest for r in ps.replay(changed, small, 11, 12)] == [changed.digest]
        child = ps.fork(changed, at=5, run_dir=tmp_path / "child", experiment=small)
        assert child.settings["lr"] == 1e-2
        again = ps.fork(changed, at=8, run_dir=tmp_path / "again", experiment=small)
        small(1e-3).fit(run_dir=again.path)
    assert ps.open(again.path).digest == changed.digest
    with pytest.warns(ps.loop.RunChangedWarning, match="lr"):
        assert not ps.verify(changed, small(1e-3)).ok


def test_a_change_of_settings_is_where_two_runs_part(changed, parent):
    assert ps.bisect(changed, parent, small).position == 7
