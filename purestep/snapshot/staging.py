"""Copies of leaves on the host, which a save writes from while training goes on.

It owns the buffers. They are kept between saves of the same shapes, because fresh pages (and pinned memory) cost
several times the copy itself; `clear` gives them back.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

_BY_WIDTH = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
Copies = Callable[[], list[np.ndarray]]


@dataclass
class Staging:
    """A pool of host buffers, used by one save at a time."""

    buffers: list[torch.Tensor] = field(default_factory=list)

    def copy(self, values: list[Any]) -> Copies:
        """Start to copy tensors and arrays to the host.

        Args:
            values: tensors on any device and numpy arrays, of any strides.

        Returns:
            A function that waits for the copies and returns uint8[nbytes] of each, contiguous. The values may be
            changed as soon as `copy` has returned: copies from a device are ordered before later work on its stream.
        """
        sources = [_bits(value) for value in values]
        self.buffers = [_fitting(source, self.buffers[i : i + 1]) for i, source in enumerate(sources)]
        devices = set()
        for source, buffer in zip(sources, self.buffers, strict=True):
            buffer.copy_(source, non_blocking=source.device.type != "cpu")
            devices.add(source.device)
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
        """Give the buffers back."""
        self.buffers = []


def _recorded(device: torch.device) -> Any:
    event = torch.cuda.Event()
    event.record(torch.cuda.current_stream(device))
    return event


def _bits(value: Any) -> torch.Tensor:
    """View a leaf as integers of its width: exact for every dtype, and free of kernels that some dtypes lack."""
    if isinstance(value, torch.Tensor):
        value = value.detach().resolve_conj().resolve_neg()
        width = value.element_size()
        return torch.view_as_real(value).view(torch.int64) if width == 16 else value.view(_BY_WIDTH[width])
    array = np.asarray(value)
    raw = np.ascontiguousarray(array).reshape(-1).view(np.uint8)
    return torch.from_numpy(raw.copy() if not raw.flags.writeable else raw)


def _fitting(source: torch.Tensor, candidates: list[torch.Tensor]) -> torch.Tensor:
    pinned = source.device.type == "cuda"
    for old in candidates:
        if old.shape == source.shape and old.dtype == source.dtype and old.is_pinned() == pinned:
            return old
    return torch.empty(source.shape, dtype=source.dtype, pin_memory=pinned)
