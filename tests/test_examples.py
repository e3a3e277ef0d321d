"""The examples in shorter forms: each begun once as a user begins it, and then by the zygote, which is quicker."""

import importlib.util
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from shared_signals import send_when_logged

import purestep as ps

ROOT = Path(__file__).parents[1]


# What the example imports, which is most of what it costs to start it.
LOADED = "sklearn.datasets orbax.checkpoint torch.utils.tensorboard matplotlib.figure matplotlib.backends.backend_agg"


@pytest.fixture
def run(zygote):
    def run(script, *arguments, fresh=False):
        if not fresh:
            return zygote.run(ROOT / "examples" / script, *map(str, arguments), preload=LOADED, timeout=400)
        command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
        return subprocess.run(command, capture_output=True, text=True, timeout=400, check=False)

    return run


def digest_of(out):
    return re.search(r"digest of the last state\s+([0-9a-f]{64})", out).group(1)


@pytest.mark.slow
def test_digits_learns_continues_and_leaves_what_it_says(run, tmp_path):
    first = run("digits.py", "--run-dir", tmp_path / "a", "--epochs", 2, "--workers", 2, fresh=True)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {
        "learning_curves.png",
        "metrics.csv",
        "snapshots",
        "tensorboard",
    }
    assert float(re.search(r"accuracy, last\s+([\d.]+)%", first.stdout).group(1)) > 90
    again = run("digits.py", "--run-dir", tmp_path / "a", "--epochs", 2, "--workers", 2)
    alone = run("digits.py", "--run-dir", tmp_path / "b", "--epochs", 2, "--workers", 0)
    assert digest_of(first.stdout) == digest_of(again.stdout) == digest_of(alone.stdout)
    assert len(ps.snapshot.steps(tmp_path / "a")) == 2


@pytest.mark.slow
def test_the_killed_run_ends_with_the_digest_of_the_straight_one(zygote, tmp_path, monkeypatch, capsys):
    spec = importlib.util.spec_from_file_location("demo_resume", ROOT / "examples" / "demo_resume.py")
    demo = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(demo)
    children, start = [], demo.start

    def fork(run_dir, epochs, workers):
        if run_dir.name == "straight":
            return start(run_dir, epochs, workers)
        arguments = map(str, ("--run-dir", run_dir, "--epochs", epochs, "--workers", workers))
        children.append(zygote.popen(demo.SCRIPT, *arguments, preload=LOADED, stderr=None))
        return children[-1]

    monkeypatch.setattr(demo, "start", fork)
    monkeypatch.setattr(sys, "argv", f"demo --run-dir {tmp_path} --epochs 4 --kills 2 --workers 0".split())
    try:
        assert demo.main() == 0
    finally:
        for child in children:
            child.__exit__()
    said = capsys.readouterr().out
    assert said.count("killed ") == 3
    assert [child.returncode for child in children] == [-signal.SIGKILL, -signal.SIGKILL, 0]
    assert "the same bits" in said


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_script_with_its_code(zygote, tmp_path, number, code):
    script, arguments = ROOT / "examples" / "digits.py", ("--epochs", "50", "--workers", "0")
    process = zygote.popen(script, "--run-dir", str(tmp_path), *arguments, preload=LOADED)
    out, errors = send_when_logged(process, tmp_path / "metrics.csv", 2, number)
    assert (process.returncode, errors) == (code, "")
    assert f"interrupted by {signal.Signals(number).name}" in out
    assert len(ps.snapshot.steps(tmp_path)) >= 1


@pytest.mark.slow
def test_the_gpt_learns_and_says_its_digest(run):
    found = [run("gpt.py", "--steps", 4, "--megabytes", 0.05, "--plan", plan) for plan in ("ddp", "fsdp")]
    assert [(r.returncode, r.stderr) for r in found] == [(0, ""), (0, "")]
    assert float(re.search(r"training loss, last\s+([\d.]+)", found[0].stdout).group(1)) < 5.6
    assert digest_of(found[0].stdout) == digest_of(found[1].stdout)
