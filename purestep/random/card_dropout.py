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

from purestep import _torch
from purestep.random import card, remembered


class _Local(threading.local):
    asked = False  # whether dropout may be the device's
    recording: Recording | None = None  # of a CUDA graph that this thread records


_local = _Local()
_lock = threading.RLock()  # a thread of the autograd engine may recompute while another one draws


@contextlib.contextmanager
def device_dropout() -> Iterator[None]:
    """Let dropout in a `with` block have the bits of the card: by torch's kernels, seeded from the same keys.

    It is what `dropout="device"` of a precision policy does for a step. Layers of dropout and attention with dropout
    take part, attention by the fused kernels that torch chooses; without this it is written out, in memory that grows
    with the square of the sequence. Inside of `ps.jit` attention alone takes part, with the same bits; layers of
    dropout are fused into their neighbours there. On the CPU and inside of `torch.func` transforms nothing is changed.

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
    return _local.asked


def takes(x: Tensor) -> bool:
    """Tell whether a kernel of the card may drop elements of a tensor out, now, and not in a trace."""
    return asked() and card.launches(x)


def traces(x: Tensor) -> bool:
    """Tell whether such a kernel may become a node of a graph that is being traced."""
    return asked() and x.device.type == "cuda" and _torch.is_fake(x) and _torch.transform_level() is None


@contextlib.contextmanager
def seeded(key: Tensor, device: torch.device) -> Iterator[None]:
    """Seed the generator of a card from a key in a `with` block, and leave it as it was."""
    recording = _local.recording
    if recording is not None and recording.ready:
        with recording.next(key, device):
            yield
        return
    if recording is not None:
        recording.expect(device)
    generator = _generator(device)
    with _lock:
        before = generator.get_state()
        generator.manual_seed(_seed_of(key))
        try:
            yield
        finally:
            generator.set_state(before)


def _seed_of(key: Tensor) -> int:
    low, high = remembered.read(key)
    seed: int = low | high << 32
    return seed


def _generator(device: torch.device) -> torch.Generator:
    found: torch.Generator = torch.cuda.default_generators[device.index or 0]
    return found


class Recording:
    """The generators of the kernels in a CUDA graph. No seed can be set while a graph is recorded, and a replay reads
    those of all generators that the graph knows; so each kernel gets a generator of its own, seeded before a replay.

    Attributes:
        generators: in the order of the kernels. The graph must know them before it is recorded.
    """

    def __init__(self) -> None:
        self.generators: list[torch.Generator] = []
        self.ready = False
        self._keys: list[Tensor] = []

    @contextlib.contextmanager
    def active(self, *, ready: bool) -> Iterator[None]:
        """Count the kernels that a `with` block launches; if ready, record them with their generators."""
        self.ready, self._keys = ready, []
        _local.recording = self
        try:
            yield
        finally:
            _local.recording = None

    def expect(self, device: torch.device) -> None:
        """Make the generator of one more kernel."""
        self.generators.append(_own_generator(device))

    @contextlib.contextmanager
    def next(self, key: Tensor, device: torch.device) -> Iterator[None]:
        """Let the next kernel draw from its generator in a `with` block. The key is read again before each replay."""
        generator, own = _generator(device), self.generators[len(self._keys)]
        self._keys.append(key)
        with _lock:
            before = generator.graphsafe_get_state()
            generator.graphsafe_set_state(own)
            try:
                yield
            finally:
                generator.graphsafe_set_state(before)

    def seed(self) -> None:
        """Seed the generators for a replay."""
        for generator, key in zip(self.generators, self._keys, strict=True):
            generator.manual_seed(_seed_of(key))


def _own_generator(device: torch.device) -> torch.Generator:
    return torch.Generator(device)
