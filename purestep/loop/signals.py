"""Signals: what the world outside may ask of a run."""

from __future__ import annotations

import os
import signal
import threading
import time
from types import FrameType
from typing import Any, Self


class Signals:
    """Notes SIGINT and SIGTERM instead of dying of them, while active.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread, where Python has no signals, it notes
    none.

    Attributes:
        count: a function that returns how many signals came that were not read yet.
        since: when the first one came, on the monotonic clock; None before.
    """

    def __init__(self) -> None:
        self._unread: list[str] = []
        self.count = self._unread.__len__
        self._left = False
        self.since: float | None = None
        self._name = ""
        self._seen = 0
        self._old: dict[int, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._old[number] = signal.signal(number, self._note)
        return self

    def __exit__(self, *error: object) -> None:
        # A run that was left in the middle may be collected by another thread, where there are no signals: then `_note`
        # gives the handlers back when a signal comes.
        self._left = True
        if threading.current_thread() is threading.main_thread():
            self._give_back()

    def _give_back(self) -> None:
        for number, handler in self._old.items():
            signal.signal(number, handler)
        self._old.clear()

    def _note(self, number: int, frame: FrameType | None) -> None:
        if self._left:
            self._give_back()
            os.kill(os.getpid(), number)
            return
        if number == signal.SIGINT and self._seen and self._name == "SIGINT":
            raise KeyboardInterrupt
        self.since = time.monotonic() if self.since is None else self.since
        self._name, self._seen = signal.Signals(number).name, self._seen + 1
        self._unread.append(self._name)

    def note(self, name: str) -> None:
        """Note a signal that reached the process in another way; as often as it comes."""
        self.since = time.monotonic() if self.since is None else self.since
        self._name = name
        self._unread.append(name)

    @property
    def unread(self) -> bool:
        """Whether a signal came that was not read yet."""
        return bool(self._unread)

    def read(self) -> str:
        """Return the name of the signal and count it as read."""
        self._unread.clear()
        return self._name
