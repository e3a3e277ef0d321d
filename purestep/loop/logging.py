"""Where a run shows itself: loggers for rows, sinks for events. Nothing that goes wrong here ends a run."""

from __future__ import annotations

import contextlib
import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Self, TypeVar

from purestep import loggers
from purestep.loggers.base import Media
from purestep.loop.events import Callback, Event, LoopState
from purestep.loop.log_queue import CLOSE_SECONDS, FLUSH_SECONDS, Backlog
from purestep.loop.resume import applied_steps
from purestep.loop.roles import EventSink, Observer, Row, RowSink

Sink = TypeVar("Sink", Backlog, EventSink)
_MOMENT = 0.1  # seconds: what a logger that is not behind needs to close, even where no time is left


class Outlets:
    """The loggers and event sinks of a run. One that raises is reported once and then left out.

    Of several processes only one speaks; the others are `silent` and open nothing. `hurry` tells how many seconds are
    left to wait for loggers, besides their own bounds.
    """

    def __init__(
        self,
        configs: Sequence[loggers.Logger] | None,
        run_dir: Path | None,
        *,
        silent: bool = False,
        hurry: Callable[[], float] = lambda: math.inf,
    ) -> None:
        self._silent, self._hurry = silent, hurry
        if configs is None:
            configs = () if run_dir is None else (loggers.csv(),)
        self._configs, self._run_dir = tuple(configs), run_dir
        self._logs: dict[str, Backlog] = {}
        self._sinks: dict[str, EventSink] = {}

    def open(
        self,
        callbacks: Sequence[Callback],
        loop: LoopState,
        length: int | None,
        *,
        resumed: bool,
        settings: Mapping[str, Any] | None = None,
    ) -> None:
        """Open everything; rows beyond the step that a resumed run begins at are taken back by the loggers.

        They are given the settings of the run as its hyperparameters.
        """
        if self._silent:
            return
        step = applied_steps(loop) if resumed else None
        for config in self._configs:
            sink = config.open(self._run_dir or Path.cwd(), resume_step=step)
            self._logs[repr(config)] = Backlog(sink, repr(config))
        for callback in callbacks:
            if isinstance(callback, Observer):
                self._sinks[callback.name] = callback.open_sink(self._run_dir, length)
        if settings:
            self._each(self._logs, lambda sink: sink.hparams(settings))

    def log(self, step: int, row: Row) -> None:
        """Write a row to every logger."""
        if self._logs:
            self._each(self._logs, lambda sink: sink.log(step, row))
        numbers = {name: value for name, value in row.items() if not isinstance(value, Media)}
        if numbers:
            self._each(self._sinks, lambda sink: sink.log(step, numbers) if isinstance(sink, RowSink) else None)

    def flush(self) -> None:
        """Put all rows on the disk, so that a snapshot taken now never knows of rows that a power cut could lose.

        In a hurry most of the time is left to the snapshot itself.
        """
        self._each(self._logs, lambda sink: sink.flush(min(FLUSH_SECONDS, self._hurry() / 4)))

    def event(self, event: Event, loop: LoopState) -> None:
        """Show an event to every sink, and write the rows that they return."""
        rows: list[Row] = []
        if self._sinks:
            self._each(self._sinks, lambda sink: rows.append(sink.receive(event, loop) or {}))
        for row in filter(None, rows):
            number = any(not isinstance(value, Media) for value in row.values())
            self.log(applied_steps(loop), {"epoch": loop.cursor.epoch, **row} if number else row)

    def _each(self, sinks: dict[str, Sink], call: Callable[[Sink], None], *, closing: bool = False) -> None:
        for name, sink in list(sinks.items()):
            try:
                call(sink)
            except Exception as error:
                del sinks[name]
                if not closing:
                    with contextlib.suppress(Exception):
                        sink.close()  # it holds a file or a connection, and the run will not use it again
                warnings.warn(
                    f"{name} raised {type(error).__name__}: {error}\n  it is left out from here on; training goes on",
                    stacklevel=2,
                )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self._each(self._logs, lambda sink: sink.close(min(CLOSE_SECONDS, max(_MOMENT, self._hurry()))), closing=True)
        self._each(self._sinks, lambda sink: sink.close(), closing=True)
