"""The scripts of docs/preemption.md do what the page says, under a scheduler that is only a function here."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

FOLDER = Path(__file__).parents[1] / "examples" / "preemption"
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def slurm(tmp_path, train):
    """Run the batch script with a `scontrol` that notes what it is asked for."""
    scontrol = tmp_path / "scontrol"
    scontrol.write_text(f'#!/bin/bash\necho "$@" > {tmp_path}/asked\n')
    scontrol.chmod(0o755)
    env = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}", "SLURM_JOB_ID": "77", "TRAIN": train}
    return subprocess.Popen(["bash", str(FOLDER / "slurm.sh")], env=env)


def test_sigterm_reaches_the_training_and_143_queues_the_job_again(tmp_path):
    script = tmp_path / "train.sh"
    # A training that takes a moment to write its snapshot after the signal.
    script.write_text(
        f"trap 'sleep 0.3; touch {tmp_path}/saved; exit 143' TERM\ntouch {tmp_path}/ready\n"
        "while :; do sleep 0.05; done\n"
    )
    process = slurm(tmp_path, f"bash {script}")
    while not (tmp_path / "ready").exists():
        time.sleep(0.01)
    process.send_signal(signal.SIGTERM)
    assert process.wait(60) == 143
    assert (tmp_path / "saved").exists()
    assert (tmp_path / "asked").read_text() == "requeue 77\n"


@pytest.mark.parametrize("code", [0, 1])
def test_other_exit_codes_are_passed_on_and_nothing_is_queued(tmp_path, code):
    assert slurm(tmp_path, "false" if code else "true").wait(60) == code
    assert not (tmp_path / "asked").exists()


def test_the_manifest_names_what_the_page_says():
    text = (FOLDER / "kubernetes.yaml").read_text()
    for line in ("kind: Job", "values: [143]", "terminationGracePeriodSeconds: 120", "restartPolicy: Never"):
        assert line in text
    assert "\t" not in text
    assert 'command: ["python", "examples/digits.py"' in text


STOPPED = """
import sys, pathlib, torch, purestep as ps
here = pathlib.Path(sys.argv[1])
plan, tx = ps.sharding.ddp(), ps.optim.sgd(0.1)
state = ps.init(lambda: torch.nn.Linear(2, 1), tx, plan=plan)
step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx, plan=plan)
running = ps.callbacks.tap(lambda *_: (here / "running").touch(), every=ps.every.steps(1))
batches = ps.data.batches(torch.ones(8, 2), 4)
result = ps.fit(step, state, batches, until=ps.seconds(60), callbacks=[running], run_dir=here / "run")
(here / f"left-{ps.sharding.rank()}").write_text(str(result.exit_code))
sys.exit(result.exit_code)
"""


@pytest.mark.slow
def test_a_job_under_torchrun_exits_with_143_too(tmp_path):
    """Real torchrun: it exits with 1 after SIGTERM, whatever its processes exit with; the script of the page knows."""
    (tmp_path / "train.py").write_text(STOPPED)
    root = Path(__file__).parents[1]
    env = os.environ | {
        "TORCHRUN": f"{sys.executable} -m torch.distributed.run",
        "PYTHONPATH": str(root),
        "OMP_NUM_THREADS": "1",
    }
    patience = ["--shutdown-timeout=60"] if torch.__version__ >= "2.12" else []  # torch 2.11 always takes 30 s
    options = ("--standalone", "--nproc-per-node=2", *patience, "--monitor-interval=0.1")
    command = ["bash", str(FOLDER / "torchrun.sh"), *options, str(tmp_path / "train.py"), str(tmp_path)]
    process = subprocess.Popen(command, env=env, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "running").exists() and process.poll() is None:
        time.sleep(0.05)
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(120)
    assert process.returncode == 143, errors
    assert "SignalException" in errors, "torchrun was the one that failed"
    assert {(tmp_path / f"left-{rank}").read_text() for rank in range(2)} == {"143"}
    assert (tmp_path / "run" / "snapshots").exists()
