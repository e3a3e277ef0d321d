"""Processes find each other under each launcher: by the variables it sets, and under a stand-in of srun."""

from __future__ import annotations

import json
import os
import random
import runpy
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from purestep.distributed import control, launchers
from purestep.distributed.launchers import Launch, adopt, alone_in_allocation, launch_of
from purestep.errors import ConfigError

SRUN = Path(__file__).with_name("srun.py")
TORCHRUN = {
    "RANK": "5",
    "WORLD_SIZE": "8",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "4",
    "GROUP_RANK": "1",
    "MASTER_ADDR": "node07",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RESTART_COUNT": "1",
    "TORCHELASTIC_USE_AGENT_STORE": "False",
}
SLURM = {
    "SLURM_JOB_ID": "4711",
    "SLURM_NTASKS": "7",
    "SLURM_STEP_ID": "2",
    "SLURM_STEP_NODELIST": "gpu[007-009]",
    "SLURM_STEP_NUM_NODES": "3",
    "SLURM_STEP_NUM_TASKS": "7",
    "SLURM_STEP_TASKS_PER_NODE": "3,2(x2)",
    "SLURM_NODEID": "1",
    "SLURM_PROCID": "4",
    "SLURM_LOCALID": "1",
}
OPEN_MPI = {
    "OMPI_COMM_WORLD_RANK": "1",
    "OMPI_COMM_WORLD_SIZE": "2",
    "OMPI_COMM_WORLD_LOCAL_RANK": "1",
    "OMPI_COMM_WORLD_LOCAL_SIZE": "2",
    "PMIX_NAMESPACE": "prterun-host-81@1",
}
HYDRA = {"PMI_RANK": "3", "PMI_SIZE": "4", "MPI_LOCALRANKID": "1", "MPI_LOCALNRANKS": "2"}

# Variables, and what they say: launcher, rank, size, local rank, local size, address.
KNOWN = {
    "torchrun on two nodes, after a restart": (TORCHRUN, ("torchrun", 5, 8, 1, 4, "node07")),
    # The PyTorchJob of Kubeflow sets these in its pods itself; its trainer and TorchX call torchrun.
    "pods of a PyTorchJob": (
        {"RANK": "1", "WORLD_SIZE": "2", "MASTER_ADDR": "job-master-0", "MASTER_PORT": "23456", "PET_NNODES": "2"},
        ("torchrun", 1, 2, 0, 1, "job-master-0"),
    ),
    "torchrun under TorchX": (TORCHRUN | {"TORCHX_JOB_ID": "local://a"}, ("torchrun", 5, 8, 1, 4, "node07")),
    "torchrun in a task of srun": (SLURM | TORCHRUN, ("torchrun", 5, 8, 1, 4, "node07")),
    "srun on three nodes": (SLURM, ("srun", 4, 7, 1, 2, "gpu007")),
    "srun, with an address": (SLURM | {"MASTER_ADDR": "10.0.0.1"}, ("srun", 4, 7, 1, 2, "10.0.0.1")),
    "srun on one node": (
        SLURM | {"SLURM_STEP_TASKS_PER_NODE": "7", "SLURM_NODEID": "0", "SLURM_LOCALID": "4"},
        ("srun", 4, 7, 4, 7, "127.0.0.1"),
    ),
    "srun --mpi=pmi2": (SLURM | {"PMI_RANK": "4", "PMI_SIZE": "7"}, ("mpiexec", 4, 7, 1, 2, "gpu007")),
    "mpirun on one host": (OPEN_MPI, ("mpirun", 1, 2, 1, 2, "127.0.0.1")),
    # SLURM's variables are those of the helper that mpirun started by srun.
    "mpirun in an allocation": (
        SLURM | OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1", "SLURM_STEP_NUM_TASKS": "2", "SLURM_PROCID": "0"},
        ("mpirun", 1, 2, 1, 1, "gpu007"),
    ),
    "mpiexec under LSF": (HYDRA | {"LSB_MCPU_HOSTS": "h3 2 h4 2"}, ("mpiexec", 3, 4, 1, 2, "h3")),
    "mpiexec without an address": (HYDRA, ("mpiexec", 3, 4, 1, 2, None)),
}


@pytest.mark.parametrize("name", KNOWN)
def test_each_launcher_is_read_from_its_variables(name):
    environment, expected = KNOWN[name]
    found = launch_of(environment)
    assert found is not None
    assert (found.launcher, found.rank, found.size, found.local_rank, found.local_size, found.address) == expected
    assert found.port == int(environment.get("MASTER_PORT", found.port))


def test_torchrun_s_variables_are_set_from_those_of_others():
    """And are read again as the same place, so that a second call changes nothing."""
    environment = dict(SLURM)
    launch = adopt(environment)
    assert launch == launch_of(SLURM)
    assert environment["RANK"] == "4"
    assert environment["LOCAL_WORLD_SIZE"] == "2"
    again = adopt(environment)
    assert again == Launch("torchrun", 4, 7, 1, 2, "gpu007", launch.port)
    assert adopt(dict(TORCHRUN)).launcher == "torchrun"


def test_every_task_names_one_port_and_another_job_another():
    tasks = [launch_of(SLURM | {"SLURM_PROCID": str(r), "SLURM_LOCALID": str(r % 2)}) for r in range(7)]
    assert len({task.port for task in tasks}) == 1
    ports = {launch_of(SLURM | {"SLURM_STEP_ID": str(step)}).port for step in range(20)}
    assert len(ports) > 15
    assert all(20_000 <= port < 32_768 for port in ports)


def test_tasks_of_each_node_are_counted_from_slurm_s_list(seed):
    counts = [random.randint(1, 5) for _ in range(9)]
    groups, node = [], 0
    while node < len(counts):
        same = next((i for i, c in enumerate(counts[node:]) if c != counts[node]), len(counts) - node)
        groups.append(f"{counts[node]}(x{same})" if same > 1 else f"{counts[node]}")
        node += same
    total = sum(counts)
    base = SLURM | {"SLURM_STEP_NUM_TASKS": str(total), "SLURM_STEP_TASKS_PER_NODE": ",".join(groups)}
    assert [launch_of(base | {"SLURM_NODEID": str(n)}).local_size for n in range(len(counts))] == counts


@pytest.mark.parametrize(
    "environment",
    [{}, {"RANK": "0"}, {"WORLD_SIZE": "1"}, {"SLURM_JOB_ID": "1", "SLURM_NTASKS": "1", "SLURM_PROCID": "0"}],
)
def test_a_process_by_itself_stays_so(environment):
    before = dict(environment)
    assert launch_of(environment) is None
    assert adopt(environment) is None
    assert environment == before
    assert alone_in_allocation(environment) is None


def test_one_task_of_srun_or_mpi_is_alone_too():
    assert adopt(SLURM | {"SLURM_STEP_NUM_TASKS": "1", "SLURM_PROCID": "0"}) is None
    assert adopt({"PMI_RANK": "0", "PMI_SIZE": "1"}) is None


REFUSED = {
    "half of torchrun's": (
        {"RANK": "1", "WORLD_SIZE": "4"},
        ["MASTER_ADDR, MASTER_PORT are not set", "RANK=1, WORLD_SIZE=4", "torchrun --nnodes=N"],
    ),
    "python where torchrun was to be": (
        {"PET_NNODES": "4", "PET_NPROC_PER_NODE": "auto", "PET_NODE_RANK": "2"},
        ["PET_NNODES=4, PET_NODE_RANK=2, PET_NPROC_PER_NODE=auto", "torchrun train.py"],
    ),
    "mpirun on hosts of no scheduler": (
        OPEN_MPI | {"OMPI_COMM_WORLD_LOCAL_SIZE": "1"},
        ["OMPI_COMM_WORLD_RANK=1", "rank 1 of 2 does not know on which host rank 0 is", "mpirun -x MASTER_ADDR=HOST"],
    ),
    "mpiexec on hosts of no scheduler": (HYDRA, ["PMI_RANK=3, PMI_SIZE=4", "mpiexec -genv MASTER_ADDR HOST"]),
}


@pytest.mark.parametrize("name", REFUSED)
def test_what_cannot_be_joined_is_refused_with_what_is_there_and_what_to_type(name):
    environment, parts = REFUSED[name]
    with pytest.raises(ConfigError) as caught:
        adopt(dict(environment))
    for part in parts:
        assert part in str(caught.value)


def test_initialize_says_once_that_an_allocation_has_room_for_more(monkeypatch):
    for name, value in {"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}.items():
        monkeypatch.setenv(name, value)
    monkeypatch.setattr(control._me, "warned", False)
    with pytest.warns(launchers.LauncherWarning, match="srun python train.py") as caught:
        assert not control.initialize()
    assert not control.initialize(), "a second warning would be an error here"
    assert len(caught) == 1
    assert control.size() == 1


def test_initialize_refuses_half_a_job(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "4")
    with pytest.raises(ConfigError, match="RANK, MASTER_ADDR, MASTER_PORT are not set"):
        control.initialize()


TASK = """
import json, pathlib, sys, torch, purestep as ps
torch.set_num_threads(1)
joined = ps.sharding.initialize(timeout=60)
from purestep.distributed import control
tx = ps.optim.sgd(1e-2)
plan = ps.sharding.ddp()
step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx, plan=plan, microbatches=4)
state = ps.init(lambda: torch.nn.Linear(5, 3), tx, seed=1, plan=plan)
for batch in torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0)):
    state, _ = step(state, batch)
told = {"joined": joined, "ranks": control.gather(ps.sharding.rank()), "size": ps.sharding.size(),
        "near": control.neighbours(), "digest": ps.tree.digest(state)}
pathlib.Path(sys.argv[1], f"{ps.sharding.rank()}.json").write_text(json.dumps(told))
"""
OURS = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT", "LOCAL_RANK", "LOCAL_WORLD_SIZE")


def clean():
    return {name: value for name, value in os.environ.items() if name not in OURS}


def digests_of(directory, size):
    told = [json.loads((directory / f"{rank}.json").read_text()) for rank in range(size)]
    for each in told:
        assert each["joined"] is (size > 1)
        assert each["ranks"] == list(range(size))
        assert each["size"] == size
        assert each["near"] == size
    return {each["digest"] for each in told}


def test_tasks_of_srun_train_one_model(zygote, tmp_path):
    variables = runpy.run_path(str(SRUN))["variables"]
    job = str(random.Random(os.getpid()).randrange(10**6))
    children = [
        zygote.popen(TASK, tmp_path, env=clean() | variables(r, 2, job), preload=zygote.RANKS) for r in range(2)
    ]
    for child in children:
        with child:
            _, errors = child.communicate(120)
            assert (child.returncode, errors) == (0, "")
    several = digests_of(tmp_path, 2)
    alone = tmp_path / "alone"
    alone.mkdir()
    done = zygote.run(TASK, alone, env=clean(), preload=zygote.RANKS)
    assert done.returncode == 0, done.stderr
    assert several == digests_of(alone, 1)


EXPERIMENT = """
import torch, purestep as ps
@ps.experiment
def train(lr: float = 1e-2, plan: ps.sharding.Plan = None) -> ps.Experiment:
    tx = ps.optim.sgd(lr)
    step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx, plan=plan, microbatches=4)
    state = ps.init(lambda: torch.nn.Linear(5, 3), tx, seed=1, plan=plan)
    x = torch.randn(3, 8, 5, generator=torch.Generator().manual_seed(0))
    return ps.Experiment(step, state, list(x), until=ps.steps(3))
"""


def srun(tmp_path, *command):
    """Run a command as two tasks of a `srun` that is on PATH, in an allocation of its own."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text(f'#!/bin/sh\nexec {sys.executable} {SRUN} "$@"\n')
    (folder / "srun").chmod(0o755)
    root = Path(__file__).parents[2]
    env = clean() | {"PATH": f"{folder}:{os.environ['PATH']}", "PYTHONPATH": str(root), "SLURM_NTASKS": "2"}
    env |= {"SLURM_JOB_ID": str(random.Random(os.getpid()).randrange(10**6, 2 * 10**6))}
    words = [shutil.which("srun", path=env["PATH"]), "-n", "2", *map(str, command)]
    return subprocess.run(words, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=300, check=True).stdout


@pytest.mark.slow
def test_srun_starts_a_script_and_the_command_as_one_job(tmp_path):
    (tmp_path / "train.py").write_text(TASK)
    srun(tmp_path, sys.executable, "train.py", tmp_path)
    script = digests_of(tmp_path, 2)
    shutil.rmtree(tmp_path / "bin")
    (tmp_path / "sine.py").write_text(EXPERIMENT)
    said = srun(
        tmp_path, sys.executable, "-m", "purestep", "run", "sine.py", "--plan", "fsdp", "--run-dir", "run", "--json"
    )
    assert said.count('"digest"') == 1, "rank 0 alone reports"
    assert json.loads(said[said.index("{") :])["digest"] in script
