"""What the manifest of a run says of it, and a run that goes on beside a manifest that is wrong."""

from __future__ import annotations

import shutil
import time

import pytest

import purestep as ps
from purestep.loop.events import LoopState
from purestep.snapshot.manifest import DATA, TREE


def fit(job, run_dir, until, pause=0.0):
    given = job()
    slow = ps.callbacks.tap(lambda event, loop: time.sleep(pause))
    snapshots = ps.callbacks.snapshots(every=ps.every.steps(2), keep=ps.snapshot.latest(3))
    given["callbacks"] = [*given["callbacks"], slow, snapshots]
    return ps.fit(**given, until=ps.steps(until), run_dir=run_dir)


def test_equal_runs_have_equal_digests_whatever_the_clock_says(job, tmp_path):
    results = [fit(job, tmp_path / name, 4, pause) for name, pause in (("a", 0.0), ("b", 0.01))]
    one, other = (ps.snapshot.manifest(tmp_path / name, 4) for name in "ab")
    assert one.digest != other.digest  # of all that was saved, the clock too
    assert one.digests == other.digests
    assert one.digests["state"] == ps.tree.digest(results[0].state)
    assert set(one.digests) == {"state", "run"}
    like = LoopState(results[0].state, cursor=..., callbacks=..., status=..., elapsed=0.0)
    restored = ps.restore(tmp_path / "a", like=like, verify="digest")
    assert ps.tree.digest(restored.train) == one.digests["state"]


def test_another_run_has_another_digest(job, tmp_path):
    fit(job, tmp_path / "a", 4)
    fit(lambda: job(seed=1), tmp_path / "b", 4)
    one, other = (ps.snapshot.manifest(tmp_path / name, 4).digests for name in "ab")
    assert one["state"] != other["state"]
    assert one["run"] != other["run"]


def test_fit_goes_on_from_the_last_whole_snapshot(job, tmp_path):
    fit(job, tmp_path, 6)
    newest = tmp_path / "snapshots" / "6"
    shutil.copy(newest / TREE, newest / DATA)
    assert ps.snapshot.steps(tmp_path) == [2, 4]
    with pytest.warns(RuntimeWarning, match="using step 4"):
        result = fit(job, tmp_path, 8)
    assert result.loop.cursor.batches == 8
