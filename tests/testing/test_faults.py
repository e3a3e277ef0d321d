"""The fault harness: the table of `make faults`, and proof that it sees what goes wrong."""

from __future__ import annotations

import dataclasses
import importlib.util
import json
import os
import sys
from pathlib import Path

import pytest

from purestep.errors import ConfigError
from purestep.testing import FAULTS, check_faults, disks, faults, lane, powercut, trial
from purestep.testing.faults import Report, Row
from purestep.testing.lane import Job, Straight

DEMO = Path(__file__).parents[2] / "examples" / "demo_faults.py"

# Trainings with something wrong in them, which only shows when they are disturbed.
BROKEN = """
import os, shutil, sys, time
from pathlib import Path
sys.path.insert(0, {examples!r})
import demo_faults
import purestep as ps
from purestep.snapshot import Store

def starts(run_dir):
    run_dir.mkdir(parents=True, exist_ok=True)
    count = run_dir / "starts"
    count.write_text("x" + (count.read_text() if count.exists() else ""))
    return len(count.read_text())

def depends_on_its_starts(run_dir):
    n = starts(run_dir)
    result = demo_faults.train(run_dir)
    if n > 1:
        state = result.state.replace(step=result.state.step + n - 1)
        with Store(run_dir / "snapshots") as store:
            store.save(99, result.loop.replace(train=state))
    return result

def loses_a_snapshot(run_dir):
    if starts(run_dir) > 1:
        newest = max(int(n) for n in os.listdir(run_dir / "snapshots"))
        shutil.rmtree(run_dir / "snapshots" / str(newest))
    return demo_faults.train(run_dir)

def leaves_a_half(run_dir):
    result = demo_faults.train(run_dir)
    if starts(run_dir) > 1:
        (run_dir / "something.partial").write_text("half")
    return result

def says_that_all_is_well(run_dir):
    demo_faults.train(run_dir)
    return 0

def writes_another_log(run_dir):
    result = demo_faults.train(run_dir)
    if starts(run_dir) > 1:
        (run_dir / "metrics.csv").write_text("step")
    return result

def hangs(run_dir):
    if starts(run_dir) > 1:
        time.sleep(60)
    return demo_faults.train(run_dir)
"""


def load(path):
    spec = importlib.util.spec_from_file_location(path.stem, path)
    module = sys.modules[path.stem] = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def demo():
    return load(DEMO)


@pytest.mark.slow
def test_no_fault_changes_a_bit():
    module = demo()
    report = check_faults(module.train, with_workers=module.train_with_workers, jobs=2)
    assert report.ok, str(report)
    assert [row.fault for row in report.rows] == list(FAULTS)
    rows = {row.fault: row for row in report.rows}
    assert rows["the clock runs backwards"].injected == 3
    assert sum(row.injected for name, row in rows.items() if name.startswith("SIGKILL")) >= 200
    # Each operation on a file of a snapshot, before and after it; and each stage of a save for a disk that fails.
    assert rows["SIGKILL in each phase of a save"].phases[0] >= 80
    failing = [rows[fault.name] for fault in disks.FAULTS if "snapshot" not in fault.name and not fault.why_not()]
    assert failing
    for row in failing:
        assert row.phases[0] == row.phases[1] >= 20
        assert row.injected >= 20
    assert [row.fault for row in report.rows if row.why_not] == [n for n, fault in FAULTS.items() if fault.why_not()]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("function", "problem"),
    [
        ("depends_on_its_starts", "digest"),
        ("loses_a_snapshot", "resumed from"),
        ("leaves_a_half", "half-written at the end: ['"),
        ("says_that_all_is_well", "exit code 0, not (143,)"),
        ("writes_another_log", "metrics.csv differs"),
        ("hangs", "it did not end within 5 seconds"),
    ],
)
def test_it_sees_what_goes_wrong(zygote, tmp_path, monkeypatch, function, problem):
    script = tmp_path / "broken_job.py"
    script.write_text(BROKEN.format(examples=str(DEMO.parent)))
    base = Straight.of(zygote, Job(script, function, ("{run_dir}",)), tmp_path / "straight")
    if function == "hangs":
        monkeypatch.setattr(lane, "_LONG", 5.0)
    row = faults._row(FAULTS["SIGTERM"], base, tmp_path, 0, 1)
    assert not row.ok
    assert str(row) == "FAILED"
    assert any(problem in text for text in row.problems), row.problems
    assert row.lost == (function == "loses_a_snapshot")


def test_what_a_machine_cannot_do_is_said(monkeypatch):
    name = "disk full: no room is left (ENOSPC)"
    wanting = dataclasses.replace(FAULTS[name], why_not=lambda: "needs another machine")
    row = faults._row(wanting, None, Path(), 0, 1)
    assert (row.injected, row.why_not) == (0, "needs another machine")
    report = Report((Row("a", 3, 2, 2, 0), row), "d", 1.0)
    assert report.ok
    (line,) = (text for text in str(report).splitlines() if text.startswith(name))
    assert line.split("  ")[-1] == "not here: needs another machine"
    assert line.count(" - ") == 3


@pytest.mark.slow
def test_a_phase_that_never_comes_is_a_problem(zygote, tmp_path):
    base = Straight.of(zygote, Job(DEMO, "train", ("{run_dir}",)), tmp_path / "straight")

    def strike(one, trigger):
        return one.go({"do": "kill", **trigger}, verify=True)

    def inject(given):
        trial.in_each_phase(given, ["rename /nowhere"], ["before"], strike, strikes=5)

    row = faults._row(trial.Fault("odd", 1, inject), base, tmp_path, 0, 1)
    assert (row.ok, row.phases) == (False, (0, 1))
    assert "there was no moment before 'rename /nowhere'" in row.problems[0]


def test_a_table_fails_when_anything_was_lost_or_nothing_happened():
    good = Row("a", 3, 2, 2, 0)
    assert good.ok
    odd = Row("a", 3, 2, 2, 0, phases=(4, 5))
    for bad in (Row("a", 0, 2, 2, 0), Row("a", 3, 2, 1, 0), Row("a", 3, 2, 2, 1), Row("a", 3, 2, 2, 0, ("x",)), odd):
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
