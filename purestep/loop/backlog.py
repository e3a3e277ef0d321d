"""A logger behind a queue and a thread of its own, so that a slow one never holds up training beyond a bound.

`log` never waits: when `ROWS` rows wait already, the new one is dropped and counted. `flush`, before a snapshot, waits
`FLUSH_SECONDS` at most, and not at all while the logger is still behind from the last time; `close` waits
`CLOSE_SECONDS`. `outlets` puts every logger behind one.
"""

from __future__ import annotations

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
        self._queue: queue.Queue[Callable[[], None] | None] = queue.Queue(ROWS)
        self._error: BaseException | None = None
        self._behind: threading.Event | None = None
        self.dropped = 0
        self._thread = threading.Thread(target=self._work, name=f"purestep-log-{name}", daemon=True)
        self._thread.start()

    def _work(self) -> None:
        while (call := self._queue.get()) is not None:
            try:
                call()
            except Exception as error:
                self._error = self._error or error

    def _raise(self) -> None:
        if self._error is not None:
            raise self._error

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Queue a row; raise what the sink raised on an earlier one."""
        self._raise()
        try:
            self._queue.put_nowait(lambda: self._sink.log(step, row))
        except queue.Full:
            self.dropped += 1

    def flush(self) -> None:
        """Wait until all rows so far are durable, within the bound."""
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
        done.wait(FLUSH_SECONDS)
        self._raise()

    def close(self) -> None:
        """Close the sink when all rows are written, within the bound; say how many were left out."""
        lost = self.dropped
        try:
            self._queue.put(self._sink.close, timeout=CLOSE_SECONDS)
            self._queue.put(None, timeout=CLOSE_SECONDS)
            self._thread.join(CLOSE_SECONDS)
        except queue.Full:
            pass
        if self._thread.is_alive():
            lost += self._queue.qsize()
        if lost:
            warnings.warn(
                f"{self._name} is slower than training: {lost} rows of the log were left out",
                DroppedRowsWarning,
                stacklevel=2,
            )
        self._raise()
