"""Where the time of a run goes: seconds by part, each part without those that run inside of it.

Owns nothing but clocks. No state and no bit depends on it, and no snapshot holds it.
"""

from __future__ import annotations

import contextlib
import time
from collections.abc import Iterable, Iterator
from typing import TypeVar

T = TypeVar("T")

_END = object()


class Stopwatch:
    """Adds up the wall time of named parts of one process.

    Attributes:
        seconds: by part, of what has ended or was interrupted by a part inside of it.

    Examples:
        >>> watch = Stopwatch()
        >>> with watch.part("step"):
        ...     batches = list(watch.over("data", range(3)))
        >>> sorted(watch.seconds)
        ['data', 'step']
    """

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._open: list[str] = []
        self._since = 0.0

    @contextlib.contextmanager
    def part(self, name: str) -> Iterator[None]:
        """Count what happens inside of the block; the part around it waits."""
        self._enter(name)
        try:
            yield
        finally:
            self._leave()

    def over(self, name: str, items: Iterable[T]) -> Iterator[T]:
        """Yield the items, and count what it takes to make them, not what is done with them."""
        iterator = iter(items)
        seconds, parts, clock = self.seconds, self._open, time.perf_counter
        seconds.setdefault(name, 0.0)
        while True:
            # `_enter` and `_leave`, without their calls: this is done for every batch.
            now = clock()
            if parts:
                seconds[parts[-1]] += now - self._since
            parts.append(name)
            self._since = now
            try:
                item = next(iterator, _END)
            finally:
                now = clock()
                seconds[parts.pop()] += now - self._since
                self._since = now
            if item is _END:
                return
            yield item  # type: ignore[misc]  # the sentinel has returned

    def move(self, name: str, seconds: float) -> None:
        """Count seconds of the part that is open as another's: for what is measured elsewhere, call by call."""
        self.seconds[name] = self.seconds.get(name, 0.0) + seconds
        self._since += seconds

    def _enter(self, name: str) -> None:
        now = time.perf_counter()
        if self._open:
            self.seconds[self._open[-1]] += now - self._since
        self.seconds.setdefault(name, 0.0)
        self._open.append(name)
        self._since = now

    def _leave(self) -> None:
        now = time.perf_counter()
        self.seconds[self._open.pop()] += now - self._since
        self._since = now
