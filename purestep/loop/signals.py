"""Signals and the lock of a run directory: what the world outside may ask of a run."""

from __future__ import annotations

import fcntl
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import FrameType
from typing import Any, Self

from purestep.errors import ConfigError, explain


class Signals:
    """Notes SIGINT and SIGTERM instead of dying of them, while active.

    A second SIGINT raises KeyboardInterrupt at once. Outside the main thread, where Python has no signals, it notes
    none.

    Attributes:
        unread: whether a signal came that was not read yet.
        since: when the first one came, on the monotonic clock; None before.
    """

    def __init__(self) -> None:
        self.unread = self._left = False
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
        self._name, self._seen, self.unread = signal.Signals(number).name, self._seen + 1, True

    def read(self) -> str:
        """Return the name of the signal and count it as read."""
        self.unread = False
        return self._name


class Lock:
    """An exclusive lock on a run directory, which dies with its process, or outlives the run that still writes.

    Raises:
        ConfigError: a living process holds it.
    """

    def __init__(self, run_dir: Path) -> None:
        self.path = run_dir / "lock"
        self._kept = False

    def __enter__(self) -> Self:
        self._file = open(self.path, "a+")
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            self._file.seek(0)
            holder = self._file.read().strip() or "unknown"
            self._file.close()
            raise ConfigError(
                explain(
                    "another process is running in this run directory",
                    where=f"{self.path.parent}, process {holder}",
                    why="two runs would overwrite each other's snapshots",
                    instead="wait for it, end it, or use another run_dir=",
                )
            ) from error
        self._file.truncate(0)
        self._file.write(str(os.getpid()))
        self._file.flush()
        return self

    def keep_while(self, busy: Callable[[float], bool]) -> None:
        """Hold it on, beyond the end of the run, until nothing is busy any more."""

        def wait() -> None:
            while busy(threading.TIMEOUT_MAX):
                pass
            self._file.close()

        self._kept = True
        threading.Thread(target=wait, name="purestep-lock", daemon=True).start()

    def __exit__(self, *error: object) -> None:
        if not self._kept:
            self._file.close()
