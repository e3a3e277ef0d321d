"""`Trap`: sees a draw from the generators of Python and numpy before it happens, and the line that draws."""

from __future__ import annotations

import contextlib
import linecache
import os
import random as python_random
import sys
import threading
import types
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from purestep._cells import PACKAGE, folder_of
from purestep.random import global_generators

_LIBRARIES = PACKAGE, folder_of(torch.__file__), folder_of(np.__file__)
_NOT_THE_USERS = (*_LIBRARIES, python_random.__file__, contextlib.__file__, threading.__file__, "<frozen")
_GAUSS = python_random.Random.gauss.__code__


class Trap:
    """Sees the first draw of this thread from the generators of Python and numpy, before it happens.

    Python's is seen by a profile function, numpy's by a bit generator that has the words of the real one and a lock of
    ours. Other threads draw as ever. What Python calls without a frame (`map(random.random, ...)`) is not seen.

    Args:
        react: called once with the name of the generator; it may raise, and the draw does not happen then.

    Attributes:
        touched: whether there was one.
    """

    def __init__(self, react: Callable[[str], None]) -> None:
        self.react, self.touched = react, False
        self._open = self._profiling = False

    def open(self) -> None:
        """Set the trap."""
        self._thread, self._outer = threading.get_ident(), sys.getprofile()
        self._bits = global_generators.bit_generator()
        with _real(self._bits).lock:
            global_generators.swap(_Trapped(self._bits, self._numpy_draws))
        own = self._outer is None or isinstance(getattr(self._outer, "__self__", None), Trap)
        if own:  # the caller's own profiler is left alone
            sys.setprofile(self._called)
        self._open, self._profiling = True, own

    def close(self) -> None:
        """Take the trap away; the generators stay where they are."""
        if not self._open:
            return
        self._open = False
        if self._profiling and sys.getprofile() in (None, self._called):
            sys.setprofile(self._outer)
        with _real(self._bits).lock:
            global_generators.swap(self._bits)

    def _touch(self, which: str) -> None:
        if self._open:
            self.touched = True
            self.close()
            self.react(which)

    def _called(self, frame: types.FrameType, event: str, argument: Any) -> None:
        if event == "c_call":
            draws = getattr(argument, "__self__", None) is global_generators.PYTHON and argument.__name__ != "getstate"
        else:
            # The second of two normal numbers is given without a draw.
            gauss = event == "call" and frame.f_code is _GAUSS
            draws = gauss and frame.f_locals.get("self") is global_generators.PYTHON
        if draws:
            self._touch("Python's random")

    def _numpy_draws(self) -> None:
        if threading.get_ident() == self._thread:
            self._touch("numpy.random")


class _Trapped(np.random.MT19937):
    """A bit generator that is another one, and says when it is about to be used."""

    def __init__(self, bits: Any, used: Callable[[], None]) -> None:
        super().__init__(0)
        self._real, self._used = bits, used
        self._lock = _Lock(bits.lock, used)

    capsule = property(lambda self: self._real.capsule)
    ctypes = property(lambda self: self._real.ctypes)
    lock = property(lambda self: self._lock)

    @property
    def state(self) -> Any:
        return self._real.state

    @state.setter
    def state(self, value: Any) -> None:
        self._used()
        self._real.state = value

    def _legacy_seeding(self, seed: object) -> None:
        self._used()
        self._real._legacy_seeding(seed)


def _real(bits: Any) -> Any:
    while isinstance(bits, _Trapped):
        bits = bits._real
    return bits


class _Lock:
    """The lock that numpy takes for each draw."""

    def __init__(self, lock: Any, used: Callable[[], None]) -> None:
        self._lock, self._used = lock, used

    def __enter__(self) -> None:
        self._used()
        self._lock.acquire()

    def __exit__(self, *error: object) -> None:
        self._lock.release()


def calling_line() -> str | None:
    """Return the innermost line of the user's own code that is being run."""
    frame: types.FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame = frame.f_back
    if frame is None:
        return None
    name, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(name, line).strip()
    return f"{os.path.basename(name)}:{line} in {frame.f_code.co_name}" + (f": {text}" if text else "")
