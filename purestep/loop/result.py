"""What a run leaves behind."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from purestep.display import curves, plots
from purestep.errors import ConfigError, explain
from purestep.loggers import read_csv
from purestep.loop.events import LoopState
from purestep.views import Block, Printed, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_SIGNAL_CODES = {"SIGINT": 130, "SIGTERM": 143}


@dataclasses.dataclass(frozen=True, repr=False)
class Result(Printed):
    """The end of a run.

    Attributes:
        state: the train state.
        metrics: the latest value of everything that was logged or evaluated.
        reason: why the run ended: `reached 5 epochs`, `early stopping: ...`, `SIGTERM`, ...
        run_dir: the run directory, None without one.
        loop: the whole run in one value.
        unsaved: whether its last snapshot was not durable when it ended: it failed, or the grace period was over.
        seconds: where the wall time of this call went, in this process: `"data"` is waiting for batches, `"step"` steps
            and reading their metrics, `"check"` what is checked before the first one, `"evaluate"`, `"transform"`, and
            `"save"` what training waits for of snapshots. On a GPU `"step"` is what the host waits for.
    """

    state: Any
    metrics: Mapping[str, float]
    reason: str
    run_dir: Path | None
    loop: LoopState
    unsaved: bool = False
    seconds: Mapping[str, float] = dataclasses.field(default_factory=dict, compare=False)

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run before its end; running the same script again continues it."""
        return self.reason in _SIGNAL_CODES

    @property
    def exit_code(self) -> int:
        """What a script should exit with: 0, 128 + the number of the signal that ended the run, or 1 when it is
        not saved."""
        return _SIGNAL_CODES.get(self.reason, int(self.unsaved))

    def plot(self, *keys: str, title: str | None = None) -> Figure:
        """Draw what the run logged; see `ps.display.plot`, which says how.

        Args:
            *keys: names of metrics, in this order; all by default.
            title: of the picture; none by default.

        Raises:
            ConfigError: the run kept no log, has logged nothing, or not a key.
            MissingExtra: matplotlib is not installed.
        """
        columns = self._log()
        if columns is None:
            raise ConfigError(
                explain(
                    "this run kept no log to draw",
                    where=f"run_dir={None if self.run_dir is None else str(self.run_dir)!r}",
                    why="curves are drawn from metrics.csv, which loggers.csv() writes into the run directory",
                    instead='result = ps.fit(..., run_dir="runs/digits")\nresult.plot()',
                )
            )
        return plots.plot(columns, keys=keys or None, title=title)

    def _log(self) -> dict[str, list[Any]] | None:
        """Return the log of the run, None where it kept none."""
        try:
            return None if self.run_dir is None else read_csv(self.run_dir)
        except (OSError, ConfigError):
            return None

    def view(self) -> list[Block]:
        """Return the blocks that show it: why it ended, how far it came, its latest metrics, its curves.

        No time is among them (`loop.elapsed` has it): runs of the same bits show the same.
        """
        cursor = self.loop.cursor
        facts: list[list[object]] = [
            ["epochs", cursor.epoch],
            ["batches", cursor.batches],
            *([name, value] for name, value in self.metrics.items()),
        ]
        facts += [] if self.run_dir is None else [["run directory", _from_here(self.run_dir)]]
        facts += [["NOT SAVED", "the last snapshot is not durable"]] if self.unsaved else []
        ended = f"{self.reason}, interrupted" if self.interrupted else self.reason
        return [Table(["result", ended], facts, wide=True), *curves.shown(self._log() or {})]


def _from_here(path: Path) -> str:
    """Return a path as one would type it: relative to the working directory if it is below that."""
    with contextlib.suppress(OSError):  # the working directory was deleted
        if path.is_absolute() and path.is_relative_to(here := Path.cwd()):
            return str(path.relative_to(here))
    return str(path)
