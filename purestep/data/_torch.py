"""Private names of torch that loading needs: what its DataLoader has no public way to ask for.

Seen to work on torch 2.11.0, 2.13.0 and 2.14.1.

    pin_memory              copies a nested batch into page-locked memory, as the loader does for batches it knows.
                            Without it: `tree.map(lambda x: x.pin_memory(), batch)`.
    worker_processes, shut_down
                            the processes of a running iterator, and their end now instead of when it is collected.
                            Without them: `multiprocessing.active_children()`; `del iterator`.
"""

from __future__ import annotations

import multiprocessing.process
from collections.abc import Iterator
from typing import TypeVar

T = TypeVar("T")


def pin_memory(batch: T) -> T:
    """Return a nested batch with its tensors in page-locked memory."""
    from torch.utils.data._utils.pin_memory import pin_memory

    pinned: T = pin_memory(batch)
    return pinned


def worker_processes(iterator: Iterator[object] | None) -> tuple[multiprocessing.process.BaseProcess, ...]:
    """Return the worker processes of a loader's iterator; none of one that has none."""
    return tuple(getattr(iterator, "_workers", ()))


def shut_down(iterator: Iterator[object]) -> None:
    """End the worker processes of a loader's iterator, if it has any."""
    if hasattr(iterator, "_shutdown_workers"):
        iterator._shutdown_workers()
