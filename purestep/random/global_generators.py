"""The global generators of Python, numpy and torch (CPU): read, put back, seeded.

Owns all that is known of where they keep their state. Whoever runs code of other people calls it: `data.seeding` around
data sets and loaders, `random.host_draws` around models. It decides nothing about when.

Their own `getstate` and `get_state` take some 40 us, which a step that draws nothing should not pay. So the index and
the first words are looked at where they lie in memory (0.3 us), and all 5 KB are copied only when they differ from the
last time. Where that is, is found out with generators made for the purpose; if it is not found, the slow way is taken.

numpy's `seed` takes 9 us, of which the generator needs 3: its words are those that Python's generator makes of the same
key, and are copied from there.
"""

from __future__ import annotations

import ctypes
import pickle
import random as python_random
from typing import Any

import numpy as np
import torch

from purestep.random import torch_generator

State = tuple[Any, ...]
_WORDS = 624  # of a Mersenne Twister
_NO_GAUSS = bytes(16)  # no normal number is remembered
_HEAD = (
    20  # bytes: an index, which every draw moves, and words, which change when it comes round; seeds share the first
)
# The instances behind the functions of the modules `random` and `numpy.random`.
PYTHON: Any = python_random.random.__self__  # type: ignore[attr-defined]
NUMPY: Any = np.random.random_sample.__self__  # type: ignore[attr-defined]
_seed_python: Any = next(c for c in type(PYTHON).__mro__ if c.__module__ == "_random").__dict__["seed"]
_bit_generator: Any = np.random.get_bit_generator  # type: ignore[attr-defined]
_set_bit_generator: Any = np.random.set_bit_generator  # type: ignore[attr-defined]


def _bytes_of(address: int, size: int) -> memoryview:
    return memoryview((ctypes.c_ubyte * size).from_address(address)).cast("B")


def _python_offset() -> int | None:
    """Where an instance of `random.Random` keeps its words, the index before them; None if that cannot be found."""
    base = next(c for c in type(PYTHON).__mro__ if c.__module__ == "_random")
    probe, offset = python_random.Random(5), None
    for _ in range(3):
        words = probe.getstate()[1]
        seen = ctypes.string_at(id(probe), base.__basicsize__)
        found = seen.find(np.array(words[:_WORDS], np.uint32).tobytes()) - 4
        if found < 0 or offset not in (None, found) or seen[found : found + 4] != np.int32(words[_WORDS]).tobytes():
            return None
        offset = found
        for _ in range(401):
            probe.random()
    return offset


def _numpy_agrees() -> bool:
    """Whether a Mersenne Twister of numpy keeps its words, and the index after them, where it says."""
    probe = np.random.MT19937(5)
    for _ in range(3):
        state = probe.state["state"]
        expected = state["key"].astype(np.uint32).tobytes() + np.int32(state["pos"]).tobytes()
        if ctypes.string_at(probe.ctypes.state_address, len(expected)) != expected:
            return False
        probe.random_raw(401)
    return True


def _gauss_offset() -> int | None:
    """Where a `RandomState` keeps the second of two normal numbers, a flag before it; None if it cannot be found."""
    probe, size, offset = np.random.RandomState(5), type(NUMPY).__basicsize__, None
    for cached in (1, 0, 1):
        probe.standard_normal()
        flag, value = probe.get_state()[3:5]  # type: ignore[index]
        seen = ctypes.string_at(id(probe), size)
        if flag != cached or (cached and seen.count(np.float64(value).tobytes()) != 1):
            return None
        if offset is None:
            offset = seen.find(np.float64(value).tobytes()) - 8
        if offset < 0 or seen[offset : offset + 4] != np.int32(cached).tobytes():
            return None
    return offset


class _Generators:
    """Reads and writes what the generators of Python and numpy keep in this process."""

    def __init__(self) -> None:
        python, gauss = _python_offset(), _gauss_offset()
        self.quick = python is not None and gauss is not None and _numpy_agrees()
        self._bits: Any = None  # numpy's bit generator whose words `_numpy` are
        self._numpy: Any = None
        self._heads: tuple[memoryview, ...] = ()
        self._last: tuple[bytes, State] = b"", (None,) * 5  # what was in the heads, and the whole state
        if python is not None and gauss is not None:
            self._python = _bytes_of(id(PYTHON) + python, 4 * _WORDS + 4)
            self._gauss = _bytes_of(id(NUMPY) + gauss, 16)
            self._scratch = python_random.Random(0)  # makes the words of numpy's generator
            self._words = _bytes_of(id(self._scratch) + python, 4 * _WORDS + 4)

    def read(self) -> State:
        """Return the state of the generators of Python and numpy, to compare it with `==` or put it back.

        As long as nothing is drawn it is the very same object.
        """
        bits = _bit_generator()
        if bits is not self._bits and not (self.quick and self._attach(bits)):
            return python_random.getstate(), None, bits, None, pickle.dumps(np.random.get_state(legacy=False))
        seen, gauss_next = b"".join(self._heads), PYTHON.gauss_next
        heads, state = self._last
        if seen != heads or gauss_next is not state[1] or bits is not state[2]:
            python, numpy, gauss = self._python.tobytes(), self._numpy.tobytes(), self._gauss.tobytes()
            state = python, gauss_next, bits, numpy, gauss
            # Another thread may have drawn since: the heads are those of the copy.
            self._last = b"".join((python[:_HEAD], numpy[:_HEAD], numpy[4 * _WORDS :], gauss)), state
        return state

    def lying_at(self) -> tuple[tuple[memoryview, ...], bytes, State] | None:
        """Return the bytes that a draw moves, what they were when the state was copied, and the copy; see `read`.

        None where it is not known where they lie.
        """
        state = self.read()
        return (self._heads, self._last[0], state) if self._last[1] is state else None

    def still(self, state: State) -> bool:
        """Tell whether the generators are in a state that `read` returned; it copies nothing if that was the last."""
        heads, last = self._last
        if last is not state or state[2] is not self._bits or _bit_generator() is not self._bits:
            return self.read() == state
        return b"".join(self._heads) == heads and PYTHON.gauss_next is state[1]

    def write(self, state: State) -> None:
        """Put the generators of Python and numpy back to a state that `read` returned."""
        python, gauss_next, bits, numpy, gauss = state
        if _bit_generator() is not bits:
            _set_bit_generator(bits)
        if not isinstance(python, bytes):
            python_random.setstate(python)
            np.random.set_state(pickle.loads(gauss))
            return
        if bits is not self._bits:
            self._attach(bits)
        self._python[:] = python
        PYTHON.gauss_next = gauss_next
        self._numpy[:] = numpy
        self._gauss[:] = gauss

    def seed(self, first: int, second: int) -> None:
        """Seed the generators of Python and numpy as `random.seed` and `np.random.seed((first, second, 1))` do."""
        _seed_python(PYTHON, first | second << 32)
        PYTHON.gauss_next = None
        bits = _bit_generator()
        if bits is not self._bits and not (self.quick and self._attach(bits)):
            np.random.seed((first, second, 1))  # of the same words, both would draw the same numbers
            return
        _seed_python(self._scratch, first | second << 32 | 1 << 64)
        self._numpy[: 4 * _WORDS] = self._words[4:]
        self._numpy[4 * _WORDS :] = self._words[:4]
        self._gauss[:] = _NO_GAUSS

    def swap(self, bits: np.random.BitGenerator) -> None:
        """Have numpy's functions use another bit generator, and keep the normal number that they remember."""
        gauss = self._gauss.tobytes() if self.quick else None
        _set_bit_generator(bits)
        if gauss is not None:
            self._gauss[:] = gauss

    def _attach(self, bits: np.random.BitGenerator) -> bool:
        """Find the words of another bit generator of numpy, if it is one whose words are known."""
        if not isinstance(bits, np.random.MT19937):
            return False
        self._bits, self._numpy = bits, _bytes_of(bits.ctypes.state_address, 4 * _WORDS + 4)
        self._heads = self._python[:_HEAD], self._numpy[:_HEAD], self._numpy[4 * _WORDS :], self._gauss
        return True


_generators = _Generators()
bit_generator, read, write, swap = _bit_generator, _generators.read, _generators.write, _generators.swap
lying_at = _generators.lying_at


def seed_globals(first: int, second: int) -> None:
    """Seed Python's, numpy's and torch's (CPU) global generators from two 32-bit words.

    Torch's CPU generator has 2**32 sequences: it uses the first word only.
    """
    _generators.seed(first, second)
    torch.default_generator.manual_seed(first | second << 32)


class preserved:  # one made by contextlib costs 1 us more, around every batch
    """Put the global generators of Python, numpy and torch (CPU) back as they were, whatever happens inside.

    Examples:
        >>> import random
        >>> random.seed(0)
        >>> with preserved():
        ...     first = random.random()
        >>> random.random() == first
        True
    """

    __slots__ = ("_host", "_torch")

    def __enter__(self) -> preserved:
        self._host, self._torch = read(), torch_generator.state()
        return self

    def moved(self) -> bool:
        """Tell whether one of them is in another state by now."""
        return not _generators.still(self._host) or torch_generator.moved(self._torch)

    def __exit__(self, *error: object) -> None:
        torch_generator.put_back(self._torch)
        if not _generators.still(self._host):
            write(self._host)
