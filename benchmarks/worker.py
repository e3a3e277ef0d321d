"""One process for each peer: it imports that peer's libraries, builds what it is told, and trains when asked.

`start` makes a process and returns its handle. Messages are tuples over a pipe; a failure comes back as text.
"""

from __future__ import annotations

import contextlib
import gc
import multiprocessing
import os
import time
import traceback
from typing import Any

# One thread for everything that would take more: OpenMP, MKL and OpenBLAS of numpy and torch, XLA.
ENVIRONMENT = {
    "OMP_NUM_THREADS": "1",
    "MKL_NUM_THREADS": "1",
    "OPENBLAS_NUM_THREADS": "1",
    "JAX_PLATFORMS": "cpu",
    "XLA_FLAGS": "--xla_cpu_multi_thread_eigen=false intra_op_parallelism_threads=1",
    "TOKENIZERS_PARALLELISM": "false",
    "PYTHONDONTWRITEBYTECODE": "",  # modules are compiled once, as where they are installed
}
# Seconds to wait for anything; compiling a GPT on a busy machine takes minutes.
PATIENCE = 900.0


class Failure(RuntimeError):
    """A peer could not be imported, built or run; the text is its traceback."""


class Worker:
    """The driver's handle on a worker process.

    Args:
        name: name of a peer.
        environment: variables of the process, besides `ENVIRONMENT`.

    Attributes:
        loaded: resident memory in MB once the libraries are imported, set by who asks for it.
    """

    loaded = 0.0

    def __init__(self, name: str, environment: dict[str, str] | None = None) -> None:
        self.name = name
        context = multiprocessing.get_context("spawn")
        self._pipe, theirs = context.Pipe()
        self._process = context.Process(target=main, args=(theirs, name), daemon=True)
        changed = ENVIRONMENT | (environment or {})
        before = {key: os.environ.get(key) for key in changed}
        os.environ.update(changed)
        try:
            self._process.start()
        finally:
            for key, value in before.items():
                os.environ.pop(key) if value is None else os.environ.update({key: value})
        theirs.close()

    def ask(self, *message: Any) -> None:
        """Send a request without waiting for the answer."""
        self._pipe.send(message)

    def answer(self) -> Any:
        """Wait for the answer to the oldest request.

        Raises:
            Failure: the peer failed, its process is gone, or it takes longer than `PATIENCE`.
        """
        if not self._pipe.poll(PATIENCE):
            self._process.kill()
            raise Failure(f"{self.name} gave no answer in {PATIENCE:.0f} s")
        try:
            kind, value = self._pipe.recv()
        except (EOFError, OSError):
            self._process.join(5)
            raise Failure(f"the process of {self.name} ended with code {self._process.exitcode}") from None
        if kind == "failed":
            raise Failure(value)
        return value

    def run(self, steps: int) -> dict[str, float]:
        """Train and return seconds (`wall`, `cpu`), the last `loss`, and the `peak` memory of the round in MB."""
        self.ask("run", steps)
        return self.answer()

    def close(self) -> None:
        """End the process."""
        if self._process.is_alive():
            with contextlib.suppress(OSError):
                self.ask("quit")
            self._process.join(5)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()


# --- in the process ---------------------------------------------------------------------------------------------------


def main(pipe: Any, name: str) -> None:
    """Answer requests until told to quit: load, build (then any number of run, then end)."""
    from benchmarks import peers
    from benchmarks.workloads import ALL

    peer = peers.ALL[name]
    while True:
        try:
            message = pipe.recv()
        except (EOFError, OSError):
            return
        try:
            if message[0] == "quit":
                return
            if message[0] == "load":
                pipe.send(("loaded", _loaded(peer)))
            elif message[0] == "build":
                _serve(pipe, peer, ALL[message[1]])
        except Exception:
            pipe.send(("failed", traceback.format_exc(limit=-6)))


def _loaded(peer: Any) -> dict[str, float]:
    from benchmarks.peers.base import memory

    if peer.name == "jax" and hasattr(os, "sched_setaffinity"):
        # XLA has no setting that holds it to one thread; it makes as many as it may use processors.
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    began = time.perf_counter()
    peer.load()
    if "torch" in __import__("sys").modules:
        import torch

        torch.set_num_threads(1)
    gc.collect()
    return {"seconds": time.perf_counter() - began, "memory": memory()}


def _serve(pipe: Any, peer: Any, work: Any) -> None:
    from benchmarks.peers.base import Rounds, memory

    def receive() -> int | None:
        message = pipe.recv()
        return message[1] if message[0] == "run" else None

    trainer = peer.make(work)
    pipe.send(("built", {"memory": memory()}))
    trainer.serve(Rounds(receive, lambda reply: pipe.send(("ran", reply))))
    del trainer
    gc.collect()
    pipe.send(("ended", {"memory": memory()}))
