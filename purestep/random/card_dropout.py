"""Dropout by the card's own kernels, seeded from the key: fused attention, and masks that are not the CPU's.

torch's kernels draw from the card's default generator, whose seed and offset are numbers of the host. `seeded` sets
them from a key for one call, and puts back what was there: no launch, and no wait where the host knows the key.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterator

import torch
from torch import Tensor

from purestep.random import card, remembered

_local = threading.local()
_lock = threading.RLock()  # a thread of the autograd engine may recompute while another one draws


@contextlib.contextmanager
def device_dropout() -> Iterator[None]:
    """Let dropout in a `with` block have the bits of the card: by torch's kernels, seeded from the same keys.

    It is what `dropout="device"` of a precision policy does for a step. Layers of dropout and attention with dropout
    take part, attention by the fused kernels that torch chooses; without this it is written out, in memory that grows
    with the square of the sequence. On the CPU, inside of `ps.jit` and of `torch.func` transforms nothing is changed.

    Examples:
        >>> import purestep as ps
        >>> net, key = torch.nn.Dropout(0.5), ps.random.key(0)
        >>> with device_dropout():
        ...     on_cpu, _ = ps.apply(net, {}, {}, torch.ones(4), rng=key)
        >>> torch.equal(on_cpu, ps.apply(net, {}, {}, torch.ones(4), rng=key)[0])
        True
    """
    outer = asked()
    _local.asked = True
    try:
        yield
    finally:
        _local.asked = outer


def asked() -> bool:
    """Tell whether this thread is in such a block."""
    return getattr(_local, "asked", False)


def takes(x: Tensor) -> bool:
    """Tell whether a kernel of the card may drop elements of a tensor out, now, and not in a trace."""
    return asked() and card.launches(x)


@contextlib.contextmanager
def seeded(key: Tensor, device: torch.device) -> Iterator[None]:
    """Seed the generator of a card from a key in a `with` block, and leave it as it was."""
    low, high = remembered.read(key)
    generator = _generator(device)
    with _lock:
        before = generator.get_state()
        generator.manual_seed(low | high << 32)
        try:
            yield
        finally:
            generator.set_state(before)


def _generator(device: torch.device) -> torch.Generator:
    found: torch.Generator = torch.cuda.default_generators[device.index or 0]
    return found
