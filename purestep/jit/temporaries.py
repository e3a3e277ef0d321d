"""Memory of temporary buffers that compiled graphs on a CPU use again.

The C library gives large blocks back to the system when they are freed, and each fresh one costs a page fault for every
4 KiB. So up to 64 MiB of buffers are kept from one call to the next, for all graphs of the process together. A buffer
is used again once nothing else refers to its memory: what a graph returns is never written over.
"""

from __future__ import annotations

import math
import threading
from collections.abc import Callable

import torch
from torch import Tensor

from purestep.jit._torch import empty_on_cpu, storage_references

_SMALLEST = 1 << 17  # bytes; the C library keeps smaller blocks itself
_MOST = 64 << 20  # bytes that are kept
_FORGOTTEN = 10_000  # a shape that was not asked for in so many requests gives way to others

Shape = tuple[tuple[int, ...], tuple[int, ...], torch.dtype]
Allocate = Callable[[tuple[int, ...], tuple[int, ...], torch.dtype], Tensor]


class _Kept:
    """The buffers of one shape, and where the search for a free one begins: after the one that was taken last."""

    def __init__(self) -> None:
        self.buffers: list[tuple[Tensor, int]] = []  # with the references to its memory while it is free
        self.next = self.used = 0

    def take(self) -> Tensor | None:
        count = len(self.buffers)
        for offset in range(count):
            at = (self.next + offset) % count
            buffer, free = self.buffers[at]
            if storage_references(buffer) == free:
                self.next = at + 1
                return buffer.detach()
        return None


class Temporaries:
    """An allocator of contiguous tensors on the CPU that keeps what it allocated, up to a number of bytes.

    Args:
        allocate: makes a tensor without values of a size, strides and dtype.
        most: bytes that it keeps.
    """

    def __init__(self, allocate: Allocate, most: int = _MOST) -> None:
        self._allocate, self._left = allocate, most
        self._kept: dict[Shape, _Kept] = {}
        self._requests = 0
        self._lock = threading.Lock()

    def __call__(self, size: tuple[int, ...], stride: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        nbytes = math.prod(size) * dtype.itemsize
        if nbytes < _SMALLEST:
            return self._allocate(size, stride, dtype)
        with self._lock:
            self._requests += 1
            kept = self._kept.setdefault((size, stride, dtype), _Kept())
            kept.used = self._requests
            found = kept.take()
            if found is not None:
                return found
            made = self._allocate(size, stride, dtype)
            if nbytes > self._left:
                self._forget()
            if nbytes <= self._left:
                self._left -= nbytes
                kept.buffers.append((made, storage_references(made)))
                return made.detach()
            return made

    def _forget(self) -> None:
        for shape, kept in list(self._kept.items()):
            if self._requests - kept.used > _FORGOTTEN:
                self._left += sum(buffer.untyped_storage().nbytes() for buffer, _ in kept.buffers)
                del self._kept[shape]


temporaries = Temporaries(empty_on_cpu)
