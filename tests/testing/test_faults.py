"""The fault harness: the table of `make faults`, and proof that it sees what goes wrong."""

from __future__ import annotations

import importlib.util
import json
import os
from pathlib import Path

import pytest

from purestep.errors import ConfigError
from purestep.testing import FAULTS, check_faults, powercut
from purestep.testing.faults import Report, Row

DEMO = Path(__file__).parents[2] / "examples" / "demo_faults.py"

BROKEN = """
import json, sys
from pathlib import Path
sys.path.insert(0, {examples!r})
import demo_faults
import purestep as ps

def train(run_dir):  # depends on how often it was started, which no snapshot knows
    run_dir.mkdir(parents=True, exist_ok=True)
    count = run_dir / "starts"
    count.write_text("x" + (count.read_text() if count.exists() else ""))
    result = demo_faults.train(run_dir)
    state = result.state.replace(step=result.state.step + len(count.read_text()) - 1)
    if len(count.read_text()) > 1:
        from purestep.snapshot import Store
        with Store(run_dir / "snapshots") as store:
            store.save(99, result.loop.replace(train=state))
    return result
"""


def demo():
    spec = importlib.util.spec_from_file_location("demo_faults", DEMO)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["demo_faults"] = module
    spec.loader.exec_module(module)
    return module


@pytest.mark.slow
def test_no_fault_changes_a_bit():
    module = demo()
    report = check_faults(module.train, with_workers=module.train_with_workers, jobs=2)
    assert report.ok, str(report)
    assert [row.fault for row in report.rows] == list(FAULTS)
    assert [row.injected for row in report.rows if row.fault == "the clock runs backwards"] == [3]
    assert sum(row.injected for row in report.rows if row.fault.startswith("SIGKILL")) >= 200


def test_it_sees_a_training_that_does_not_resume(tmp_path):
    script = tmp_path / "broken_job.py"
    script.write_text(BROKEN.format(examples=str(DEMO.parent)))
    spec = importlib.util.spec_from_file_location("broken_job", script)
    module = importlib.util.module_from_spec(spec)
    import sys

    sys.modules["broken_job"] = module
    spec.loader.exec_module(module)
    report = check_faults(module.train, faults=["SIGTERM"], times={"SIGTERM": 1})
    assert not report.ok
    assert "FAILED" in str(report)
    assert any("digest" in problem for problem in report.rows[0].problems)


def test_a_table_fails_when_anything_was_lost_or_nothing_happened():
    good = Row("a", 3, 2, 2, 0)
    assert good.ok
    for bad in (Row("a", 0, 2, 2, 0), Row("a", 3, 2, 1, 0), Row("a", 3, 2, 2, 1), Row("a", 3, 2, 2, 0, ("x",))):
        assert not bad.ok
        assert not Report((good, bad), "d", 1.0).ok
    assert "3        2 of 2          0" in str(Report((good,), "d", 1.0))


def test_arguments_are_checked():
    with pytest.raises(ConfigError, match="there is no fault 'fire'"):
        check_faults(lambda run_dir: 0, faults=["fire"])
    with pytest.raises(ConfigError, match="jobs=0"):
        check_faults(demo().train, jobs=0)
    with pytest.raises(ConfigError, match="it has to be found by name"):
        check_faults(lambda run_dir: 0)


def test_a_power_cut_keeps_what_was_forced_to_the_disk_and_nothing_else(tmp_path):
    run, shadow = tmp_path / "run", tmp_path / "shadow"
    run.mkdir()
    (run / "old").write_text("before the start")
    recorder = powercut.Recorder(shadow, run)

    def fsync(path):
        recorder.note("fsync", str(path))

    (run / "kept").write_text("all of it")
    fsync(run / "kept")
    fsync(run)
    (run / "kept").write_text("all of it, and more that was not forced")
    (run / "nameless").write_text("the file was forced, its name was not")
    fsync(run / "nameless")
    (run / "old").rename(run / "new")
    powercut.cut(run, shadow, seed=0, durable_only=True)
    assert {p.name: p.read_text() for p in run.iterdir()} == {"old": "before the start", "kept": "all of it"}
    assert not shadow.exists()


def test_luck_differs_from_seed_to_seed_and_keeps_what_is_durable(tmp_path):
    seen = set()
    for seed in range(20):
        run, shadow = tmp_path / f"run{seed}", tmp_path / f"shadow{seed}"
        run.mkdir()
        recorder = powercut.Recorder(shadow, run)
        (run / "kept").write_text("kept")
        recorder.note("fsync", str(run / "kept"))
        recorder.note("fsync", str(run))
        (run / "later").write_text("later")
        powercut.cut(run, shadow, seed=seed, durable_only=False)
        assert (run / "kept").read_text() == "kept"
        seen.add(json.dumps(sorted(p.name for p in run.iterdir())))
    assert len(seen) == 2


def test_the_demo_is_listed_in_the_makefile():
    assert "examples/demo_faults.py" in (DEMO.parents[1] / "Makefile").read_text()
    assert os.access(DEMO, os.R_OK)
