"""Draws from the global generators of Python and numpy inside a pure call: from its key, or an error with the line.

Torch's random operations show themselves to a function mode; Python's and numpy's do not. Reading their state costs
less than a microsecond, so `Guard` compares it around each call. When it has moved, the call (which is pure) is done
again under a `Trap`, which sees the first draw of its own thread before it happens: it seeds the generators from the
key, and the caller's state is put back afterwards. From then on the model is known to draw, and is seeded at once.

`functional.bind` has a guard; `jit` sets a trap that refuses. Where the generators keep their state is known to
`random.global_generators`.
"""

from __future__ import annotations

import _thread
import contextlib
import dataclasses
import sys
import threading
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from purestep.errors import RandomnessError, explain
from purestep.random import global_generators, torch_generator, watch_all
from purestep.random.host_trap import Trap, calling_line
from purestep.random.keys import host_words
from purestep.random.torch_mode import KeyedRandom
from purestep.random.torch_watch import TorchHabits

_PURPOSE = "host generators"
_INSTEAD = "x * ps.random.uniform(key, ())    # key = ps.random.fold_in(state.rng, state.step), passed with the batch"
_unguarded: set[int] = set()  # threads whose guards are off
_read, _is_compiling, _thread_count = global_generators.read, torch.compiler.is_compiling, _thread._count


@dataclasses.dataclass
class Habits:
    """What is known of the host draws of one module.

    Attributes:
        draws: it was seen to draw.
        tried: it was called before.
        suspect: the generators moved in its last call, and it is not known who did it.
        alarms: how often another thread moved them.
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
        torch_habits: what is known of the torch draws of a function on the module, which is kept as well; None: that
            is not looked at.

    Attributes:
        keyed: whether the call has to be under the mode; known once it has begun. Otherwise torch's generator is
            watched, too.
    """

    __slots__ = (
        *("_before", "_caller", "_how", "_others", "_start", "_states", "_threads", "_torch", "_torch_moved_from"),
        "_trap",
        *("habits", "keyed", "mode", "repeatable", "torch_habits"),
    )
    _before: Any  # the generators of Python and numpy when the call began, and torch's where it was looked at
    _torch: Any
    _states: Any  # both, where they were looked at together
    _threads: int
    _others: dict[int, int] | None  # CPU time of other threads when the call began; None where it was not measured
    _trap: Trap
    _start: Any  # all of them as they were seeded, or where a recomputation begins
    _caller: Any  # all of them as the caller left them, when the call is done again
    _torch_moved_from: torch.Tensor | None  # torch's before a call that moved it beside other threads

    def __init__(
        self,
        habits: Habits,
        mode: KeyedRandom,
        repeatable: bool = False,
        torch_habits: TorchHabits | None = None,
    ) -> None:
        self.habits, self.mode, self.repeatable, self.torch_habits = habits, mode, repeatable, torch_habits
        self.keyed = True
        self._how: Literal["off", "watch", "trap", "seed"] = "off"
        self._start = self._caller = None
        self._torch_moved_from = None

    def enter(self) -> None:
        """Begin to watch."""
        habits, self.keyed = self.habits, True
        if (_unguarded and threading.get_ident() in _unguarded) or _is_compiling():
            self._how = "off"
        elif habits.tried and not habits.draws and not habits.suspect and self._start is None:
            self.keyed = self.torch_habits is None or not self.torch_habits.watched(self.mode)
            self._how = "watch"
            # They cost microseconds a thread. A repeatable call that drew is repeated with care, which takes them.
            self._others = None if self.repeatable else _other_threads()
            if self.keyed:
                self._torch, self._before = None, _read()
            else:
                self._look()
            self._threads = _thread_count()
        else:
            self._enter_with_care()

    def _enter_with_care(self) -> None:
        """Begin a first call, one of a model that draws, one that shows who draws, or a recomputation."""
        habits = self.habits
        self._others = _other_threads()  # before the generators are read, so that a draw after that shows in the times
        self._before, self._torch, self._threads = _read(), torch_generator.state(), _thread_count()
        recomputed, backward = self._start is not None and not self._caller, self.mode.refusal is not None
        self._how = "watch" if backward or (self.repeatable and not habits.suspect and not habits.draws) else "trap"
        if recomputed:
            self._how = "seed"
            _restore(*self._start)
        elif habits.draws and not backward and (words := self._words()) is not None:
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
        how = self._how
        if how == "off" or (not self.keyed and watch_all.states() is self._states):
            return False
        if self.keyed and self.torch_habits is not None:
            self._learn_of_torch(self.torch_habits, failed)
        if how == "watch":
            now = _read()
            still = now is self._before or now == self._before
            if not self.keyed and torch_generator.moved(self._torch):
                return self._torch_moved(failed, still)
            if still and (not self.keyed or self._torch is None or self._torch_is_still()):
                return False
        caller = self._caller or (self._before, self._torch)
        if caller[1] is None and self._torch is not None:
            caller = caller[0], self._torch  # torch's was not looked at when the others were seen to move
        if how == "watch":
            return self._moved(failed, caller)
        self._caller = None
        if how == "trap":
            self._trap.close()
            self.habits.suspect = False
            if not self._trap.touched:
                return self._moved_unseen(failed, caller)
            self.habits.draws, self.habits.alarms = True, 0
        _restore(*caller)
        return False

    def mark(self) -> Callable[[], Any]:
        """Return a function that gives the generators as they are now, for a recomputation of what comes next."""
        if self._how == "seed" or (self._how == "trap" and self._trap.touched):
            now = _read(), torch_generator.state()
            return lambda: now
        return lambda: self._start  # a draw that comes later is the first one

    def replaying(self, mode: KeyedRandom, mark: Callable[[], Any]) -> Guard:
        """Return the guard of a recomputation: it draws what the call drew after a mark."""
        again = Guard(self.habits, mode)
        again._start = mark()
        return again

    def following(self, mode: KeyedRandom) -> Guard:
        """Return the guard of what comes next, after a call that was watched and moved nothing: it refuses draws."""
        after = Guard(self.habits, mode, torch_habits=self.torch_habits)
        after._how, after.keyed = "watch", False
        # The times of other threads before the generators, so that what one of them drew in between is not the model's.
        after._others, after._threads = _other_threads(), _thread_count()
        after._look()
        return after

    # --- private ------------------------------------------------------------------------------------------------------

    def _look(self) -> None:
        """Begin to watch all of the generators."""
        self._states = watch_all.states()
        self._torch, self._before = self._states

    def _torch_moved(self, failed: bool, host_is_still: bool) -> bool:
        """Torch's generator moved while it was watched: from now on the mode sees whether the model draws."""
        if self.torch_habits is not None:
            self.torch_habits.draws = True
        if self._alone():
            torch_generator.put_back(self._torch)
            if self.mode.refusal is not None and not failed:
                raise self._refusal(None, None)
        else:
            self._torch_moved_from = self._torch
        if not host_is_still:
            self._moved(failed, (self._before, self._torch))
        return not failed and self.repeatable

    def _learn_of_torch(self, habits: TorchHabits, failed: bool) -> None:
        """Remember what the mode has met. If that moved torch's generator in the call before, it is put back."""
        habits.learn(self.mode)
        moved_from, self._torch_moved_from = self._torch_moved_from, None
        if moved_from is not None and self.mode.met and not failed:
            torch_generator.put_back(moved_from)
            self._torch = None if self._torch is None else moved_from

    def _moved(self, failed: bool, caller: tuple[Any, Any]) -> bool:
        """The generators moved while they were watched: was it the model?"""
        habits, alone = self.habits, self._alone()
        if failed:
            habits.suspect = True
            if alone:
                _restore(*caller)
            return False
        if not self.repeatable:
            habits.suspect = True
            if alone:
                _restore(*caller)
                raise self._refusal(None, None)
            return False
        if not self._torch_is_still() and _read() == self._before:
            return alone and self._again_seeded(caller)  # no trap shows who it was
        habits.alarms += 1
        if habits.alarms & (habits.alarms - 1):
            return False  # another thread draws all the time: look again after twice as many calls
        habits.suspect, self._caller = True, caller
        return True

    def _moved_unseen(self, failed: bool, caller: tuple[Any, Any]) -> bool:
        """The trap was not touched. If they moved nevertheless, they did so where no trap sees it."""
        if (_read() == self._before and self._torch_is_still()) or not self._alone():
            return False
        if failed or self.repeatable:
            return not failed and self._again_seeded(caller)
        _restore(*caller)
        raise self._refusal(None, None)

    def _again_seeded(self, caller: tuple[Any, Any]) -> bool:
        """Have the call done again, seeded at once, for a draw that no trap sees."""
        _restore(*caller)
        if self._words() is None:
            raise self._refusal(None, None)
        self.habits.draws, self._caller = True, caller
        return True

    def _touched(self, which: str) -> None:
        """The first draw, before it happens: seed, or refuse."""
        words = self._words()
        if words is None:
            raise self._refusal(which, calling_line())
        self._seed(words)

    def _seed(self, words: tuple[int, int]) -> None:
        global_generators.seed_globals(*words)
        self._start = _read(), torch_generator.state()

    def _words(self) -> tuple[int, int] | None:
        mode = self.mode
        if mode.refusal is not None or mode.key is None:
            return None
        if not isinstance(mode.key, torch.Tensor):
            mode.key = mode.key()
        return host_words(mode.key, _PURPOSE)

    def _alone(self) -> bool:
        """Whether no other thread of Python has drawn since the call began: none has run, and none has ended."""
        return self._threads == _thread_count() and _all_idle(self._others)

    def _torch_is_still(self) -> bool:
        return self._torch is None or not torch_generator.moved(self._torch)

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
                why="they were to be seeded from the key before, and this call cannot be done again: "
                "other ranks wait in it, or it is a `with` block",
                instead=f"{_INSTEAD}\nor let the model draw in its first call, too",
            )
        )


def _restore(host: global_generators.State, torch_state: torch.Tensor | None) -> None:
    if torch_state is not None:
        torch_generator.put_back(torch_state)
    global_generators.write(host)


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
    with unguarded():
        others = _other_threads()
        before, threads = _read(), _thread_count()
        try:
            yield
        finally:
            moved, alone = _read() != before, threads == _thread_count() and _all_idle(others)
            if moved and alone:
                global_generators.write(before)
        if moved:
            trap, before = Trap(touched), _read()
            trap.open()
            with contextlib.suppress(Exception):  # that of `touched`, or one that the draws are not the reason of
                again()
            trap.close()
            if not found and alone and _read() != before:
                global_generators.write(before)
                found.append(error(None, None))
            if found:
                raise found[0]


@contextlib.contextmanager
def unguarded() -> Iterator[None]:
    """Switch the guards of this thread off in a `with` block, for a caller who watches or puts back by itself."""
    thread = threading.get_ident()
    inner = thread in _unguarded
    _unguarded.add(thread)
    try:
        yield
    finally:
        if not inner:
            _unguarded.discard(thread)


# Threads that run only code of this package, which never draws. That of a save is not among them, because Orbax and the
# modules that it imports draw there; nor are those of other libraries' loggers. Names of other libraries' threads are
# not listed: their pools run the user's code too (`asyncio_0`, `grain-prefetch_0`), and the CPU time clears an idle one
# without a name.
_SILENT_THREADS = ("purestep-log-Csv", "purestep-lock", "purestep-lease", "purestep-watch", "purestep-hash")


def _other_threads() -> dict[int, int] | None:
    """Return the CPU time in nanoseconds that each other thread which might draw has used, by its native id.

    A thread that has used none in between has not run, and so has not drawn: pools, event writers and prefetchers of
    other libraries wait for work most of the time, and outlive what they were made for.

    Returns:
        The times; None where a thread has no clock that can be read, because it is about to start, or outside of Linux.
    """
    if threading.active_count() == 1:
        return {}
    current, times = threading.get_ident(), {}
    for thread in threading.enumerate():
        if thread.ident == current or thread.name.startswith(_SILENT_THREADS):
            continue
        if thread.native_id is None or sys.platform != "linux":
            return None
        try:
            # The kernel's id of a thread's clock, as pthread_getcpuclockid makes it; that one must not be asked about a
            # thread that has ended, and a thread of C that once ran Python stays in the list when it has.
            times[thread.native_id] = time.clock_gettime_ns(~thread.native_id << 3 | 6)
        except OSError:
            times[thread.native_id] = -1
    return times


def _all_idle(before: dict[int, int] | None) -> bool:
    """Whether no other thread that might draw has run since `before`; where that is None, whether there is none."""
    others = _other_threads()
    return others == {} if before is None else others == before
