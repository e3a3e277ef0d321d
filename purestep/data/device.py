"""Batches on their way to the device: moving them, and moving them ahead of their use.

Owns `to_device` and `prefetch`. The loop calls the first on every batch.
"""

from __future__ import annotations

import collections
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Device, checked
from purestep.data.source import Source, as_source
from purestep.errors import DataError, explain


@checked(DataError)
def to_device(batch: Any, device: Device) -> Any:
    """Move the tensors of a batch to a device, without waiting where the memory is pinned.

    Numpy arrays become tensors. Leaves with a `to` method of their own (batch objects of other libraries) are asked;
    all others, such as strings, stay as they are.

    Args:
        batch: any pytree.
        device: where to.

    Example:
        >>> to_device({"x": np.ones(2, np.float32), "name": "a"}, "cpu")
        {'x': tensor([1., 1.]), 'name': 'a'}
    """
    target = torch.device(device)
    return tree.map(lambda leaf: _move(leaf, target), batch)


def _move(leaf: Any, device: torch.device) -> Any:
    if isinstance(leaf, Tensor):
        return leaf if leaf.device == device else leaf.to(device, non_blocking=True)
    if isinstance(leaf, (np.ndarray, np.generic)):
        if leaf.dtype.kind not in "biufc":
            return leaf
        array = np.asarray(leaf)
        # Read-only and reversed arrays cannot be shared with a tensor; an explicit copy says so without a warning.
        if not array.flags.writeable or any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
            array = array.astype(array.dtype.newbyteorder("="))
        return torch.from_numpy(array).to(device, non_blocking=True)
    move = getattr(leaf, "to", None)
    return leaf if move is None or isinstance(leaf, type) else move(device)


class Prefetched:
    """A source whose batches are moved to the device ahead of their use; see `prefetch`."""

    def __init__(self, source: Source, device: torch.device, depth: int) -> None:
        self._source, self._device, self._depth = source, device, depth
        self._state: Any = None

    def length(self) -> int | None:
        """Return the number of batches of an epoch."""
        return self._source.length()

    def open(self, epoch: int, batch: int, state: Any = None) -> Iterator[Any]:
        """Return an iterator over batches on the device, from number `batch` on."""
        self._state = self._source.state() if state is None else state
        return self._run(self._source.open(epoch, batch, state))

    def state(self) -> Any:
        """Return the state of the source as of the last batch given, not as of the last one fetched."""
        return self._state

    def identity(self) -> Source:
        """Return the source: it gives the same batches."""
        return self._source

    def close(self) -> None:
        """Close the source."""
        close = getattr(self._source, "close", None)
        if close is not None:
            close()

    def _run(self, iterator: Iterator[Any]) -> Iterator[Any]:
        # Copies on a stream of their own overlap with the computing; the computing waits for its batch only.
        side = torch.cuda.Stream(self._device) if self._device.type == "cuda" else None
        queue: collections.deque[tuple[Any, Any]] = collections.deque()
        try:
            for batch in iterator:
                if side is None:
                    moved = to_device(batch, self._device)
                else:
                    with torch.cuda.stream(side):
                        moved = to_device(batch, self._device)
                queue.append((moved, self._source.state()))
                if len(queue) > self._depth:
                    yield self._hand_over(queue, side)
            if queue:
                # A source that was read to its end says so in its state, and is left in another way then.
                queue[-1] = queue[-1][0], self._source.state()
            while queue:
                yield self._hand_over(queue, side)
        finally:
            close = getattr(iterator, "close", None)
            if close is not None:
                close()

    def _hand_over(self, queue: collections.deque[tuple[Any, Any]], side: Any) -> Any:
        batch, self._state = queue.popleft()
        if side is not None:
            current = torch.cuda.current_stream(self._device)
            current.wait_stream(side)
            for leaf in tree.leaves(batch):
                if isinstance(leaf, Tensor) and leaf.is_cuda:
                    leaf.record_stream(current)
        return batch


@checked(DataError)
def prefetch(data: Any, device: Device, *, depth: int = 2) -> Source:
    """Move batches to a device ahead of their use.

    On CUDA the copies run on a stream of their own; they overlap with computing when the batches are in pinned memory
    (`batches(..., pin_memory=True)`).

    Args:
        data: a source, or anything `as_source` takes.
        device: where to.
        depth: batches on the device besides the one in use.

    Raises:
        DataError: the depth is not a whole number, 1 or more.

    Example:
        >>> list(prefetch([1, 2, 3], "cpu").open(0, 1, None))
        [2, 3]
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise DataError(
            explain("a depth is a number of batches, 1 or more", where=f"depth={depth!r}", instead="depth=2")
        )
    return Prefetched(as_source(data), torch.device(device), depth)
