"""The scripts of docs/clusters.md: what they start trains as one process does, and their options are known."""

from __future__ import annotations

import os
import random
import re
import shlex
import shutil
import stat
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from torch.distributed.run import parse_args as torchrun_arguments

import purestep as ps

ROOT = Path(__file__).parents[1]
PAGE = (ROOT / "docs" / "clusters.md").read_text()
pytestmark = pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")


def blocks(language):
    return re.findall(rf"^```{language}\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)


def program(folder, name, text):
    path = folder / name
    path.write_text(text)
    path.chmod(path.stat().st_mode | stat.S_IXUSR)


SLURM, *LINES = blocks("bash")


def slurm(tmp_path, python):
    """Run the batch script with stand-ins of SLURM's programs, in an allocation for two tasks."""
    stand_in = Path(__file__).parent / "distributed" / "srun.py"
    program(tmp_path, "srun", f'#!/bin/sh\nexec {sys.executable} {stand_in} "$@"\n')
    program(tmp_path, "scontrol", f'#!/bin/sh\necho "$@" > {tmp_path}/asked\n')
    program(tmp_path, "python", python)
    (tmp_path / "job.sh").write_text(SLURM)
    env = {name: value for name, value in os.environ.items() if name not in ("RANK", "WORLD_SIZE")}
    env |= {"PATH": f"{tmp_path}:{env['PATH']}", "PYTHONPATH": str(ROOT), "SLURM_NTASKS": "2"}
    env |= {"SLURM_JOB_ID": str(random.Random(os.getpid()).randrange(10**6))}
    done = subprocess.run(["bash", "job.sh"], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=300)
    asked = tmp_path / "asked"
    return done, asked.read_text().split() if asked.exists() else None, env["SLURM_JOB_ID"]


@pytest.mark.parametrize("code", [0, 1, 143])
def test_the_batch_script_queues_the_job_again_after_a_signal_alone(tmp_path, code):
    done, asked, job = slurm(tmp_path, f"#!/bin/sh\nexit {code}\n")
    assert done.returncode == code, done.stderr
    assert asked == (["requeue", job] if code == 143 else None)


def test_the_script_trains_in_one_process(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    namespace = {"__name__": "page"}
    exec(blocks("python")[0], namespace)
    assert namespace["experiment"](steps=2).fit(run_dir=tmp_path / "run").reason == "reached 2 steps"


def test_the_lines_have_options_that_torchrun_knows():
    words = shlex.split(next(line for line in LINES if line.startswith("torchrun")))
    given = torchrun_arguments(words[1:])
    assert (given.training_script, given.nnodes, given.max_restarts) == ("train.py", "2", 3)
    assert subprocess.run(["bash", "-n"], input="\n".join(blocks("bash")), text=True).returncode == 0


def test_the_job_of_kubeflow_mounts_what_it_claims():
    (text,) = blocks("yaml")
    spec = yaml.safe_load(text)["spec"]
    assert torchrun_arguments(spec["trainer"]["command"][1:]).training_script == "train.py"
    (override,) = spec["podTemplateOverrides"]
    mounts = override["spec"]["containers"][0]["volumeMounts"]
    assert [m["name"] for m in mounts] == [v["name"] for v in override["spec"]["volumes"]]


@pytest.mark.slow
def test_the_batch_script_trains_with_the_bits_of_one_process(tmp_path, monkeypatch):
    (tmp_path / "train.py").write_text(blocks("python")[0])
    done, asked, _ = slurm(tmp_path, f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    assert (done.returncode, asked) == (0, None), done.stderr
    (tmp_path / "alone").mkdir()
    monkeypatch.chdir(tmp_path / "alone")
    namespace = {"__name__": "page"}
    exec(blocks("python")[0], namespace)
    alone = namespace["experiment"]().fit(run_dir="runs/line")
    run = ps.open(tmp_path / "runs" / "line")
    assert run.environment["world_size"] == 2
    assert run.digest == ps.digest(alone.state)
