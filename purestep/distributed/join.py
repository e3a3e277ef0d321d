"""Joining the processes of a job by the variables of torchrun, after a restart too.

torchrun's agent keeps one store over all restarts, and torch reads from it the addresses of processes that are dead
(pytorch#135712, #167288). So the processes of one life agree on a prefix that no other life has, before anything else.
"""

from __future__ import annotations

import datetime
import os
import time

import torch.distributed as dist

_LOOK = 0.01  # seconds between two looks into the store


def join(backend: str, timeout: float) -> None:
    """Make the default process group from the variables of torchrun in the environment.

    Args:
        backend: of `torch.distributed`.
        timeout: seconds for the others to come, and of every collective.

    Raises:
        RuntimeError: of torch, or because a process did not join in time.
    """
    limit = datetime.timedelta(seconds=timeout)
    store, rank, size = next(iter(dist.rendezvous("env://", timeout=limit)))
    if os.environ.get("TORCHELASTIC_USE_AGENT_STORE") == "True":
        store = dist.PrefixStore(f"purestep/{_life(store, rank, size, timeout)}", store)
    store.set_timeout(limit)
    dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=limit)


def _life(store: dist.Store, rank: int, size: int, timeout: float) -> str:
    """Return a name that all processes of this life know, and that none before had.

    Each says hello with a word of its own; rank 0 answers to that word with its own, until all have confirmed. A hello
    that a dead process left is answered too, and no process reads the answer.
    """
    mine, end = f"{os.getpid()}-{os.urandom(8).hex()}", time.monotonic() + timeout
    if rank:
        store.set(f"purestep/hello/{rank}", mine)
        _wait(store, [f"purestep/answer/{mine}"], end, rank)
        name: str = store.get(f"purestep/answer/{mine}").decode()
        store.set(f"purestep/here/{name}/{rank}", "")
        return name
    missing, answered = set(range(1, size)), set()
    while missing:
        for other in sorted(missing):
            if store.check([f"purestep/here/{mine}/{other}"]):
                missing.discard(other)
            elif store.check([f"purestep/hello/{other}"]):
                word = store.get(f"purestep/hello/{other}").decode()
                if word not in answered:
                    answered.add(word)
                    store.set(f"purestep/answer/{word}", mine)
        if time.monotonic() > end:
            raise RuntimeError(f"rank {', '.join(map(str, sorted(missing)))} did not come within {timeout:g} s")
        time.sleep(_LOOK)
    return mine


def _wait(store: dist.Store, keys: list[str], end: float, rank: int) -> None:
    while not store.check(keys):
        if time.monotonic() > end:
            raise RuntimeError(f"rank 0 did not answer rank {rank} in time")
        time.sleep(_LOOK)
