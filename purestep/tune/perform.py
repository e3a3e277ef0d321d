"""`perform`: the members of a sweep that are not done are trained, in rungs where there is halving.

What trains them is handed in: runs in turn, runs together, or worker processes of the command.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Literal

from purestep.errors import ConfigError
from purestep.loop.cadence import Until
from purestep.record.summary import Summary
from purestep.tune.grid import Member
from purestep.tune.halving import Halving, Ledger
from purestep.tune.table import INTERRUPTED, Row, Sweep, ended, is_done, no_metric, summary_of

# Trains runs until an end (None: that of their experiment) and returns an exit code, 130 or 143 for a signal.
# It is given the runs that are not done, and all runs of the rung.
TrainAll = Callable[[Sequence[Member], Sequence[Member], Until | None], int]


def perform(
    members: Sequence[Member],
    root: Path,
    train_all: TrainAll,
    *,
    end: Until | None = None,
    halving: Halving | None = None,
    metric: str | None = None,
    mode: Literal["min", "max"] = "min",
) -> tuple[Sweep, int]:
    """Train the members that are not done, in rungs where there is halving.

    Args:
        members: of the sweep.
        root: the directory of all.
        train_all: trains some of them until an end.
        end: of each run; None for where its experiment says.
        halving: which go on; None for all.
        metric, mode: by which the best is found.

    Returns:
        The sweep, and the largest exit code of `train_all`.

    Raises:
        ConfigError: `root` holds another sweep with halving, or a run has no value of the metric.
    """
    left: dict[str, str] = {}
    code, alive = 0, list(members)
    ledger = Ledger(root, members, halving) if halving is not None else None
    ends: Sequence[Until | None] = (end,) if halving is None else halving.ends
    for number, until in enumerate(ends):
        kept = None if ledger is None else ledger.kept(number)
        if kept is None:
            todo = [member for member in alive if not is_done(member.run_dir, until)]
            found = train_all(todo, alive, until) if todo else 0
            code = max(code, found)
            if found in INTERRUPTED:
                break
            if halving is not None and ledger is not None and number < len(ends) - 1:
                found_now = {member.name: summary_of(member.run_dir) for member in alive}
                values = {name: _metric_of(row, halving.metric) for name, row in found_now.items()}
                if not any(map(math.isfinite, values.values())):
                    raise ConfigError(no_metric(halving.metric, [row for row in found_now.values() if row]))
                kept = halving.best(values)
                ledger.write(number, values, kept)
        if kept is not None:
            left |= {member.name: str(until) for member in alive if member.name not in kept}
            alive = [member for member in alive if member.name in kept]
    rows = tuple(
        Row(member.values, member.run_dir, summary_of(member.run_dir), left.get(member.name, "")) for member in members
    )
    return Sweep(root, rows, metric, mode, INTERRUPTED.get(code)), code


def _metric_of(row: Summary | None, metric: str) -> float:
    """Return the metric of a run; NaN for one that an error ended, or that has none."""
    return float(row.metrics.get(metric, math.nan)) if row is not None and ended(row) else math.nan
