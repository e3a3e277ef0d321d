"""The examples, run as a user runs them, in shorter forms."""

import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

import purestep as ps

ROOT = Path(__file__).parents[1]


def run(script, *arguments, timeout=400):
    command = [sys.executable, str(ROOT / "examples" / script), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, timeout=timeout, check=False)


def digest_of(out):
    return re.search(r"digest of the last state\s+([0-9a-f]{64})", out).group(1)


@pytest.mark.slow
def test_digits_learns_continues_and_leaves_what_it_says(tmp_path):
    first = run("digits.py", "--run-dir", tmp_path / "a", "--epochs", 3, "--workers", 2)
    assert first.returncode == 0, first.stderr
    assert first.stderr == ""
    assert {p.name for p in (tmp_path / "a").iterdir()} >= {
        "learning_curves.png",
        "metrics.csv",
        "snapshots",
        "tensorboard",
    }
    assert float(re.search(r"accuracy, last\s+([\d.]+)%", first.stdout).group(1)) > 90
    again = run("digits.py", "--run-dir", tmp_path / "a", "--epochs", 3, "--workers", 2)
    alone = run("digits.py", "--run-dir", tmp_path / "b", "--epochs", 3, "--workers", 0)
    assert digest_of(first.stdout) == digest_of(again.stdout) == digest_of(alone.stdout)
    assert len(ps.snapshot.steps(tmp_path / "a")) in (2, 3)


@pytest.mark.slow
def test_the_killed_run_ends_with_the_digest_of_the_straight_one(tmp_path):
    done = run("demo_resume.py", "--run-dir", tmp_path, "--epochs", 4, "--kills", 2, "--workers", 0)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.count("killed ") >= 2
    assert "the same bits" in done.stdout


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_signal_ends_the_script_with_its_code(tmp_path, number, code):
    command = [sys.executable, str(ROOT / "examples" / "digits.py"), "--run-dir", str(tmp_path), "--epochs", "50"]
    process = subprocess.Popen([*command, "--workers", "0"], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    log, end = tmp_path / "metrics.csv", time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > 2):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    out, errors = process.communicate(timeout=60)
    assert (process.returncode, errors) == (code, "")
    assert f"interrupted by {signal.Signals(number).name}" in out
    assert len(ps.snapshot.steps(tmp_path)) >= 1
