"""Learning curves as panels: which metrics share one, what is beside each other, and where the epochs are.

Owns the choice; `plots` draws panels with matplotlib, `views` as inline SVG. Reads columns of a log, and nothing else.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from purestep.errors import ConfigError, explain
from purestep.views import Block, Curves, Line, Mark, Panel

Columns = Mapping[str, Sequence[Any]]
_AXES = ("step", "epoch")  # columns that say when, and are no metrics
_PER_EPOCH = "_epoch"  # how the means over an epoch end, which `callbacks.log` writes
_SPARSE = 40  # points of a curve that are few enough to be marked
_MOST_EPOCHS = 6  # numbers on the second axis
_POWERS = 300  # between the smallest and the largest loss, from where on the axis is logarithmic


def family(name: str) -> str:
    """Return the metric that a column is of, whatever it was measured on.

    Examples:
        >>> [family(name) for name in ("loss", "train/loss", "train/loss_epoch", "val/loss")]
        ['loss', 'loss', 'loss', 'loss']
    """
    return name.rpartition("/")[2].removesuffix(_PER_EPOCH)


def metrics_of(columns: Columns) -> list[str]:
    """Return the columns that are metrics: all but the step and the epoch."""
    return [name for name in columns if name not in _AXES]


def panels(columns: Columns, keys: Sequence[str] | None = None) -> tuple[Panel, ...]:
    """Return a panel for each metric of a run, with what it was measured on (train, val) in the same panel.

    Where a log has means over an epoch, those over a few steps are drawn pale behind them.

    Args:
        columns: of a log: "step", and a list for each metric with None where it was not logged.
        keys: the columns to draw, in this order; by default all metrics.

    Raises:
        ConfigError: a key is not among the columns, or no column has a value.

    Examples:
        >>> columns = {"step": [1, 2], "epoch": [0.0, 1.0], "loss": [0.5, None], "val/loss": [None, 0.4]}
        >>> [(panel.title, [line.name for line in panel.lines]) for panel in panels(columns)]
        [('loss', ['loss', 'val/loss'])]
    """
    names = _chosen(columns, keys)
    points = {name: found for name in names if (found := _points(columns, name))}
    groups = _grouped(points)
    if not groups:
        what = "there is nothing to draw yet"
        raise ConfigError(explain(what, where=f"columns: {', '.join(columns)}", why="no row has a value"))
    colours = _colours(groups)
    made = []
    for title, members in groups.items():
        lines = [
            Line(name, points[name], colours[name], faint=_behind(name, members), markers=_few(name, members, points))
            for name in members
        ]
        made.append(_panel(title, lines))
    limits = _limits(made)
    epochs = _epochs(columns, limits)
    return tuple(_on(panel, limits, epochs) for panel in made)


def shown(columns: Columns) -> list[Block]:
    """Return the curves of a log as a block; none where there is nothing to draw."""
    if not any(value is not None for name in metrics_of(columns) for value in columns[name]):
        return []
    return [Curves(panels(columns))]


def beside(
    runs: Iterable[tuple[str, Columns]],
    keys: Sequence[str] | None = None,
    mark: Mark | None = None,
    *,
    together: bool = True,
) -> tuple[Panel, ...]:
    """Return panels with the curves of several runs over each other: a colour for each run.

    Where a panel has curves of training and of held-out data, the latter are dashed.

    Args:
        runs: the name and the columns of each.
        keys: the columns to draw; by default all metrics that more than one of the runs have, or all of one run.
        mark: a place of the axis to mark.
        together: training and held-out data in one panel; False for a panel for each key.

    Raises:
        ConfigError: no run has a key, or no column has a value.
    """
    named = list(runs)
    counts: dict[str, int] = {}
    for _, columns in named:
        for name in metrics_of(columns):
            counts[name] = counts.get(name, 0) + 1
    missing = next((key for key in keys or () if key not in counts), None)
    if missing is not None:
        where = f"metrics: {', '.join(counts) or 'none'}"
        raise ConfigError(explain(f"no run has logged {missing!r}", where=where))
    least = min(2, len(named))
    chosen = [name for name in counts if counts[name] >= least] if keys is None else keys
    groups = _grouped(chosen) if together else {name: [name] for name in chosen}
    made = []
    for title, members in groups.items():
        lines = [line for number, run in enumerate(named) for line in _of_run(number, run, members)]
        if lines:
            made.append(_panel(members[0] if len(members) == 1 else title, lines))
    if not made:
        what = "there is nothing to draw over each other"
        raise ConfigError(explain(what, where=f"runs: {', '.join(name for name, _ in named) or 'none'}"))
    limits = _limits(made)
    epochs = _epochs(named[0][1], limits) if len({tuple(c.get("epoch", ())) for _, c in named}) == 1 else ()
    return tuple(_on(panel, limits, epochs, mark) for panel in made)


def _of_run(number: int, run: tuple[str, Columns], members: Sequence[str]) -> list[Line]:
    name, columns = run
    points = {member: found for member in members if member in columns and (found := _points(columns, member))}
    held_out = {member for member in members if _measured_on(member) != _measured_on(members[0])}
    return [
        Line(
            name if len(members) == 1 else f"{name} {member}",
            found,
            number,
            dashed=member in held_out,
            faint=_behind(member, members),
            markers=_few(member, members, points),
        )
        for member, found in points.items()
    ]


def _chosen(columns: Columns, keys: Sequence[str] | None) -> Sequence[str]:
    missing = [key for key in keys or [] if key not in columns or key == "step"]
    if "step" not in columns or missing:
        what = f"there is no column {(missing or ['step'])[0]!r} to draw"
        raise ConfigError(explain(what, where=f"columns: {', '.join(columns) or 'none'}"))
    return metrics_of(columns) if keys is None else keys


def _points(columns: Columns, name: str) -> list[tuple[float, float]]:
    pairs = zip(columns["step"], columns[name], strict=True)
    return [(step, value) for step, value in pairs if step is not None and value is not None]


def _grouped(names: Iterable[str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {}
    for name in names:
        groups.setdefault(family(name), []).append(name)
    return groups


def _behind(name: str, members: Sequence[str]) -> bool:
    return f"{name}{_PER_EPOCH}" in members


def _few(name: str, members: Sequence[str], points: Mapping[str, Sequence[Any]]) -> bool:
    """Whether the points of a curve are marked: those of a sparse one, so that one sees where it was measured."""
    if _behind(name, members):
        return False
    longest = max(len(points.get(member, ())) for member in members)
    own = len(points[name])
    return own <= _SPARSE and (own < longest or longest <= 15)


def _measured_on(name: str) -> str:
    return name.rpartition("/")[0]


def _colours(groups: Mapping[str, Sequence[str]]) -> dict[str, int]:
    """The colour of each name: one for each prefix (train, val), the same in every panel; none counts as train."""
    both = any({"", "train"} <= {_measured_on(name) for name in members} for members in groups.values())
    where = {name: _measured_on(name) or ("" if both else "train") for members in groups.values() for name in members}
    prefixes = sorted(dict.fromkeys(where.values()), key=lambda prefix: prefix != "train")
    return {name: prefixes.index(prefix) for name, prefix in where.items()}


def _panel(title: str, lines: Sequence[Line]) -> Panel:
    return Panel(title, tuple(sorted(lines, key=lambda line: not line.faint)), log=_wide_range(title, lines))


def _on(
    panel: Panel, limits: tuple[float, float], epochs: tuple[tuple[float, str], ...], mark: Mark | None = None
) -> Panel:
    return Panel(panel.title, panel.lines, panel.log, limits, epochs=epochs, mark=mark)


def _wide_range(title: str, lines: Iterable[Line]) -> bool:
    """Whether losses, all positive, span so many powers of ten that a linear axis would hide the small ones."""
    values = [value for line in lines for value in line.values]
    return "loss" in title and bool(values) and min(values) > 0 and max(values) / min(values) > _POWERS


def _limits(made: Iterable[Panel]) -> tuple[float, float]:
    """One range of steps for all panels, so that they can be compared."""
    steps = [step for panel in made for line in panel.lines for step, _ in line.points]
    margin = 0.03 * (max(steps) - min(steps)) or 1.0
    return min(steps) - margin, max(steps) + margin


def _epochs(columns: Columns, limits: tuple[float, float]) -> tuple[tuple[float, str], ...]:
    """Where some of the epochs end, from the column "epoch": the number of those completed at each row."""
    ends: dict[int, float] = {}
    for step, epoch in zip(columns["step"], columns.get("epoch", ()), strict=False):
        if epoch is not None and math.isfinite(epoch) and epoch >= 1:
            ends.setdefault(int(epoch), step)
    inside = {epoch: step for epoch, step in ends.items() if limits[0] <= step <= limits[1]}
    if not inside:
        return ()
    every = next(
        n for power in range(12) for size in (1, 2, 5) if max(inside) / (n := size * 10**power) <= _MOST_EPOCHS
    )
    return tuple((step, str(epoch)) for epoch, step in inside.items() if epoch % every == 0)
