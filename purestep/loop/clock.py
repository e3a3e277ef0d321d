"""What the outside world does to a run (signals, time), as all ranks see it.

`Alone` answers at once. `Together` asks the other ranks, at moments that all of them reach: where an effect begins,
where a chunk of steps ends, and within it every so many steps that about a second lies between. The clock is that of
rank 0, and a signal to any rank is one to all.
"""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable
from typing import Any

from purestep.distributed import control
from purestep.loop.events import Effect, Evaluate, Train, Transform
from purestep.loop.signals import Signals
from purestep.parallel.same_inputs import SAME_DATA

_PACE = 1.0  # seconds between two exchanges within a chunk: short against the grace period after SIGTERM
_LONGEST = 1000  # steps between two exchanges


class Alone:
    """One process: its own signals, its own clock."""

    def __init__(self, signals: Signals) -> None:
        self._signals = signals
        self._start = time.monotonic()
        self._ready: Callable[[], int | None] | None = None

    def begin(self, elapsed: float, batches: int) -> None:
        """Start the clock at so many seconds, and the count of batches."""
        self._start = time.monotonic() - elapsed

    def watch(self, ready: Callable[[], int | None] | None) -> None:
        """End a chunk of steps once the step is compiled, as `StepFacts.ready` says; None: there is nothing to ask."""
        self._ready = ready

    @property
    def switch(self) -> int | None:
        """The counter from which on all ranks have the step compiled; None before that is known."""
        return None if self._ready is None else self._ready()

    @property
    def unread(self) -> bool:
        """Whether a signal came that was not read yet."""
        return self._signals.count() > 0

    def read(self) -> str:
        """Return the name of the signal and count it as read."""
        return self._signals.read()

    def elapsed(self) -> float:
        """Return the seconds of training so far."""
        return time.monotonic() - self._start

    def agreed(self, effect: Effect) -> Effect | None:
        """Return the effect to perform; None when a signal became known instead."""
        return effect

    def stop(self, deadline: float | None) -> bool:
        """Tell, after a batch, whether the chunk of steps ends here."""
        if self._signals.unread or (self._ready is not None and self._ready() is not None):
            return True
        return deadline is not None and time.monotonic() - self._start >= deadline

    def stopping(self, deadline: float | None) -> Callable[[], object]:
        """Return what tells that after each batch of a chunk, as long as nothing else is watched meanwhile."""
        if self._ready is None and deadline is None:
            return self._signals.count  # no function of Python is called for every batch
        return functools.partial(self.stop, deadline)

    def meet(self, what: str, value: object = None) -> list[Any]:
        """Exchange a value with the other ranks, and with it signals and time."""
        return [value]

    def done(self, count: int, seen: Callable[[], str | None]) -> None:
        """Note that a chunk of so many batches is over; `seen` describes the last of them, where ranks compare it."""


class Together(Alone):
    """Several processes: decisions about signals and time are the same on all ranks."""

    def __init__(self, signals: Signals) -> None:
        super().__init__(signals)
        self._name = ""
        self._elapsed = 0.0
        self._met = time.monotonic()
        self._since = 0  # steps since the last exchange
        self._next = 1  # steps from one exchange to the next
        self._batches = 0
        self._switch: int | None = None

    def begin(self, elapsed: float, batches: int) -> None:
        super().begin(elapsed, batches)
        self._elapsed, self._batches = elapsed, batches

    def watch(self, ready: Callable[[], int | None] | None) -> None:
        super().watch(ready)
        self._switch = None

    @property
    def switch(self) -> int | None:
        return self._switch

    @property
    def unread(self) -> bool:
        """Whether a signal to any rank is known to all and not read yet."""
        return bool(self._name)

    def read(self) -> str:
        name, self._name = self._name, ""
        return name

    def elapsed(self) -> float:
        """Return the seconds of training as of the last exchange, on the clock of rank 0."""
        return self._elapsed

    def agreed(self, effect: Effect) -> Effect | None:
        """Return the effect of rank 0: what depends on its terminal or clock is so for all.

        Raises:
            RankError: the ranks are not about to perform the same kind of effect.
        """
        what = type(effect).__name__ + (f" {effect.name!r}" if isinstance(effect, Evaluate | Transform) else "")
        bounds = self.meet(what, (effect.n, effect.elapsed) if isinstance(effect, Train) else None)[0]
        if self._name:
            return None
        return Train(*bounds) if isinstance(effect, Train) else effect

    def stopping(self, deadline: float | None) -> Callable[[], object]:
        return functools.partial(self.stop, deadline)

    def stop(self, deadline: float | None) -> bool:
        self._since += 1
        self._batches += 1
        control.at(f"batch {self._batches}")
        if self._since < self._next:
            return False
        self.meet("a chunk of steps", deadline=deadline)
        if self.unread or self._switch is not None:
            return True
        return deadline is not None and self._elapsed >= deadline

    def done(self, count: int, seen: Callable[[], str | None]) -> None:
        """Note that a chunk is over; all ranks must have trained on the same number of batches, and read the same ones.

        Raises:
            RankError: they have not: their data differ.
        """
        found = self.meet(f"the end of a chunk of {count} batches", seen())
        texts = {number: str(text) for number, text in enumerate(found)}
        control.refuse_different({f"batch {self._batches}": texts}, instead=SAME_DATA)

    def meet(self, what: str, value: object = None, *, deadline: float | None = None) -> list[Any]:
        name = self._signals.read() if self._signals.unread else ""
        now = time.monotonic() - self._start
        ready = None if self._ready is None else self._ready()
        found = control.gather((value, name, now, self._pace(now, deadline), ready), what=what)
        self._name = self._name or next((name for _, name, _, _, _ in found if name), "")
        _, _, self._elapsed, self._next, _ = found[0]
        counters: list[int] = [ready for *_, ready in found if ready is not None]
        self._switch = max(counters) if len(counters) == len(found) else None
        self._met, self._since = time.monotonic(), 0
        return [entry[0] for entry in found]

    def _pace(self, now: float, deadline: float | None) -> int:
        """After how many steps to meet again, from the time of the last ones; the one of rank 0 counts."""
        if not self._since:
            return self._next
        step = max((time.monotonic() - self._met) / self._since, 1e-6)
        left = _PACE if deadline is None else min(_PACE, max(deadline - now, 0.0))
        return min(max(math.ceil(left / step), 1), _LONGEST)
