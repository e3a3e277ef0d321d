"""Learning curves as a PNG: one panel for each family of metrics, with training and validation in the same panel.

Owns the layout and colours. It draws on matplotlib's Agg canvas, so it needs no display and does not change pyplot's
state. An extra: matplotlib is imported by the first drawing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from purestep import _cells
from purestep.arguments import Location, checked
from purestep.errors import ConfigError, explain, import_extra
from purestep.loggers import read_csv

# The palette of Okabe and Ito: its colours differ for colour-blind readers and in grey print, too.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
PANEL_INCHES = (4.6, 3.2)
Points = list[tuple[float, float]]


@checked(ConfigError, failed=True)
def learning_curves(
    source: Location | Mapping[str, Sequence[Any]],
    out_png: Location,
    *,
    keys: Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """Draw the metrics of a run against `step`.

    The family of a metric is its name after the last slash: `loss`, `train/loss` and `val/loss` share a panel. A sparse
    series (an evaluation an epoch) is drawn with markers; values that are not finite leave a gap.

    Args:
        source: a `metrics.csv`, a run directory, or columns as `loggers.read_csv` returns them, with `step`.
        out_png: path of the picture; missing directories are made.
        keys: the names to draw, in this order; by default all.
        title: of the picture; none by default.

    Returns:
        The path of the picture.

    Raises:
        ConfigError: a key is not in the source, or there is nothing to draw.
        MissingExtra: matplotlib is not installed (`pip install "purestep[plots]"`).

    Examples:
        >>> import tempfile
        >>> columns = {"step": [1, 2, 3], "loss": [0.9, 0.5, 0.3], "val/loss": [None, None, 0.4]}
        >>> learning_curves(columns, Path(tempfile.mkdtemp()) / "curves.png").name
        'curves.png'
    """
    if title is not None and not isinstance(title, str):
        raise ConfigError(explain("title= is a string, or None", where=f"{title=}"))
    columns = source if isinstance(source, Mapping) else read_csv(source)
    panels = families(columns, keys)
    figure_module = import_extra("matplotlib.figure", extra="plots", needed_by="ui.learning_curves")
    agg = import_extra("matplotlib.backends.backend_agg", extra="plots", needed_by="ui.learning_curves")
    colours, limits = _colours(panels), _limits(panels)
    across = min(len(panels), 3 if len(panels) != 4 else 2)
    down = math.ceil(len(panels) / across)
    figure = figure_module.Figure(figsize=(PANEL_INCHES[0] * across, PANEL_INCHES[1] * down), layout="constrained")
    agg.FigureCanvasAgg(figure)
    for index, (family, series) in enumerate(panels.items()):
        axes = figure.add_subplot(down, across, index + 1)
        _draw_panel(axes, family, series, colours)
        axes.set_xlim(*limits)
    if title is not None:
        figure.suptitle(title)
    path = _cells.located(out_png)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, dpi=130, format="png", metadata={"Software": None})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


def families(
    columns: Mapping[str, Sequence[float | None]], keys: Sequence[str] | None = None
) -> dict[str, dict[str, Points]]:
    """Group the columns into panels: by family, then by name, the points (step, value) of the rows with a value.

    Raises:
        ConfigError: a key is not among the columns, or no column has a value.

    Examples:
        >>> families({"step": [1, 2], "loss": [0.5, None], "val/loss": [None, 0.4]})
        {'loss': {'loss': [(1, 0.5)], 'val/loss': [(2, 0.4)]}}
    """
    known = [name for name in columns if name != "step"]
    missing = [key for key in keys or [] if key not in known]
    if "step" not in columns or missing:
        what = f"there is no column {(missing or ['step'])[0]!r} to draw"
        raise ConfigError(explain(what, where=f"columns: {', '.join(columns) or 'none'}"))
    panels: dict[str, dict[str, Points]] = {}
    for name in known if keys is None else keys:
        pairs = zip(columns["step"], columns[name], strict=True)
        points = [(step, value) for step, value in pairs if step is not None and value is not None]
        if points:
            panels.setdefault(name.rsplit("/", 1)[-1], {})[name] = points
    if not panels:
        what = "there is nothing to draw yet"
        raise ConfigError(explain(what, where=f"columns: {', '.join(columns)}", why="no row has a value"))
    return panels


def _draw_panel(axes: Any, family: str, series: Mapping[str, Points], colours: Mapping[str, str]) -> None:
    longest = max(len(points) for points in series.values())
    for name, points in series.items():
        steps, values = zip(*points, strict=True)
        sparse = len(points) <= 40 and (len(points) < longest or longest <= 15)
        finite = [value if math.isfinite(value) else math.nan for value in values]
        axes.plot(
            steps,
            finite,
            color=colours[name],
            linewidth=1.6,
            marker="o" if sparse else None,
            markersize=3.5,
            label=name,
        )
    axes.set_title(family, fontsize=11)
    axes.set_xlabel("step")
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if _wide_range(series):
        axes.set_yscale("log")
    if len(series) > 1 or next(iter(series)) != family:
        axes.legend(fontsize=8, frameon=False)


def _wide_range(series: Mapping[str, Points]) -> bool:
    """Whether losses, all positive, span so many powers of ten that a linear axis would hide the small ones."""
    values = [value for points in series.values() for _, value in points if math.isfinite(value)]
    return bool(values) and min(values) > 0 and max(values) / min(values) > 300 and "loss" in " ".join(series)


def _colours(panels: Mapping[str, Mapping[str, Points]]) -> dict[str, str]:
    """The colour of each name: one for each prefix before the last slash (train, val), the same in every panel."""
    names = [name for series in panels.values() for name in series]
    prefixes = list(dict.fromkeys(name.rpartition("/")[0] for name in names))
    return {name: COLOURS[prefixes.index(name.rpartition("/")[0]) % len(COLOURS)] for name in names}


def _limits(panels: Mapping[str, Mapping[str, Points]]) -> tuple[float, float]:
    """One range of steps for all panels, so that they can be compared."""
    steps = [step for series in panels.values() for points in series.values() for step, _ in points]
    margin = 0.03 * (max(steps) - min(steps)) or 1.0
    return min(steps) - margin, max(steps) + margin
