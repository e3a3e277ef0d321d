"""`progress`: a live bar on a terminal, a live cell in a notebook, silence anywhere else."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path

from purestep import _cells, metrics
from purestep.arguments import Count, Name, NonNegative, checked
from purestep.callbacks.base import Reducer
from purestep.display.progress import ProgressSink, Where, shown_in
from purestep.errors import ConfigError
from purestep.loggers import read_csv
from purestep.loop.cadence import EverySeconds
from purestep.loop.events import (
    Event,
    Failed,
    Horizon,
    Interrupted,
    LoopState,
    Resumed,
    Saved,
    SaveLost,
    StepsDone,
    Stopped,
    View,
)
from purestep.loop.resume import applied_steps
from purestep.loop.roles import Observer, RowSink

_LARGEST_LOG = 8 << 20  # bytes of a log that is read for the curves of a resumed run


@dataclasses.dataclass(frozen=True)
class Progress(Reducer, Observer):
    """See `progress`."""

    epochs: int | None
    steps: int | None
    refresh: float
    display: Where
    name: str

    def identity(self) -> None:
        """Return None: it only shows the run."""

    def horizon(self, view: View) -> Horizon:
        return EverySeconds(self.refresh).horizon(view) if self._is_shown() else Horizon()

    def _is_shown(self) -> bool:
        try:
            return shown_in(self.display) != "none"
        except (AttributeError, ValueError):  # a stdout that is closed, or is no stream
            return False

    def open_sink(self, run_dir: Path | None, length: int | None) -> _Bar:
        return _Bar(self, run_dir, length)


class _Bar(RowSink):
    """Shows the loop on a ProgressSink."""

    def __init__(self, progress: Progress, run_dir: Path | None, length: int | None) -> None:
        self._sink = ProgressSink(where=progress.display)
        self._progress, self._run_dir, self._length = progress, run_dir, length
        self._begun: tuple[int, float] | None = None
        self._last = (0, 0.0)
        self._rate: float | None = None
        self._note = ""
        self._shown: Mapping[str, float] = {}
        self._interrupted = self._lost = False

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self._sink.log(step, row)

    def receive(self, event: Event, loop: LoopState) -> None:
        if self._begun is None:
            self._begun = self._last = (loop.cursor.batches, loop.elapsed)
        if isinstance(event, Resumed):
            self._read_log(applied_steps(loop))
        elif isinstance(event, StepsDone):
            self._steps_done(event, loop)
        elif isinstance(event, Interrupted):
            self._interrupted, self._note = True, f"{event.signal}: ends after this step, with a snapshot"
            self._update(loop, now=True)
        elif isinstance(event, Saved | SaveLost):
            self._lost = isinstance(event, SaveLost)
        elif isinstance(event, Stopped | Failed):
            self._note = ""
            self._update(loop)
            self._sink.finish(self._ending(event))

    def _steps_done(self, event: StepsDone, loop: LoopState) -> None:
        cursor = loop.cursor
        if event.epoch_end:
            self._length = cursor.batch
        batches, seconds = cursor.batches - self._last[0], loop.elapsed - self._last[1]
        self._rate = batches / seconds if seconds > 0 and batches > 0 else None
        self._last = (cursor.batches, loop.elapsed)
        if not loop.status.metrics and event.metrics:
            self._shown = metrics.compute(event.metrics[-1], prefix="train/")
        self._update(loop)

    def _update(self, loop: LoopState, *, now: bool = False) -> None:
        cursor, total, row = loop.cursor, self._total(), loop.status.metrics
        if row:
            # What is measured comes first; what is set, like the learning rate, after it; epoch means are for the log.
            measured = [n for n in row if "/" in n and not n.endswith("_epoch")]
            self._shown = {n: row[n] for n in [*measured, *(n for n in row if "/" not in n)]}
        self._sink.update(
            epoch=cursor.epoch,
            epochs=self._progress.epochs,
            batch=cursor.batch,
            length=self._length,
            metrics=self._shown,
            rate=self._rate,
            note=self._note,
            batches=cursor.batches,
            total=total,
            run_left=self._seconds_left(loop, total),
            place="" if self._run_dir is None else str(self._run_dir),
            now=now,
        )

    def _total(self) -> int | None:
        """The batches of the whole run, where they are known."""
        epochs, steps = self._progress.epochs, self._progress.steps
        whole = None if epochs is None or self._length is None else epochs * self._length
        known = [count for count in (whole, steps) if count is not None]
        return min(known, default=None)

    def _seconds_left(self, loop: LoopState, total: int | None) -> float | None:
        """At the mean rate of this process so far, evaluations included."""
        if total is None or self._begun is None or loop.cursor.batches >= total:
            return None
        batches, seconds = loop.cursor.batches - self._begun[0], loop.elapsed - self._begun[1]
        return (total - loop.cursor.batches) * seconds / batches if batches > 0 and seconds > 0 else None

    def _read_log(self, step: int) -> None:
        """Begin the curves with the rows that the run has logged before."""
        path = None if self._run_dir is None else self._run_dir / "metrics.csv"
        if path is None or not path.is_file() or path.stat().st_size > _LARGEST_LOG:
            return
        columns = read_csv(path)
        for number, at in enumerate(columns["step"]):
            if at <= step:
                row = {name: column[number] for name, column in columns.items() if name != "step"}
                self._sink.log(at, {name: value for name, value in row.items() if value is not None})

    def _ending(self, event: Stopped | Failed) -> str:
        place = "" if self._run_dir is None else _cells.shown(self._run_dir)
        if isinstance(event, Failed):
            error = event.error.partition("\n")[0].removesuffix(": ")
            return f"ended by {error}"
        if not self._interrupted:
            return f"{event.reason}{place and f'; {place}'}"
        if self._lost:
            return f"interrupted by {event.reason}; its last snapshot could not be written to {place}"
        saved = f"saved in {place}: run the cell again to go on" if place else "not saved: there is no run_dir="
        return f"interrupted by {event.reason}; {saved}"

    def close(self) -> None:
        self._sink.finish("left before its end")


@checked(ConfigError)
def progress(
    *,
    epochs: Count | None = None,
    steps: Count | None = None,
    refresh: NonNegative[float] = 0.25,
    display: Where = "auto",
    name: Name = "progress",
) -> Progress:
    """Show a run while it trains. Added by `fit` when absent.

    On a terminal it is a live bar. In a notebook it is one output with a bar, the time left and curves that grow; at
    the end of the run they stay in it, without times. Where there is neither, it is quiet.

    Args:
        epochs: number of epochs to show; known to `fit` when the run ends by epochs.
        steps: number of batches of the run; known to `fit` when it ends by them.
        refresh: seconds between two updates.
        display: "terminal", "notebook" or "none", whatever the process looks like; "auto" is what the environment
            variable `PURESTEP_DISPLAY` says, and without it what there is: a Jupyter kernel, a terminal, or neither.
        name: of the callback.
    """
    return Progress(epochs, steps, refresh, display, name)
