"""Which program started the processes of a job, read from the environment variables that it sets.

Knows torchrun (which Kubeflow and TorchX call), Open MPI, launchers that speak PMI (MPICH, Intel MPI, Cray), and
SLURM's `srun`. It opens no connection: `control` joins the processes. It imports no torch.
"""

from __future__ import annotations

import dataclasses
import os
import re
import zlib
from collections.abc import Mapping, MutableMapping
from pathlib import Path

from purestep.errors import ConfigError, explain

# What torch needs to find the other processes; torchrun sets all of them.
TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
_PORTS = range(20_000, 32_000)  # below those that Linux gives to outgoing connections (from 32,768)


class LauncherWarning(UserWarning):
    """The job has several tasks, but this process was not started as one of them."""


@dataclasses.dataclass(frozen=True)
class Launch:
    """The place of this process in its job.

    Attributes:
        launcher: name of the program that started the processes.
        rank: number of this process, from 0.
        size: number of processes.
        local_rank: its number among those of its machine.
        local_size: number of processes of its machine.
        address: host of rank 0; None where the launcher does not say.
        port: on which rank 0 listens; the same on every process.
    """

    launcher: str
    rank: int
    size: int
    local_rank: int
    local_size: int
    address: str | None
    port: int


def launch_of(environment: Mapping[str, str] = os.environ) -> Launch | None:
    """Return the place of this process in its job; None for a process that was started by itself.

    The variables of torchrun come first, because torchrun itself may run in a task of SLURM or MPI. Those of MPI come
    before SLURM's: inside an allocation `mpirun` starts its helpers by `srun`, and its processes inherit the variables
    of a helper.

    Examples:
        >>> launch_of({"SLURM_STEP_NUM_TASKS": "4", "SLURM_PROCID": "3", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77",
        ...            "SLURM_STEP_NODELIST": "node[07-08]", "SLURM_STEP_NUM_NODES": "2", "SLURM_NODEID": "1",
        ...            "SLURM_STEP_TASKS_PER_NODE": "2(x2)"})
        Launch(launcher='srun', rank=3, size=4, local_rank=1, local_size=2, address='node07', port=25873)
        >>> launch_of({}) is None
        True
    """
    for read in (_torchrun, _open_mpi, _pmi, _srun):
        launch = read(environment)
        if launch is not None:
            return launch
    return None


def adopt(environment: MutableMapping[str, str] = os.environ) -> Launch | None:
    """Set torchrun's variables in a process that another launcher started, so that torch and other libraries find them.

    Args:
        environment: of the process, changed in place.

    Returns:
        The place of this process; None if it is the only one of its job.

    Raises:
        ConfigError: the variables are those of a job of several processes, but do not say how to join it.
    """
    launch = launch_of(environment)
    if launch is None:
        _refuse_incomplete(environment)
        return None
    if launch.size == 1:
        return None
    if launch.launcher != "torchrun":
        if launch.address is None:
            raise ConfigError(_no_address(launch, environment))
        environment.update(
            RANK=str(launch.rank),
            WORLD_SIZE=str(launch.size),
            LOCAL_RANK=str(launch.local_rank),
            LOCAL_WORLD_SIZE=str(launch.local_size),
            MASTER_ADDR=launch.address,
            MASTER_PORT=str(launch.port),
        )
    return launch


def alone_in_allocation(environment: Mapping[str, str] = os.environ) -> str | None:
    """Return the text of a warning for a process that runs by itself where SLURM has room for several tasks.

    Examples:
        >>> print(alone_in_allocation({"SLURM_JOB_ID": "77", "SLURM_NTASKS": "4", "SLURM_PROCID": "0"}))
        this process computes alone, in an allocation for 4 tasks
          where:   SLURM_JOB_ID=77, SLURM_NTASKS=4, SLURM_PROCID=0
          why:     only srun starts a process for each task; a line of a batch script runs once
          instead: srun python train.py
    """
    tasks = _number(environment.get("SLURM_NTASKS"), 1)
    if tasks == 1 or launch_of(environment) is not None:
        return None
    return explain(
        f"this process computes alone, in an allocation for {tasks} tasks",
        where=_seen(environment, "SLURM_JOB_ID", "SLURM_NTASKS", "SLURM_PROCID"),
        why="only srun starts a process for each task; a line of a batch script runs once",
        instead="srun python train.py",
    )


# --- one reader for each launcher -------------------------------------------------------------------------------------


def _torchrun(environment: Mapping[str, str]) -> Launch | None:
    if any(name not in environment for name in TORCHRUN):
        return None
    rank, size, address, port = (environment[name] for name in TORCHRUN)
    local = _number(environment.get("LOCAL_RANK"), 0), _number(environment.get("LOCAL_WORLD_SIZE"), 1)
    return Launch("torchrun", int(rank), int(size), *local, address, int(port))


def _open_mpi(environment: Mapping[str, str]) -> Launch | None:
    if "OMPI_COMM_WORLD_RANK" not in environment or "OMPI_COMM_WORLD_SIZE" not in environment:
        return None
    job = environment.get("PMIX_NAMESPACE", environment.get("OMPI_MCA_ess_base_jobid", ""))
    return _made(
        "mpirun",
        environment,
        (environment["OMPI_COMM_WORLD_RANK"], environment["OMPI_COMM_WORLD_SIZE"]),
        (environment.get("OMPI_COMM_WORLD_LOCAL_RANK"), environment.get("OMPI_COMM_WORLD_LOCAL_SIZE")),
        job,
    )


def _pmi(environment: Mapping[str, str]) -> Launch | None:
    if "PMI_RANK" not in environment or "PMI_SIZE" not in environment:
        return None
    rank = environment.get("MPI_LOCALRANKID", environment.get("PALS_LOCAL_RANKID", environment.get("SLURM_LOCALID")))
    size = environment.get("MPI_LOCALNRANKS", environment.get("PALS_LOCAL_SIZE", _tasks_here(environment)))
    job = environment.get("PBS_JOBID", environment.get("SLURM_JOB_ID", ""))
    return _made("mpiexec", environment, (environment["PMI_RANK"], environment["PMI_SIZE"]), (rank, size), job)


def _srun(environment: Mapping[str, str]) -> Launch | None:
    # SLURM_NTASKS and SLURM_PROCID are in a batch script too, which is no task; only srun sets those of a step.
    if "SLURM_PROCID" not in environment or "SLURM_STEP_NUM_TASKS" not in environment:
        return None
    job = f"{environment.get('SLURM_JOB_ID', '')}.{environment.get('SLURM_STEP_ID', '0')}"
    return _made(
        "srun",
        environment,
        (environment["SLURM_PROCID"], environment["SLURM_STEP_NUM_TASKS"]),
        (environment.get("SLURM_LOCALID"), _tasks_here(environment)),
        job,
    )


def _made(
    launcher: str,
    environment: Mapping[str, str],
    place: tuple[str, str],
    local: tuple[str | None, str | None],
    job: str,
) -> Launch:
    rank, size = map(int, place)
    local_rank = _number(local[0], 0)
    local_size = _number(local[1], local_rank + 1)
    # Jobs that share a machine must not meet on one port, and every process of a job has to name the same.
    port = _PORTS[zlib.crc32(job.encode()) % len(_PORTS)]
    address = "127.0.0.1" if local_size == size else _first_host(environment)
    return Launch(
        launcher,
        rank,
        size,
        local_rank,
        local_size,
        environment.get("MASTER_ADDR", address),
        _number(environment.get("MASTER_PORT"), port),
    )


def _first_host(environment: Mapping[str, str]) -> str | None:
    """The host of the first process, from what schedulers say of their allocation."""
    for name in ("SLURM_STEP_NODELIST", "SLURM_JOB_NODELIST", "SLURM_NODELIST"):
        if name in environment:
            return first_node(environment[name])
    if environment.get("LSB_MCPU_HOSTS") or environment.get("LSB_HOSTS"):
        return (environment.get("LSB_MCPU_HOSTS") or environment["LSB_HOSTS"]).split()[0]
    if "PBS_NODEFILE" in environment and Path(environment["PBS_NODEFILE"]).is_file():
        return Path(environment["PBS_NODEFILE"]).read_text().split()[0]
    return None


def first_node(nodes: str) -> str:
    """Return the first host of a host list of SLURM.

    Examples:
        >>> first_node("node[07-08,11],gpu1"), first_node("gpu1,gpu2"), first_node("a3-[1-2]x")
        ('node07', 'gpu1', 'a3-1x')
    """
    match = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,]*)", nodes)
    return "".join(filter(None, match.groups())) if match else nodes


def _tasks_here(environment: Mapping[str, str]) -> str | None:
    """The number of tasks of SLURM on this node: the entry of the node in a list such as `4(x2),3`."""
    counts: list[str] = []
    for entry in filter(None, environment.get("SLURM_STEP_TASKS_PER_NODE", "").split(",")):
        count, _, times = entry.partition("(x")
        counts += [count] * _number(times.rstrip(")"), 1)
    node = _number(environment.get("SLURM_NODEID"), 0)
    return counts[node] if node < len(counts) else None


def _number(text: str | None, default: int) -> int:
    return int(text) if text and text.isdecimal() else default


# --- what is missing --------------------------------------------------------------------------------------------------


def _refuse_incomplete(environment: Mapping[str, str]) -> None:
    missing = [name for name in TORCHRUN if name not in environment]
    if _number(environment.get("WORLD_SIZE"), 1) > 1:
        verb = "is" if len(missing) == 1 else "are"
        raise ConfigError(
            explain(
                f"this process is one of several, but {', '.join(missing)} {verb} not set",
                where=_seen(environment, *TORCHRUN, "LOCAL_RANK"),
                why="the processes of a job find each other by RANK, WORLD_SIZE, MASTER_ADDR and MASTER_PORT",
                instead="torchrun --nnodes=N --nproc-per-node=M --rdzv-backend=c10d --rdzv-endpoint=HOST:29500 \\\n"
                "    train.py\nor set all four of them in every process",
            )
        )
    # The trainer of Kubeflow sets the arguments of torchrun as PET_*; python does not read them.
    nodes, each = environment.get("PET_NNODES", "1"), environment.get("PET_NPROC_PER_NODE", "1")
    if nodes not in ("1", "1:1") or each != "1":
        raise ConfigError(
            explain(
                "this process was to be started by torchrun, and was not",
                where=_seen(environment, *sorted(name for name in environment if name.startswith("PET_"))),
                why="PET_* are the arguments of torchrun as variables; it starts the processes and says who they are",
                instead="torchrun train.py   # as the command of the container, instead of python train.py",
            )
        )


def _no_address(launch: Launch, environment: Mapping[str, str]) -> str:
    names = [name for name in environment if name.startswith(("OMPI_COMM_WORLD_", "PMI_RANK", "PMI_SIZE", "MPI_LOCAL"))]
    option = "-x MASTER_ADDR=HOST" if launch.launcher == "mpirun" else "-genv MASTER_ADDR HOST"
    return explain(
        f"rank {launch.rank} of {launch.size} does not know on which host rank 0 is",
        where=_seen(environment, *sorted(names)),
        why=f"{launch.launcher} does not say it, and no variable of SLURM, LSF or PBS does",
        instead=f"{launch.launcher} {option} ... python train.py   # HOST: the first of the hosts",
    )


def _seen(environment: Mapping[str, str], *names: str) -> str:
    return ", ".join(f"{name}={environment[name]}" for name in names if name in environment) or "no variable of a job"
