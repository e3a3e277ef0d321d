"""The state of torch's generator of the CPU, to compare and to put back, without a copy of it where it has not moved.

`get_state` copies 5 KB, and a step would ask four times, a loader twice a batch. So the numbers that every draw moves
are looked at where they lie in memory, and the copy of the last time is returned while they are the same. Where that
is, is found out with a generator made for the purpose, whose state must not change while these bytes stay; if it does,
`get_state` is called each time. `global_generators` does the same for the generators of Python and numpy.
"""

from __future__ import annotations

import ctypes
from collections.abc import Callable

import numpy as np
import torch
from torch import Generator, Tensor

from purestep import _torch
from purestep.random._torch import address_of_generator

_WORDS = 624  # of a Mersenne Twister
_SEARCHED = 256  # bytes from the beginning of a generator, among which its words begin
_BEFORE = 20  # bytes before the words: seed, numbers left, whether it is seeded, position
_FIRST = 16  # bytes of the words: they change when the position comes round
_AFTER = 28  # bytes after them: the second of two normal numbers, in float32 and in float64
_SEEDED = 24  # bytes of `get_state` before the words, which are 8 bytes each there
_POSITION = slice(16, 20)  # of the bytes before the words


def _words_at(generator: Generator) -> int | None:
    """Return the address of the words of a generator; None if they cannot be found."""
    start = address_of_generator(generator)
    if start is None:
        return None
    words = _bytes_in(generator.get_state())[_SEEDED:]
    first = np.frombuffer(words, np.uint64, _WORDS).astype(np.uint32).tobytes()
    found = ctypes.string_at(start, _SEARCHED).find(first[:_FIRST])
    if found < _BEFORE or ctypes.string_at(start + found, 4 * _WORDS) != first:
        return None
    return start + found


def _bytes_in(state: Tensor) -> bytes:
    """Return the bytes of a state. Inside of a transform `numpy` would not do."""
    return ctypes.string_at(state.data_ptr(), state.numel())


def _heads(words: int) -> tuple[memoryview, memoryview]:
    return _bytes_of(words - _BEFORE, _BEFORE + _FIRST), _bytes_of(words + 4 * _WORDS, _AFTER)


def _bytes_of(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def _show_every_draw() -> bool:
    """Tell whether the bytes of `_heads` change whenever the state of a generator does."""
    probe = Generator().manual_seed(5)
    words = _words_at(probe)
    if words is None:
        return False
    heads = _heads(words)
    one, four = torch.empty(1), torch.empty(4, dtype=torch.float64)
    draws: tuple[Callable[[], object], ...] = (
        lambda: one.uniform_(generator=probe),
        lambda: one.normal_(generator=probe),
        lambda: one.normal_(generator=probe),  # the second of two numbers: nothing is drawn
        lambda: four[:3].normal_(generator=probe),
        lambda: four[:1].normal_(generator=probe),
        lambda: torch.empty(_WORDS).uniform_(generator=probe),  # the position comes round
        lambda: probe.manual_seed(6),
    )
    for draw in draws:
        state, seen = probe.get_state(), b"".join(heads)
        draw()
        if seen == b"".join(heads) and not torch.equal(state, probe.get_state()):
            return False
    return True


class _Watched:
    """Torch's generator of the CPU.

    Args:
        probed: whether to find out where its state lies; otherwise it is copied each time.
    """

    def __init__(self, *, probed: bool = True) -> None:
        with _torch.no_torch_function(), _torch.no_torch_dispatch():  # modes of the caller would draw otherwise
            words = _words_at(torch.default_generator) if probed and _show_every_draw() else None
        self.heads = None if words is None else _heads(words)
        self.last: tuple[bytes, Tensor] = b"", torch.default_generator.get_state()

    def read(self) -> Tensor:
        if self.heads is None:
            return torch.default_generator.get_state()
        seen = b"".join(self.heads)
        last, state = self.last
        while seen != last:
            last, state = seen, torch.default_generator.get_state()
            seen = b"".join(self.heads)  # another thread may have drawn meanwhile
            self.last = last, state
        return state

    def still(self, then: Tensor) -> bool:
        return self.heads is not None and self.last[1] is then and self.last[0] == b"".join(self.heads)

    def put_back(self, then: Tensor) -> None:
        if self.still(then):
            return
        torch.default_generator.set_state(then)
        seen, state = self.last
        if self.heads is not None and state is then:
            now = b"".join(self.heads)  # other bytes that no draw moves may have changed
            if now[_POSITION] == seen[_POSITION]:  # no other thread has drawn meanwhile
                self.last = now, then


_watched: _Watched | None = None


def _watch() -> _Watched:
    global _watched
    if _watched is not None:
        return _watched
    if _torch.transform_level() is not None:
        return _Watched(probed=False)  # `vmap` refuses the draws that show whether the bytes move
    _watched = _Watched()
    return _watched


def state() -> Tensor:
    """Return the state of torch's generator of the CPU, uint8[5056]; not to be written into.

    As long as nothing is drawn it is the very same tensor, as a rule.
    """
    watched = _watched
    if watched is not None and watched.heads is not None and b"".join(watched.heads) == watched.last[0]:
        return watched.last[1]
    return _watch().read()


def lying_at() -> tuple[tuple[memoryview, ...], bytes, Tensor] | None:
    """Return the bytes that every draw moves, what they were when the state was copied, and the copy.

    None where it is not known where they lie.
    """
    watched = _watch()
    watched.read()
    return None if watched.heads is None else (watched.heads, *watched.last)


def moved(since: Tensor) -> bool:
    """Tell whether the generator has another state than it had. Not for code that is traced.

    Examples:
        >>> before = state()
        >>> moved(before), torch.rand(1).shape, moved(before)
        (False, torch.Size([1]), True)
    """
    now = state()
    return now is not since and _bytes_in(now) != _bytes_in(since)


def put_back(then: Tensor) -> None:
    """Put the generator back to a state that `state` returned."""
    _watch().put_back(then)
