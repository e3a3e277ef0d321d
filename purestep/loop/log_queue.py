"""A logger behind a queue and a thread of its own, so that a slow one never holds up training beyond a bound.

`log` never waits: when `ROWS` rows wait already, the new one is dropped and counted. `flush`, before a snapshot, waits
`FLUSH_SECONDS` at most, and not at all while the logger is still behind from the last time; `close` waits
`CLOSE_SECONDS` in all. `logging` puts every logger behind one, and gives it less time after a signal.
"""

from __future__ import annotations

import contextlib
import queue
import threading
import warnings
from collections.abc import Callable, Mapping
from typing import Any

ROWS = 1000
FLUSH_SECONDS = 5.0
CLOSE_SECONDS = 30.0


class DroppedRowsWarning(UserWarning):
    """A logger was so slow that rows were left out."""


class Backlog:
    """A sink of a logger, as training sees it.

    Attributes:
        dropped: rows that were left out because too many waited.
    """

    def __init__(self, sink: Any, name: str) -> None:
        self._sink, self._name = sink, name
        self._queue: queue.Queue[Callable[[], None]] = queue.Queue(ROWS)
        self._error: BaseException | None = None
        self._behind: threading.Event | None = None
        self._accepted = self._done = 0  # rows
        self._closing = False
        self.dropped = 0
        self._thread = threading.Thread(target=self._work, name=f"purestep-log-{name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while not (self._closing and self._queue.empty()):
            self._attempt(self._queue.get())
        self._attempt(self._sink.close)

    def _attempt(self, call: Callable[[], None]) -> None:
        try:
            call()
        except Exception as error:
            self._error = self._error or error

    def _row(self, step: int, row: Mapping[str, Any]) -> None:
        try:
            self._sink.log(step, row)
        finally:
            self._done += 1

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def log(self, step: int, row: Mapping[str, Any]) -> None:
        """Queue a row; raise what the sink raised on an earlier one."""
        self._raise()
        try:
            self._queue.put_nowait(lambda: self._row(step, row))
            self._accepted += 1
        except queue.Full:
            self.dropped += 1

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Queue the hyperparameters; raise what the sink raised before."""
        self._raise()
        with contextlib.suppress(queue.Full):  # it is the first entry of its queue
            self._queue.put_nowait(lambda: self._sink.hparams(values))

    def flush(self, seconds: float = FLUSH_SECONDS) -> None:
        """Wait until all rows so far are durable, for so many seconds at most."""
        self._raise()
        if self._behind is not None and not self._behind.is_set():
            return
        done = threading.Event()

        def flush() -> None:
            try:
                self._sink.flush()
            finally:
                done.set()

        try:
            self._queue.put_nowait(flush)
        except queue.Full:
            return
        self._behind = done
        done.wait(seconds)
        self._raise()

    def close(self, seconds: float = CLOSE_SECONDS) -> None:
        """Close the sink when all rows are written, within so many seconds; say how many were left out."""
        self._closing = True
        with contextlib.suppress(queue.Full):
            self._queue.put_nowait(lambda: None)  # wakes the thread, if it has nothing to do
        self._thread.join(seconds)
        lost = self.dropped + self._accepted - self._done
        if lost:
            warnings.warn(
                f"{self._name} is slower than training: {lost} rows of the log were left out",
                DroppedRowsWarning,
                stacklevel=2,
            )
        self._raise()
