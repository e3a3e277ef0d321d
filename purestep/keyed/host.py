"""Draws from the global generators of Python and numpy inside a pure call: from its key, or an error with the line.

Torch's random operations show themselves to a function mode; Python's and numpy's do not. Reading their state costs
less than a microsecond, so `Guard` compares it around each call. When it has moved, the call (which is pure) is done again
under a `Trap`, which sees the first draw of its own thread before it happens: it seeds the generators from the key, and
the caller's state is put back afterwards. From then on the model is known to draw, and is seeded at once.

`functional.bind` has a guard; `jit` sets a trap that refuses. Where the generators keep their state is known to
`random.generators`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import linecache
import os
import random as python_random
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch

from purestep.errors import RandomnessError, explain
from purestep.keyed.mode import KeyedRandom
from purestep.random import generators
from purestep.random.keys import host_words

_PACKAGE = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
_TORCH = os.path.dirname(os.path.abspath(torch.__file__))
_NUMPY = os.path.dirname(os.path.abspath(np.__file__))
_NOT_THE_USERS = (_PACKAGE, _TORCH, _NUMPY, python_random.__file__, contextlib.__file__, threading.__file__, "<frozen")
_PURPOSE = "host generators"
_INSTEAD = "x * ps.random.uniform(key, ())    # key = ps.random.fold_in(state.rng, state.step), passed with the batch"
_local = threading.local()
_get_bits, _read = np.random.get_bit_generator, generators.read


@dataclasses.dataclass
class Habits:
    """What is known of the host draws of one module.

    Attributes:
        draws: it was seen to draw.
        tried: it was called before.
        suspect: the generators moved in its last call, and it is not known who did it.
        alarms: how often they moved and somebody else had done it: another thread.
    """

    draws: bool = False
    tried: bool = False
    suspect: bool = False
    alarms: int = 0


class Guard:
    """Watches the generators of Python and numpy around one pure call.

    Args:
        habits: what is known of the module; it is kept from call to call.
        mode: has the key that draws come from.
        repeatable: whether the caller does the call again when `exit` says so.
    """

    __slots__ = ("_before", "_caller", "_how", "_start", "_torch", "_trap", "habits", "mode", "repeatable")

    def __init__(self, habits: Habits, mode: KeyedRandom, repeatable: bool = False) -> None:
        self.habits, self.mode, self.repeatable = habits, mode, repeatable
        self._how: Literal["watch", "trap", "seed", "replay", "off"] = "watch"
        self._before: Any = None
        self._caller: Any = None
        self._start: Any = None
        self._torch: Any = None
        self._trap: Trap | None = None

    def enter(self) -> None:
        """Begin to watch."""
        if torch.compiler.is_compiling() or getattr(_local, "refusing", 0):
            self._how = "off"
        elif self._start is not None and self._how == "replay":
            self._before, self._torch = _read(), torch.default_generator.get_state()
            self._restore(self._start)
        elif self.habits.tried and not self.habits.draws and not self.habits.suspect:
            self._how = "watch"
            self._before = _read()
        else:
            self._enter_with_care()

    def _enter_with_care(self) -> None:
        """Begin a first call, one of a model that draws, or one that has to show who draws."""
        habits, keyed = self.habits, self.mode.key is not None
        self._before, self._torch = _read(), torch.default_generator.get_state()
        self._how = "watch" if self.repeatable and not habits.suspect and not habits.draws else "trap"
        if habits.draws and self.mode.refusal is not None:
            self._how = "watch"  # the backward pass of a model that draws in its forward pass
        elif habits.draws and keyed and (words := self._words()) is not None:
            self._how = "seed"
            self._seed(words)
        habits.tried = True
        if self._how == "trap":
            self._trap = Trap(self._touched)
            self._trap.open()

    def exit(self, failed: bool) -> bool:
        """End, with the generators of the caller as they were.

        Args:
            failed: whether the call raised an exception.

        Returns:
            Whether the call has to be done again, because it has drawn numbers that are not of the key.

        Raises:
            RandomnessError: it has, and cannot be done again.
        """
        if self._how == "off":
            return False
        if self._how == "watch":
            if _read() == self._before and (self._torch is None or self._torch_is_still()):
                self._torch = None
                return False
            return self._moved(failed)
        if self._how == "trap":
            return self._close_trap(failed)
        self._restore((self._before, self._torch))
        self._torch = None
        return False

    def mark(self) -> Callable[[], Any]:
        """Return a function that gives the generators as they are now, for a recomputation of what comes next."""
        if self._how == "seed" or (self._trap is not None and self._trap.touched):
            now = _read(), torch.default_generator.get_state()
            return lambda: now
        return lambda: self._start

    def replaying(self, mode: KeyedRandom, mark: Callable[[], Any]) -> Guard:
        """Return the guard of a recomputation: it draws what the call drew after a mark."""
        again = Guard(self.habits, mode)
        again._start = mark()
        again._how = "replay" if again._start is not None else "watch"
        return again

    # --- private ------------------------------------------------------------------------------------------------------

    def _moved(self, failed: bool) -> bool:
        habits, torch_moved = self.habits, self._torch is not None and not self._torch_is_still()
        alone = _alone()
        if torch_moved and not alone and _read() == self._before:
            return False
        if failed:
            if alone:
                self._restore((self._before, self._torch))
            return False
        if not self.repeatable:
            habits.suspect = not alone
            if alone:
                self._restore((self._before, self._torch))
                raise self._refusal(None, None)
            return False
        if torch_moved and alone:
            return self._again_seeded()
        habits.alarms += 1
        if habits.alarms & (habits.alarms - 1):
            return False  # another thread draws all the time: look again after twice as many calls
        habits.suspect, self._caller = True, self._before
        return True

    def _close_trap(self, failed: bool) -> bool:
        habits, trap = self.habits, self._trap
        self._trap = None
        if trap is None:
            return False
        trap.close()
        habits.suspect = False
        caller, self._caller = self._caller or self._before, None
        if trap.touched:
            habits.draws, habits.alarms = True, 0
            self._restore((caller, self._torch))
            return False
        if not _alone() or (_read() == self._before and self._torch_is_still()):
            return False
        self._before = caller
        if failed or self.repeatable:
            self._restore((caller, self._torch))
            return not failed and self._again_seeded()
        self._restore((caller, self._torch))
        raise self._refusal(None, None)

    def _again_seeded(self) -> bool:
        """Have the call done again, seeded at once, for a draw that no trap sees."""
        self._restore((self._before, self._torch))
        if self.mode.key is None or self._words() is None:
            raise self._refusal(None, None)
        self.habits.draws = True
        return True

    def _touched(self, which: str) -> None:
        """The first draw, before it happens: seed, or refuse."""
        words = self._words()
        if words is None:
            raise self._refusal(which, calling_line())
        self._seed(words)

    def _seed(self, words: tuple[int, int]) -> None:
        generators.seed(*words)
        self._start = _read(), torch.default_generator.get_state()

    def _words(self) -> tuple[int, int] | None:
        mode = self.mode
        if mode.refusal is not None or mode.key is None:
            return None
        if not isinstance(mode.key, torch.Tensor):
            mode.key = mode.key()
        return host_words(mode.key, _PURPOSE)

    def _restore(self, state: tuple[Any, Any]) -> None:
        host, torch_state = state
        if torch_state is not None:
            torch.default_generator.set_state(torch_state)
        generators.write(host)

    def _torch_is_still(self) -> bool:
        return self._torch is None or torch.equal(torch.default_generator.get_state(), self._torch)

    def _refusal(self, which: str | None, line: str | None) -> RandomnessError:
        drew = f"the model drew from {which or 'a global generator of the host'}"
        if self.mode.refusal is not None:
            return RandomnessError(self.mode.refusal)
        if self.mode.key is None:
            return RandomnessError(
                explain(
                    f"{drew}, but was given no key",
                    where=line,
                    why="a pure step never touches the global generators; with a key they are seeded from it",
                    instead="ps.apply(model, params, buffers, x, rng=ps.random.fold_in(state.rng, state.step))",
                )
            )
        if self._words() is None:
            return RandomnessError(
                explain(
                    f"{drew} inside a torch.func transform",
                    where=line,
                    why="it would draw once for all that is mapped or differentiated, and its key has no value there",
                    instead=_INSTEAD,
                )
            )
        return RandomnessError(
            explain(
                f"{drew}, after calls that did not",
                where=line,
                why="it was to be seeded from the key before, and this call cannot be done again",
                instead=_INSTEAD,
            )
        )


@contextlib.contextmanager
def refused(error: Callable[[str | None, str | None], Exception], again: Callable[[], Any]) -> Iterator[None]:
    """Refuse host draws in a `with` block, whatever guards are in it, and leave the generators as they were.

    Args:
        error: makes the error from the name of the generator and the line that draws, where they are known.
        again: does the same again, when there was a draw, to learn which line it is.
    """

    def touched(which: str) -> None:
        found.append(error(which, calling_line()))
        raise found[0]

    found: list[Exception] = []
    with _unguarded():
        before = _read()
        try:
            yield
        finally:
            moved, alone = _read() != before, _alone()
            if moved and alone:
                generators.write(before)
        if moved:
            trap, second = Trap(touched), _read()
            trap.open()
            try:
                again()
            except Exception:  # that of `touched`, or one that the draws are not the reason of
                pass
            finally:
                trap.close()
                if alone:
                    generators.write(second)
            if trap.touched or alone:
                raise found[0] if trap.touched else error(None, None)


@contextlib.contextmanager
def _unguarded() -> Iterator[None]:
    """Switch the guards of this thread off in a `with` block, because somebody outside of them watches."""
    _local.refusing = getattr(_local, "refusing", 0) + 1
    try:
        yield
    finally:
        _local.refusing -= 1


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
        self._bits, self._caller = _get_bits(), _read()
        np.random.set_bit_generator(_Trapped(self._bits, self._numpy_draws))
        generators.PYTHON.gauss_next = None  # a second normal number would be given without a draw; numpy's is gone too
        own = self._outer is None or isinstance(getattr(self._outer, "__self__", None), Trap)
        if own:  # a profiler of somebody else is left alone
            sys.setprofile(self._called)
        self._open, self._profiling = True, own

    def close(self) -> None:
        """Take the trap away; the generators stay where they are."""
        if not self._open:
            return
        self._open = False
        if self._profiling and sys.getprofile() in (None, self._called):
            sys.setprofile(self._outer)
        np.random.set_bit_generator(self._bits)
        generators.write_gauss(self._caller)

    def _touch(self, which: str) -> None:
        if self._open:
            self.touched = True
            self.close()
            self.react(which)

    def _called(self, frame: Any, event: str, argument: Any) -> None:
        if (
            event == "c_call"
            and getattr(argument, "__self__", None) is generators.PYTHON
            and argument.__name__ != "getstate"
        ):
            self._touch("Python's random")

    def _numpy_draws(self) -> None:
        if threading.get_ident() == self._thread:
            self._touch("numpy.random")


class _Trapped(np.random.MT19937):  # type: ignore[misc]
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

    def _legacy_seeding(self, seed: Any) -> None:
        self._used()
        self._real._legacy_seeding(seed)


class _Lock:
    """The lock that numpy takes for each draw."""

    def __init__(self, lock: Any, used: Callable[[], None]) -> None:
        self._lock, self._used = lock, used

    def __enter__(self) -> None:
        self._used()
        self._lock.acquire()

    def __exit__(self, *error: Any) -> None:
        self._lock.release()


def _alone() -> bool:
    """Whether no other thread of Python could have drawn; those of ours do not."""
    current = threading.get_ident()
    return all(t.ident == current or t.name.startswith("purestep") for t in threading.enumerate())


def calling_line() -> str | None:
    """Return the innermost line of the user's own code that is being run."""
    frame = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_NOT_THE_USERS):
        frame = frame.f_back  # type: ignore[assignment]
    if frame is None:
        return None
    name, line = frame.f_code.co_filename, frame.f_lineno
    text = linecache.getline(name, line).strip()
    return f"{os.path.basename(name)}:{line} in {frame.f_code.co_name}" + (f": {text}" if text else "")
