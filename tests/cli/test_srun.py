"""`srun purestep run ...`: tasks that SLURM starts join each other, and train with the bits of one process.

There is no SLURM here: a script stands in for `srun`. It starts the command so many times with the variables that SLURM
sets for a task, and nothing of torchrun's.
"""

from __future__ import annotations

import json
import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import shared_experiment

ROOT = Path(__file__).parents[2]
SRUN = """#!/bin/sh
# srun --ntasks=N COMMAND...
tasks="${1#--ntasks=}"; shift
task=0
while [ "$task" -lt "$tasks" ]; do
    SLURM_PROCID="$task" SLURM_LOCALID="$task" SLURM_NTASKS="$tasks" SLURM_STEP_NUM_TASKS="$tasks" SLURM_NNODES=1 \\
        SLURM_NTASKS_PER_NODE="$tasks(x1)" SLURM_STEP_NODELIST=localhost SLURM_NODELIST=localhost "$@" &
    pids="$pids $!"
    task=$((task + 1))
done
status=0
for pid in $pids; do wait "$pid" || status=$?; done
exit "$status"
"""


def run(words, **variables):
    """The result of one command, as JSON; variables of any job around this test are left out."""
    foreign = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {k: v for k, v in os.environ.items() if k not in foreign and not k.startswith("SLURM_")}
    env |= {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    done = subprocess.run(words, env=env, capture_output=True, text=True, timeout=180, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)  # one value: rank 0 alone prints


@pytest.mark.slow
def test_tasks_of_srun_join_and_have_the_bits_of_one_process(tmp_path):
    srun = tmp_path / "srun"
    srun.write_text(SRUN)
    srun.chmod(0o755)
    file = shared_experiment.write(tmp_path)
    words = [sys.executable, "-m", "purestep", "run", str(file), "--until", "4steps", "--plan", "ddp", "--json"]
    alone = run([*words, "--run-dir", str(tmp_path / "one")])
    job = str(random.randrange(20_000))  # the port goes by the number of the job
    together = run([str(srun), "--ntasks=2", *words, "--run-dir", str(tmp_path / "two")], SLURM_JOB_ID=job)
    assert together["digest"] == alone["digest"]
    assert together["batches"] == 4
    manifest = json.loads((tmp_path / "two" / "snapshots" / "4" / "meta" / "data.json").read_text())["body"]
    assert manifest["environment"]["world_size"] == 2, "they would have the same bits if each had trained alone"
