"""Runs of several processes: `--processes` starts torchrun."""

from __future__ import annotations

import signal
import subprocess
import sys
from collections.abc import Sequence
from types import FrameType

from purestep.cli.usage import UsageError
from purestep.distributed import launchers


def launch(count: int, words: Sequence[str]) -> int:
    """Start torchrun on this machine with the same command, and return the exit code of the job.

    torchrun exits with 1 after a signal; then the code is 130 (SIGINT) or 143 (SIGTERM), as for one process.

    Args:
        count: number of processes.
        words: the command line, without the name of the program.
    """
    already = launchers.launch_of()
    if already is not None and already.size > 1:
        problem = f"--processes starts torchrun, and this is a process that {already.launcher} started"
        raise UsageError(problem, "leave --processes out")
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
