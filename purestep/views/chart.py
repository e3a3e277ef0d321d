"""Line charts as inline SVG: panels of curves, drawn without a library."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator, Sequence

from purestep.views.markup import LIGHT, escaped

Points = Sequence[tuple[float, float]]
WIDTH, HEIGHT = 380, 200
_LEFT, _RIGHT, _TOP, _BOTTOM = 54, 10, 24, 22
_MOST_POINTS = 300  # points of a drawn line: about one a pixel
_KEYS = 16  # most names below a panel


@dataclasses.dataclass(frozen=True)
class Line:
    """One curve.

    Attributes:
        name: name of the curve.
        points: (x, y), in order of x; a y that is not finite leaves a gap.
        colour: index of its colour.
        dashed: whether the line is dashed.
        faint: whether the line is thin and pale.
        markers: whether the points are marked.
    """

    name: str
    points: Points
    colour: int = 0
    dashed: bool = False
    faint: bool = False
    markers: bool = False

    @property
    def values(self) -> list[float]:
        """The finite values."""
        return [y for _, y in self.points if math.isfinite(y)]


@dataclasses.dataclass(frozen=True)
class Mark:
    """A vertical line at a position of the axis, with a label."""

    x: float
    text: str


@dataclasses.dataclass(frozen=True)
class Panel:
    """Curves that share their axes.

    Attributes:
        title: title of the panel.
        lines: the curves, in drawing order.
        log: whether the y axis is logarithmic; all values must be positive then.
        limits: both ends of the x axis.
        axis: label of the x axis.
        epochs: ticks of the second x axis, above the panel: (step, number of completed epochs); may be empty.
        mark: a vertical line.
    """

    title: str
    lines: tuple[Line, ...]
    log: bool = False
    limits: tuple[float, float] = (0.0, 1.0)
    axis: str = "step"
    epochs: tuple[tuple[float, str], ...] = ()
    mark: Mark | None = None

    @property
    def range(self) -> tuple[float, float] | None:
        """The smallest and the largest finite value; None without any."""
        values = [value for line in self.lines for value in line.values]
        return (min(values), max(values)) if values else None


def figure(panel: Panel) -> str:
    """Return a panel as a figure: its title, the chart, and a legend if there are several curves."""
    keys = "".join(map(_key, panel.lines[:_KEYS])) if len(panel.lines) > 1 or panel.lines[0].name != panel.title else ""
    if len(panel.lines) > _KEYS:
        keys += f'<span class="key faint">and {len(panel.lines) - _KEYS} more</span>'
    caption = f"<figcaption>{escaped(panel.title)}</figcaption>"
    return f'<figure style="width:{WIDTH}px">{caption}{svg(panel)}<div>{keys}</div></figure>'


def svg(panel: Panel) -> str:
    """Return the chart of a panel.

    Examples:
        >>> drawn = svg(Panel("loss", (Line("loss", [(0, 1.0), (10, 0.5)]),), limits=(0, 10)))
        >>> drawn.count("<polyline"), "currentColor" in drawn, "<script" in drawn
        (1, True, False)
    """
    frame = _Frame(panel)
    body = "".join([*_grid(panel, frame), *_epochs(panel, frame), *_mark(panel, frame), *_lines(panel, frame)])
    if panel.range is None:
        body += _text(frame.across(sum(panel.limits) / 2), HEIGHT / 2, "no value is finite", "middle")
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{HEIGHT}" viewBox="0 0 {WIDTH} {HEIGHT}" '
        f'role="img" aria-label="{escaped(panel.title)}" fill="none" font-size="11">{body}</svg>'
    )


class _Frame:
    """The map from values to pixels of a panel."""

    def __init__(self, panel: Panel) -> None:
        self.log = panel.log
        low, high = panel.range or (0.0, 1.0)
        low, high = (math.log10(low), math.log10(high)) if self.log else (low, high)
        pad = 0.04 * (high - low) or abs(low) * 0.12 or 1.1
        self.low, self.high = low - pad, high + pad
        self.start, self.end = panel.limits
        if self.start == self.end:
            self.start, self.end = self.start - 1, self.end + 1

    def across(self, x: float) -> float:
        return round(_LEFT + (x - self.start) / (self.end - self.start) * (WIDTH - _LEFT - _RIGHT), 1)

    def up(self, y: float) -> float:
        height = math.log10(y) if self.log else y
        return round(HEIGHT - _BOTTOM - (height - self.low) / (self.high - self.low) * (HEIGHT - _TOP - _BOTTOM), 1)


def _grid(panel: Panel, frame: _Frame) -> Iterator[str]:
    right, bottom = WIDTH - _RIGHT, HEIGHT - _BOTTOM
    if panel.range is not None:
        for tick in _powers(frame.low, frame.high) if panel.log else ticks(frame.low, frame.high, 7):
            y = frame.up(tick)
            yield f'<path d="M{_LEFT} {y}H{right}" stroke="currentColor" stroke-opacity=".15"/>'
            yield _text(_LEFT - 6, y + 4, written(tick), "end")
    for tick in ticks(frame.start, frame.end, 8):
        x = frame.across(tick)
        yield f'<path d="M{x} {bottom}v4" stroke="currentColor" stroke-opacity=".6"/>'
        yield _text(x, bottom + 16, written(tick), "middle")
    yield f'<path d="M{_LEFT} {bottom}H{right}" stroke="currentColor" stroke-opacity=".6"/>'
    yield _text(_LEFT - 14, bottom + 16, panel.axis, "end", faint=True)


def _epochs(panel: Panel, frame: _Frame) -> Iterator[str]:
    for step, number in panel.epochs:
        x = frame.across(step)
        yield f'<path d="M{x} {_TOP}v-4" stroke="currentColor" stroke-opacity=".6"/>'
        yield _text(x, _TOP - 7, number, "middle")
    if panel.epochs:
        yield f'<path d="M{_LEFT} {_TOP}H{WIDTH - _RIGHT}" stroke="currentColor" stroke-opacity=".3"/>'
        yield _text(_LEFT - 14, _TOP - 7, "epoch", "end", faint=True)


def _mark(panel: Panel, frame: _Frame) -> Iterator[str]:
    if panel.mark is not None:
        x = frame.across(panel.mark.x)
        last = x > WIDTH / 2
        yield f'<path d="M{x} {_TOP}V{HEIGHT - _BOTTOM}" stroke="currentColor" stroke-dasharray="2 3"/>'
        yield _text(x - 4 if last else x + 4, _TOP + 12, panel.mark.text, "end" if last else "start")


def _lines(panel: Panel, frame: _Frame) -> Iterator[str]:
    for line in panel.lines:
        title = f"<title>{escaped(line.name)}</title>"
        for run in _runs(line.points):
            points = " ".join(f"{frame.across(x)},{frame.up(y)}" for x, y in _thinned(run))
            if len(run) > 1:
                yield f'<polyline points="{points}" {_stroke(line)}>{title}</polyline>'
            if line.markers or len(run) == 1:
                paint = _paint("fill", line)
                for x, y in _thinned(run):
                    yield f'<circle cx="{frame.across(x)}" cy="{frame.up(y)}" r="2.4" {paint}>{title}</circle>'


def _runs(points: Points) -> Iterator[list[tuple[float, float]]]:
    """Yield the runs of points between gaps."""
    run: list[tuple[float, float]] = []
    for x, y in points:
        if math.isfinite(y):
            run.append((x, y))
        elif run:
            yield run
            run = []
    if run:
        yield run


def _thinned(points: Points) -> Points:
    """Reduce each group of neighbouring points to its smallest and its largest, so that no spike is lost."""
    if len(points) <= _MOST_POINTS:
        return points
    groups = _MOST_POINTS // 2
    kept: list[tuple[float, float]] = []
    for number in range(groups):
        group = points[number * len(points) // groups : (number + 1) * len(points) // groups]
        ends = {min(range(len(group)), key=lambda i: group[i][1]), max(range(len(group)), key=lambda i: group[i][1])}
        kept += [group[i] for i in sorted(ends)]
    return kept


def _paint(attribute: str, line: Line) -> str:
    # The attribute is for viewers that drop style sheets; the property follows the theme.
    number = line.colour % len(LIGHT)
    return f'{attribute}="{LIGHT[number]}" style="{attribute}:var(--ps{number},{LIGHT[number]})"'


def _stroke(line: Line) -> str:
    more = ' stroke-dasharray="5 3"' if line.dashed else ""
    more += ' stroke-opacity=".45" stroke-width="1"' if line.faint else ' stroke-width="1.7"'
    return f'{_paint("stroke", line)}{more} stroke-linejoin="round"'


def _key(line: Line) -> str:
    marker = f'<circle cx="11" cy="5" r="2.4" {_paint("fill", line)}/>' if line.markers else ""
    sample = f'<svg width="22" height="10" fill="none"><path d="M0 5H22" {_stroke(line)}/>{marker}</svg>'
    return f'<span class="key">{sample} {escaped(line.name)}</span>'


def _text(x: float, y: float, text: str, anchor: str, *, faint: bool = False) -> str:
    opacity = ' fill-opacity=".65"' if faint else ""
    return f'<text x="{x}" y="{y}" text-anchor="{anchor}" fill="currentColor"{opacity}>{escaped(text)}</text>'


# --- numbers on axes --------------------------------------------------------------------------------------------------


def ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers between two limits, at most `most`: multiples of 1, 2 or 5 times a power of ten.

    Examples:
        >>> ticks(0, 1, 6), ticks(37, 412, 5)
        ([0.0, 0.2, 0.4, 0.6, 0.8, 1.0], [100.0, 200.0, 300.0, 400.0])
    """
    if not low < high or not math.isfinite(high - low):
        return [low]
    power = 10.0 ** math.floor(math.log10((high - low) / most))
    step = next(size * power for size in (1, 2, 5, 10, 20) if (high - low) / (size * power) <= most)
    digits = max(0, 1 - math.floor(math.log10(step)))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [round(number * step, digits) for number in range(first, last + 1)]


def _powers(low: float, high: float) -> list[float]:
    """Return ticks of a logarithmic axis: powers of ten, thinned if there are many; other numbers if none fits."""
    first, last = math.ceil(low), math.floor(high)
    if last - first < 1:
        return [tick for tick in ticks(10**low, 10**high, 4) if tick > 0]
    return [10.0**power for power in range(first, last + 1, max(1, math.ceil((last - first) / 5)))]


def written(number: float) -> str:
    """Return the short text of a number on an axis.

    Examples:
        >>> [written(number) for number in (0.0, 0.25, 1500.0, 2e6, 1e-5)]
        ['0', '0.25', '1,500', '2M', '1e-05']
    """
    if abs(number) >= 1e6 and number % 1e5 == 0 and abs(number) < 1e9:
        return f"{number / 1e6:g}M"
    if number == int(number) and abs(number) < 1e6:
        return f"{int(number):,}"
    return f"{number:.4g}"
