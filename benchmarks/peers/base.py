"""What every trainer shares: a feed of the same batches, and rounds that are asked for from outside."""

from __future__ import annotations

import os
import resource
import time
from collections.abc import Callable, Iterator
from typing import Any

from benchmarks.workloads import Workload


class Rounds:
    """The requests of the driver, one round of steps at a time, and the clock of a round.

    A trainer whose library owns the loop calls `receive`, `start` and `stop` from its hooks.
    """

    def __init__(self, receive: Callable[[], int | None], send: Callable[[dict[str, float]], None]) -> None:
        self._receive, self._send = receive, send

    def receive(self) -> int | None:
        """Wait for the next request; None when there are no more."""
        return self._receive()

    def start(self) -> None:
        _reset_peak()
        self._began = time.perf_counter(), _cpu()

    def stop(self, loss: float) -> None:
        """End a round; `loss` is that of its last step, read from the device, so that everything is done."""
        wall, cpu = time.perf_counter() - self._began[0], _cpu() - self._began[1]
        self._send({"wall": wall, "cpu": cpu, "loss": loss, "peak": peak_memory()})


class Trainer:
    """A trainer that can be called for a number of steps."""

    work: Workload
    position = 0
    batches: list[Any]

    def train(self, steps: int) -> float:
        """Take steps and return the loss of the last one."""
        raise TypeError(f"{type(self).__name__} has no train()")

    def feed(self, steps: int) -> Iterator[Any]:
        """Give the next batches of the endless cycle."""
        batches, n = self.batches, len(self.batches)
        first, self.position = self.position, self.position + steps  # now: not every trainer asks for an end
        for i in range(first, first + steps):
            yield batches[i % n]

    def serve(self, rounds: Rounds) -> None:
        """Train as many steps as each request says, until there are no more."""
        while (steps := rounds.receive()) is not None:
            rounds.start()
            rounds.stop(self.train(steps))


def _cpu() -> float:
    """Seconds of all threads of this process and of the children it has waited for, such as compilers."""
    children = resource.getrusage(resource.RUSAGE_CHILDREN)
    return time.process_time() + children.ru_utime + children.ru_stime


# --- memory of this process -------------------------------------------------------------------------------------------


def memory() -> float:
    """Return the resident memory of this process in MB."""
    return _status("VmRSS")


def peak_memory() -> float:
    """Return the largest resident memory in MB since the last round began; 0 where the system does not say."""
    return _status("VmHWM")


def _status(key: str) -> float:
    try:
        with open("/proc/self/status") as lines:
            return next(float(line.split()[1]) / 1024 for line in lines if line.startswith(key))
    except (OSError, StopIteration):
        return 0.0


def _reset_peak() -> None:
    try:
        with open(f"/proc/{os.getpid()}/clear_refs", "w") as file:
            file.write("5")
    except OSError:
        pass
