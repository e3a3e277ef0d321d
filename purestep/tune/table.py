"""`Sweep`: the runs of a sweep as a table, read from their run directories; which are done, and which is the best."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from purestep.arguments import Name
from purestep.errors import ConfigError, explain
from purestep.loop.cadence import Until
from purestep.record.summary import Summary, is_run, summarize
from purestep.record.table import Runs
from purestep.views import Block, Note, Printed, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INTERRUPTED = {130: "SIGINT", 143: "SIGTERM"}
_ERROR = re.compile(r"[A-Za-z_.]*(Error|Exception|Interrupt|Exit)\b")


@dataclasses.dataclass(frozen=True)
class Row:
    """A run of a sweep.

    Attributes:
        values: of the settings in which the runs differ, as text.
        run_dir: of the run.
        summary: what the directory says, None for a run that has not been started.
        left_at: the end at which it was left behind by better ones, "" for one that was not.
        how: it trains: "vmapped", or "in turn: " and why; "" where the sweep did not ask.
    """

    values: Mapping[str, str]
    run_dir: Path
    summary: Summary | None
    left_at: str = ""
    how: str = ""

    @property
    def why(self) -> str:
        """Why it ended, or that it was not started."""
        if self.left_at:
            return f"left at {self.left_at}"
        return "not started" if self.summary is None else self.summary.why


@dataclasses.dataclass(frozen=True, repr=False)
class Sweep(Printed):
    """The runs of a sweep. It prints as a table. Made by `sweep`.

    Attributes:
        root: the directory with the run directories.
        rows: a `Row` for each combination, in order.
        metric: by which runs are compared, None for none.
        mode: whether "min" or "max" of it is better.
        interrupted: the signal that ended the sweep, None for one that is complete.
    """

    root: Path
    rows: tuple[Row, ...]
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    interrupted: str | None = None

    @property
    def done(self) -> bool:
        """Whether each run that was not left behind reached its end."""
        return all(row.left_at or ended(row.summary) for row in self.rows)

    @property
    def best(self) -> Summary:
        """The run with the best metric among those that were not left behind.

        Raises:
            ConfigError: the sweep has no metric, or no run has a finite value of it.
        """
        if self.metric is None:
            raise ConfigError(
                explain("nothing says which run is the best", instead='ps.tune.sweep(..., metric="val/loss")')
            )
        found = [row.summary for row in self.rows if row.summary is not None and not row.left_at]
        finite = [one for one in found if math.isfinite(one.metrics.get(self.metric, math.nan))]
        if not finite:
            raise ConfigError(no_metric(self.metric, found))
        sign = 1 if self.mode == "min" else -1
        return min(finite, key=lambda one: sign * one.metrics[str(self.metric)])

    @property
    def runs(self) -> Runs:
        """The runs that were started, as the table of `ps.runs`: it sorts and filters."""
        return Runs(tuple(row.summary for row in self.rows if row.summary is not None))

    def plot(self, *keys: Name, title: str | None = None) -> Figure:
        """Draw metrics of all runs over each other, as `ps.runs(root).plot` does.

        Args:
            *keys: names of metrics; by default the metric of the sweep, or those that several of the runs have logged.
            title: of the picture; none by default.

        Raises:
            ConfigError: no run has logged a key, or there is nothing to draw.
            MissingExtra: matplotlib is not installed.
        """
        chosen = keys or (() if self.metric is None else (self.metric,))
        return self.runs.plot(*chosen, title=title)

    def columns(self) -> tuple[list[str], list[list[object]]]:
        """Return the names of the columns, and a row of values for each run."""
        metrics = list(dict.fromkeys(name for row in self.rows if row.summary for name in row.summary.metrics))
        told = any(row.how for row in self.rows)
        how = ["how it trains"] if told else []
        head = [*(self.rows[0].values if self.rows else ()), *how, "why it ended", "batches", *metrics, "digest"]
        body: list[list[object]] = []
        for row in self.rows:
            cells: list[object] = [*row.values.values(), *([row.how] if told else []), row.why]
            if row.summary is None:
                cells += [None] * (len(metrics) + 2)
            else:
                cells += [row.summary.batches, *map(row.summary.metrics.get, metrics), row.summary.digest[:8]]
            body.append(cells)
        return head, body

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        notes = [] if self.interrupted is None else [Note(f"{self.interrupted}: the same call continues the sweep")]
        finite = [row for row in self.rows if row.summary and not row.left_at and self.metric in row.summary.metrics]
        if self.metric is not None and finite and not self.interrupted:
            best = self.best
            notes.append(Note(f"best {self.metric}: {best.metrics[self.metric]:.4g}, {best.name}"))
        return [Table(*self.columns()), *notes]


def no_metric(metric: str, found: Sequence[Summary]) -> str:
    """Say that no run has a finite value of a metric, and which metrics there are."""
    names = list(dict.fromkeys(name for one in found for name in one.metrics))
    return explain(
        f"no run has a finite {metric!r}",
        where=f"metrics: {', '.join(names) or 'none'}",
        instead=f"metric={names[0]!r}" if names else None,
    )


def is_done(run_dir: Path, end: Until | None = None) -> bool:
    """Tell whether a run reached its end: it was neither interrupted, nor ended by an error.

    Args:
        run_dir: of the run.
        end: where it is to end; None for wherever its experiment says. A run that ended for a reason of its own, such
            as early stopping, is done.
    """
    return ended(summary_of(run_dir), end)


def summary_of(run_dir: Path) -> Summary | None:
    """Return what a run directory says, None for a run that has not been started."""
    return summarize(run_dir, run_dir.name) if is_run(run_dir) else None


def ended(row: Summary | None, end: Until | None = None) -> bool:
    """Tell the same of what a run directory says."""
    if row is None or row.damage or row.why in ("not finished", "not started", *INTERRUPTED.values()):
        return False
    if _ERROR.match(row.why):
        return False
    return end is None or row.why == f"reached {end}" or not row.why.startswith("reached ")
