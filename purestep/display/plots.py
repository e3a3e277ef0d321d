"""Learning curves with matplotlib: a figure to show or to change, or a picture on disk.

Owns the drawing; `curves` chooses the panels. It draws on matplotlib's Agg canvas, so it needs no display and does not
change pyplot's state. An extra: matplotlib is imported by the first drawing.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from purestep import _cells
from purestep.arguments import Location, checked
from purestep.display.curves import panels
from purestep.errors import ConfigError, explain, import_extra
from purestep.loggers import read_csv
from purestep.views import LIGHT, Panel

if TYPE_CHECKING:
    from matplotlib.figure import Figure

PANEL_INCHES = (4.6, 3.2)
_KEYS = 8  # names in a legend inside of a panel
_MOST_KEYS = 24  # beside the panels


@checked(ConfigError, failed=True)
def learning_curves(
    source: Location | Mapping[str, Sequence[Any]],
    out_png: Location,
    *,
    keys: Sequence[str] | None = None,
    title: str | None = None,
) -> Path:
    """Draw the metrics of a run against `step` into a PNG; `plot` says how, and returns the figure.

    Args:
        source: a `metrics.csv`, a run directory, or columns as `loggers.read_csv` returns them, with `step`.
        out_png: path of the picture; missing directories are made.
        keys: the names to draw, in this order; by default all.
        title: of the picture; none by default.

    Returns:
        The path of the picture.

    Raises:
        ConfigError: a key is not in the source, there is nothing to draw, or the path does not end with .png.
        MissingExtra: matplotlib is not installed (`pip install "purestep[plots]"`).

    Examples:
        >>> import tempfile
        >>> columns = {"step": [1, 2, 3], "loss": [0.9, 0.5, 0.3], "val/loss": [None, None, 0.4]}
        >>> learning_curves(columns, Path(tempfile.mkdtemp()) / "curves.png").name
        'curves.png'
    """
    path = _cells.located(out_png)
    if path.suffix.lower() != ".png":
        what, instead = "learning_curves draws a PNG", 'ps.display.plot(source).savefig("curves.svg")'
        raise ConfigError(explain(what, where=f"out_png={str(out_png)!r}", instead=instead))
    figure = plot(source, keys=keys, title=title)
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    try:
        figure.savefig(partial, dpi=130, format="png", metadata={"Software": None})
        partial.replace(path)
    finally:
        partial.unlink(missing_ok=True)
    return path


@checked(ConfigError, failed=True)
def plot(
    source: Location | Mapping[str, Sequence[Any]], *, keys: Sequence[str] | None = None, title: str | None = None
) -> Figure:
    """Draw the metrics of a run against `step`: a panel for each metric, training and held-out data together.

    `loss`, `train/loss`, `train/loss_epoch` and `val/loss` share a panel. Epochs are on a second axis. A sparse series
    (an evaluation an epoch) is drawn with markers; values that are not finite leave a gap. A loss that spans more than
    a factor of 300 has a logarithmic axis.

    Args:
        source: a `metrics.csv`, a run directory, or columns as `loggers.read_csv` returns them, with `step`.
        keys: the names to draw, in this order; by default all.
        title: of the picture; none by default.

    Returns:
        A `matplotlib.figure.Figure`, which a notebook shows; `figure.savefig("curves.svg")` writes it, `figure.axes`
        are the panels, to change them.

    Raises:
        ConfigError: a key is not in the source, or there is nothing to draw.
        MissingExtra: matplotlib is not installed (`pip install "purestep[plots]"`).

    Examples:
        >>> figure = plot({"step": [1, 2], "loss": [0.9, 0.5], "val/loss": [None, 0.6], "val/accuracy": [None, 0.4]})
        >>> [axes.get_title() for axes in figure.axes]
        ['loss', 'accuracy']
    """
    if title is not None and not isinstance(title, str):
        raise ConfigError(explain("title= is a string, or None", where=f"{title=}"))
    return draw(panels(source if isinstance(source, Mapping) else read_csv(source), keys), title=title)


def draw(made: Sequence[Panel], *, title: str | None = None) -> Figure:
    """Draw panels of curves.

    Raises:
        MissingExtra: matplotlib is not installed.
    """
    import_extra("matplotlib.figure", extra="plots", needed_by="plot()")
    from purestep.display.figures import CurvesFigure

    across = min(len(made), 3 if len(made) != 4 else 2)
    down = math.ceil(len(made) / across)
    figure = CurvesFigure(PANEL_INCHES[0] * across, PANEL_INCHES[1] * down)
    for number, panel in enumerate(made):
        _draw_panel(figure.add_subplot(down, across, number + 1), panel)
    if len(made[0].lines) > _KEYS and all(_names(panel) == _names(made[0]) for panel in made):
        _draw_keys_beside(figure, made[0])
    if title is not None:
        figure.suptitle(title)
    return figure


def _draw_panel(axes: Any, panel: Panel) -> None:
    colours = _colours(panel)
    for line in panel.lines:
        steps, values = zip(*line.points, strict=True)
        axes.plot(
            steps,
            [value if math.isfinite(value) else math.nan for value in values],
            color=colours[line.colour],
            linewidth=1.0 if line.faint else 1.7,
            alpha=0.45 if line.faint else 1.0,
            linestyle=(0, (4, 2)) if line.dashed else "-",
            marker="o" if line.markers else None,
            markersize=3.5,
            label=line.name,
        )
    axes.set_title(panel.title, fontsize=11)
    axes.set_xlabel(panel.axis, fontsize=9)
    axes.tick_params(labelsize=9)
    axes.grid(True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    if panel.log:
        axes.set_yscale("log")
    axes.set_xlim(*panel.limits)
    if panel.epochs:
        _draw_epochs(axes, panel)
    if panel.mark is not None:
        _draw_mark(axes, panel)
    if len(panel.lines) <= _KEYS and (len(panel.lines) > 1 or panel.lines[0].name != panel.title):
        axes.legend(fontsize=8, frameon=True, framealpha=0.75, edgecolor="none")


def _draw_epochs(axes: Any, panel: Panel) -> None:
    places, numbers = zip(*panel.epochs, strict=True)
    above = axes.secondary_xaxis("top")
    above.set_xticks(places, numbers)
    above.tick_params(labelsize=8, length=3, colors="#777777")
    above.spines["top"].set_color("#bbbbbb")
    above.set_xlabel("epoch", fontsize=8, color="#777777", loc="left", labelpad=2)


def _draw_mark(axes: Any, panel: Panel) -> None:
    if panel.mark is None:
        return
    axes.axvline(panel.mark.x, color="#333333", linewidth=1.0, linestyle=(0, (2, 2)), zorder=1.5)
    last = panel.mark.x > sum(panel.limits) / 2
    axes.annotate(
        panel.mark.text,
        (panel.mark.x, 1.0),
        xycoords=("data", "axes fraction"),
        xytext=(-4 if last else 4, -3),
        textcoords="offset points",
        ha="right" if last else "left",
        va="top",
        fontsize=8,
    )


def _names(panel: Panel) -> list[str]:
    return [line.name for line in panel.lines]


def _draw_keys_beside(figure: Any, panel: Panel) -> None:
    """One legend for all panels, right of them, where many curves would lie under it."""
    handles, names = figure.axes[0].get_legend_handles_labels()
    more = len(names) - _MOST_KEYS
    legend = figure.legend(
        handles[:_MOST_KEYS], names[:_MOST_KEYS], loc="outside right upper", fontsize=8, frameon=False
    )
    if more > 0:
        legend.set_title(f"{len(names)}, the first {_MOST_KEYS}:", {"size": 8})


def _colours(panel: Panel) -> Sequence[Any]:
    """The colours by number; of many runs shades in their order, so that a sorted table of runs can be read."""
    count = 1 + max(line.colour for line in panel.lines)
    if count <= len(LIGHT):
        return LIGHT
    import matplotlib

    shades = matplotlib.colormaps["viridis"]
    return [shades(0.9 * number / (count - 1)) for number in range(count)]
