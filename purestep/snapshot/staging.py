"""Copies of leaves in host buffers, from which a save writes while training continues.

It owns the buffers. They are kept between saves of the same shapes, because new pages (and pinned memory) cost several
times the copy itself; `clear` frees them.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import numpy as np
import torch

from purestep.snapshot.codec import Stored

_BY_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Copies = Callable[[], list[np.ndarray]]


@dataclass
class Staging:
    """A pool of host buffers, used by one save at a time."""

    buffers: list[torch.Tensor] = field(default_factory=list)

    def copy(self, values: list[Stored]) -> Copies:
        """Start to copy tensors and arrays to the host.

        Args:
            values: tensors on any device and numpy arrays, of any strides.

        Returns:
            A function that waits for the copies and returns uint8[nbytes] of each, contiguous. The values may be
            changed as soon as `copy` has returned: copies from a device are ordered before later work on its stream.
        """
        sources = [_bits(value) for value in values]
        self.buffers = [_buffer_for(source, self.buffers[i : i + 1]) for i, source in enumerate(sources)]
        devices = set()
        for source, buffer in zip(sources, self.buffers, strict=True):
            buffer.copy_(source, non_blocking=source.device.type != "cpu")
            devices.add(source.device)
        # The copies are queued on the stream that trains, so its later kernels cannot change a source before it was
        # copied; only the writing thread waits, for these events. Other kinds of devices have no such events.
        events = [_recorded(device) for device in devices if device.type == "cuda"]
        others = [device for device in devices if device.type not in ("cpu", "cuda")]
        for device in others:
            torch.accelerator.synchronize(device)
        buffers = self.buffers

        def finished() -> list[np.ndarray]:
            for event in events:
                event.synchronize()
            return [buffer.reshape(-1).view(torch.uint8).numpy() for buffer in buffers]

        return finished

    def clear(self) -> None:
        """Free the buffers."""
        self.buffers = []


def _recorded(device: torch.device) -> torch.cuda.Event:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _bits(value: Stored) -> torch.Tensor:
    """View a leaf as integers of its width: a copy is exact for every dtype, and every width has a copy kernel."""
    if isinstance(value, torch.Tensor):
        value = value.detach().resolve_conj().resolve_neg()
        width = value.element_size()
        return torch.view_as_real(value).view(torch.int64) if width == 16 else value.view(_BY_WIDTH[width])
    array = np.asarray(value)
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return torch.from_numpy(raw.copy() if not raw.flags.writeable else raw)


def _buffer_for(source: torch.Tensor, candidates: list[torch.Tensor]) -> torch.Tensor:
    pinned = source.device.type == "cuda"  # without pinned memory a copy from the device blocks
    for buffer in candidates:
        if buffer.shape == source.shape and buffer.dtype == source.dtype and buffer.is_pinned() == pinned:
            return buffer
    return torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)
