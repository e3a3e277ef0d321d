"""Runs of several processes: `--processes` starts torchrun; tasks of SLURM get the environment of torchrun."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import MutableMapping, Sequence
from types import FrameType
from typing import Any

from purestep.cli.usage import UsageError


def launch(count: int, words: Sequence[str]) -> int:
    """Start torchrun on this machine with the same command, and return the exit code of the job.

    torchrun exits with 1 after a signal; then the code is 130 (SIGINT) or 143 (SIGTERM), as for one process.

    Args:
        count: number of processes.
        words: the command line, without the name of the program.
    """
    if "RANK" in os.environ:
        raise UsageError("--processes starts torchrun, and this is a process of it already", "leave --processes out")
    told: list[int] = []
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={count}"]
    command += ["-m", "purestep", *_without_processes(words)]
    # torchrun gets its own process group, so that Ctrl-C on the terminal reaches it once, through this process.
    job = subprocess.Popen(command, start_new_session=True)

    def forward(number: int, frame: FrameType | None) -> None:
        told.append(number)
        job.send_signal(signal.SIGTERM if len(told) == 1 else signal.SIGKILL)

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        code = job.wait()
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + told[0] if told and code else code if code >= 0 else 128 - code


def _without_processes(words: Sequence[str]) -> list[str]:
    kept, skip = [], False
    for word in words:
        if skip:
            skip = False
        elif word == "--processes":
            skip = True
        elif not word.startswith("--processes="):
            kept.append(word)
    return kept


def join_slurm(environment: MutableMapping[str, Any] = os.environ) -> bool:
    """Set the environment variables of torchrun for a task of `srun`; do nothing under torchrun or for a single task.

    Args:
        environment: environment of the process, changed in place.

    Returns:
        Whether this process is one of several tasks.

    Examples:
        >>> task = {"SLURM_PROCID": "3", "SLURM_NTASKS": "4", "SLURM_LOCALID": "1", "SLURM_JOB_ID": "77",
        ...         "SLURM_STEP_NODELIST": "node[07-08,11]"}
        >>> join_slurm(task), task["RANK"], task["LOCAL_RANK"], task["MASTER_ADDR"]
        (True, '3', '1', 'node07')
    """
    tasks = environment.get("SLURM_STEP_NUM_TASKS", environment.get("SLURM_NTASKS", "1"))
    if "RANK" in environment or "SLURM_PROCID" not in environment or int(tasks) < 2:
        return False
    nodes = environment.get("SLURM_STEP_NODELIST", environment.get("SLURM_NODELIST", "127.0.0.1"))
    job = int(environment.get("SLURM_JOB_ID", "0"))
    environment.update(
        RANK=environment["SLURM_PROCID"],
        WORLD_SIZE=tasks,
        LOCAL_RANK=environment.get("SLURM_LOCALID", "0"),
        LOCAL_WORLD_SIZE=environment.get("SLURM_NTASKS_PER_NODE", tasks).partition("(")[0],
        MASTER_ADDR=environment.get("MASTER_ADDR", first_node(nodes)),
        MASTER_PORT=environment.get("MASTER_PORT", str(20_000 + job % 20_000)),
    )
    return True


def first_node(nodes: str) -> str:
    """Return the first host of a host list of SLURM.

    Examples:
        >>> first_node("node[07-08,11],gpu1"), first_node("gpu1,gpu2"), first_node("a3-[1-2]x")
        ('node07', 'gpu1', 'a3-1x')
    """
    match = re.match(r"([^,\[]*)(?:\[(\w+)[^\]]*\])?([^,]*)", nodes)
    return "".join(filter(None, match.groups())) if match else nodes
