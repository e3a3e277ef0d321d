"""Moving batches to the device: `to_device` one batch, `prefetch` the next ones while a step computes.

The loop calls `to_device` on every batch.
"""

from __future__ import annotations

import collections
import functools
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

import numpy as np
import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Device, checked
from purestep.data.source import Source, as_source, close
from purestep.devices import default_device
from purestep.errors import DataError, explain


@runtime_checkable
class Movable(Protocol):
    """A leaf that moves itself, as the batch objects of other libraries do."""

    def to(self, device: torch.device, /) -> Any: ...


@checked(DataError)
def to_device(batch: Any, device: Device) -> Any:
    """Move the tensors of a batch to a device, without waiting where the memory is pinned.

    Numpy arrays of numbers become tensors of the same dtype. A leaf with a `to` method (the batch object of another
    library) moves itself; all others, such as strings, stay as they are.

    Args:
        batch: any pytree.
        device: the device to move to.

    Returns:
        A pytree of the same structure.

    Examples:
        >>> to_device({"x": np.ones(2, np.float32), "name": "a"}, "cpu")
        {'x': tensor([1., 1.]), 'name': 'a'}
    """
    target = torch.device(device)
    return tree.map(lambda leaf: _move(leaf, target), batch)


def on_device(batch: Any, device: torch.device) -> Any:
    """Return a batch as a run gives it to its step: on the device of the state; on the CPU the very batch."""
    return batch if device.type == "cpu" else Copies.to(device)(batch)


def _move(leaf: object, device: torch.device) -> object:
    tensor = _tensor(leaf)
    if isinstance(tensor, Tensor):
        return tensor if tensor.device == device else tensor.to(device, non_blocking=True)
    return leaf.to(device) if isinstance(leaf, Movable) and not isinstance(leaf, type) else leaf


def _tensor(leaf: object) -> object:
    """Return the tensor of an array of numbers; any other leaf as it is."""
    if not isinstance(leaf, (np.ndarray, np.generic)) or leaf.dtype.kind not in "biufc":
        return leaf
    array = np.asarray(leaf)
    # A tensor cannot share the memory of a read-only or reversed array: torch would warn or raise, so copy first.
    if not array.flags.writeable or any(stride < 0 for stride in array.strides) or not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    return torch.from_numpy(array)


def _pinned(leaf: object) -> object:
    tensor = _tensor(leaf)
    if not isinstance(tensor, Tensor) or tensor.device.type != "cpu" or tensor.layout != torch.strided:
        return tensor
    return tensor if tensor.is_pinned() else tensor.pin_memory()


class Copies:
    """Copies batches to one device: from page-locked memory, on a stream of their own, where the device has streams.

    The host goes on at once, and the copy of the next batch runs beside the computation on this one, because the host
    is ahead of the device; no batch is read earlier than it is asked for. Streams are those of CUDA and XPU.

    Args:
        device: the device to copy to.
        streams: torch's module of the device, which has its streams; None for devices without.
    """

    def __init__(self, device: torch.device, streams: Any = None) -> None:
        self._device, self._streams = device, streams
        self._own = None if streams is None else streams.Stream(device)

    @classmethod
    @functools.cache
    def to(cls, device: torch.device) -> Copies:
        """Return the copies of this process to a device, which share a stream."""
        return cls(device, torch.get_device_module(device) if device.type in ("cuda", "xpu") else None)

    def __call__(self, batch: Any) -> Any:
        """Return the batch on the device, for what is computed on the current stream from here on."""
        return self.ready(*self.start(batch))

    def start(self, batch: Any) -> tuple[Any, Any]:
        """Begin to copy; return the batch and the event that says that it is there."""
        if self._own is None:
            return to_device(batch, self._device), None
        pinned = tree.map(_pinned, batch)
        with self._streams.stream(self._own):
            moved = to_device(pinned, self._device)
        return moved, self._own.record_event()

    def ready(self, batch: Any, event: Any) -> Any:
        """Let the current stream wait for a batch that was begun, and return it; the host does not wait."""
        if event is None:
            return batch
        current = self._streams.current_stream(self._device)
        current.wait_event(event)
        for leaf in tree.leaves(batch):
            if isinstance(leaf, Tensor) and leaf.device.type == self._device.type:
                # The allocator owns this memory on the stream of the copies: without this it would reuse it there
                # while the computation still reads the batch.
                leaf.record_stream(current)
        return batch


class Prefetched:
    """A source whose batches are moved to the device before they are needed; see `prefetch`."""

    def __init__(self, source: Source, device: torch.device, depth: int) -> None:
        self._source, self._device, self._depth = source, device, depth
        self._state: object = None

    def length(self) -> int | None:
        """Return the number of batches of an epoch."""
        return self._source.length()

    def open(self, epoch: int, batch: int, state: object = None) -> Iterator[Any]:
        """Return an iterator over batches on the device, from number `batch` on."""
        self._state = self._source.state() if state is None else state
        return self._run(self._source.open(epoch, batch, state))

    def state(self) -> object:
        """Return the state of the source at the last batch that the caller got, not at the last one prefetched."""
        return self._state

    def identity(self) -> Source:
        """Return the source: its batches are the same without prefetching."""
        return self._source

    def close(self) -> None:
        """Close the source."""
        close(self._source)

    def _run(self, iterator: Iterator[Any]) -> Iterator[Any]:
        copies = Copies.to(self._device)
        queue: collections.deque[tuple[tuple[Any, Any], object]] = collections.deque()
        try:
            for batch in iterator:
                moved = copies.start(batch)
                # The state is read now, because after the next `next` it is that of a later batch.
                queue.append((moved, self._source.state()))
                if len(queue) > self._depth:
                    yield self._pop(queue, copies)
            if queue:
                # Only now, after its StopIteration, does the state of the source say that the epoch has ended.
                queue[-1] = queue[-1][0], self._source.state()
            while queue:
                yield self._pop(queue, copies)
        finally:
            close(iterator)

    def _pop(self, queue: collections.deque[tuple[tuple[Any, Any], object]], copies: Copies) -> Any:
        begun, self._state = queue.popleft()
        return copies.ready(*begun)


@checked(DataError)
def prefetch(data: Any, device: Device, *, depth: int = 2) -> Source:
    """Move batches to a device while the step computes on earlier ones.

    `fit` copies each batch while the step before it computes, so this is for sources whose `next` takes as long as a
    step. On CUDA and XPU the copies run from page-locked memory on a stream of their own.

    Args:
        data: a source, or anything `as_source` takes.
        device: the device to move to.
        depth: number of batches on the device besides the one in use, 1 or more.

    Raises:
        DataError: the depth is not a whole number, 1 or more.

    Examples:
        >>> list(prefetch([1, 2, 3], "cpu").open(0, 1, None))
        [2, 3]
    """
    if isinstance(depth, bool) or not isinstance(depth, int) or depth < 1:
        raise DataError(
            explain("a depth is a number of batches, 1 or more", where=f"depth={depth!r}", instead="depth=2")
        )
    return Prefetched(as_source(data), default_device(device), depth)
