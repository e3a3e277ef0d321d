"""`progress`: a live bar on a terminal, silence anywhere else."""

from __future__ import annotations

import dataclasses
import sys
from pathlib import Path

from purestep import metrics
from purestep.arguments import Count, Name, NonNegative, checked
from purestep.callbacks.base import Reducer
from purestep.display.progress import ProgressSink
from purestep.errors import ConfigError
from purestep.loop.cadence import EverySeconds
from purestep.loop.events import Event, Horizon, LoopState, StepsDone, Stopped, View
from purestep.loop.roles import Observer


@dataclasses.dataclass(frozen=True)
class Progress(Reducer, Observer):
    """See `progress`."""

    epochs: int | None
    refresh: float
    name: str

    def identity(self) -> None:
        """Return None: it only shows the run."""

    def horizon(self, view: View) -> Horizon:
        return EverySeconds(self.refresh).horizon(view) if _visible() else Horizon()

    def open_sink(self, run_dir: Path | None, length: int | None) -> _Bar:
        return _Bar(self.epochs, length)


def _visible() -> bool:
    try:
        return sys.stderr.isatty() or sys.stdout.isatty()
    except (AttributeError, ValueError):
        return False


class _Bar:
    """Shows the loop on a ProgressSink."""

    def __init__(self, epochs: int | None, length: int | None) -> None:
        self._sink = ProgressSink()
        self._epochs = epochs
        self._length = length
        self._last = (0, 0.0)

    def receive(self, event: Event, loop: LoopState) -> None:
        if isinstance(event, StepsDone):
            cursor = loop.cursor
            if event.epoch_end:
                self._length = cursor.batch
            batches, seconds = cursor.batches - self._last[0], loop.elapsed - self._last[1]
            rate = batches / seconds if seconds > 0 and batches > 0 else None
            self._last = (cursor.batches, loop.elapsed)
            row = loop.status.metrics
            # What is measured comes first; what is set, like the learning rate, after it; epoch means are for the log.
            measured = [n for n in row if "/" in n and not n.endswith("_epoch")]
            shown = {n: row[n] for n in [*measured, *(n for n in row if "/" not in n)]}
            if not shown and event.metrics:
                shown = metrics.compute(event.metrics[-1], prefix="train/")
            self._sink.update(
                epoch=cursor.epoch,
                epochs=self._epochs,
                batch=cursor.batch,
                length=self._length,
                metrics=shown,
                rate=rate,
            )
        elif isinstance(event, Stopped):
            self._sink.close()

    def close(self) -> None:
        self._sink.close()


@checked(ConfigError)
def progress(*, epochs: Count | None = None, refresh: NonNegative[float] = 0.25, name: Name = "progress") -> Progress:
    """Show a live progress bar on a terminal. Added by `fit` when absent; quiet when the output is not a terminal.

    Args:
        epochs: number of epochs to show; known to `fit` when the run ends by epochs.
        refresh: seconds between two updates.
        name: of the callback.
    """
    return Progress(epochs, refresh, name)
