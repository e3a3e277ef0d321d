"""The live cell: one output of a notebook that shows the progress of a run and its curves.

Owns the content of the output, the times of its updates, and the number of points kept. Each update replaces HTML with
inline SVG, without widgets or scripts. The stored notebook keeps the last update, without times, so that runs with the
same bits have the same output.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from purestep.display import curves
from purestep.display.frame import Frame
from purestep.views import Curves, escaped, page

REFRESH_SECONDS = 0.25  # shortest time between two updates
SHARE = 100  # the pause after an update, in durations of that update: updates take at most 1 % of the time
MOST_PANELS = 6
_MOST_POINTS = 1_200  # of a metric, before neighbours are merged

Points = list[tuple[float, float]]


class History:
    """The metrics of a run so far, in a bounded number of points.

    When a metric has more points, each group of four neighbours is reduced to its smallest and its largest, so that no
    spike is lost. The choice depends on the rows alone.

    Examples:
        >>> history = History()
        >>> history.add(1, {"train/loss": 0.5})
        >>> history.add(2, {"train/loss": 0.4, "val/loss": 0.6})
        >>> history.columns()
        {'step': [1, 2], 'train/loss': [0.5, 0.4], 'val/loss': [None, 0.6]}
    """

    def __init__(self) -> None:
        self._points: dict[str, Points] = {}

    def add(self, step: int, row: Mapping[str, float]) -> None:
        """Add a row of the log."""
        for name, value in row.items():
            points = self._points.setdefault(name, [])
            points.append((step, value))
            if len(points) > _MOST_POINTS:
                self._points[name] = _merged(points)

    def columns(self) -> dict[str, list[Any]]:
        """Return the columns of a log: "step", and each metric with None where it has no point."""
        tables = {name: dict(points) for name, points in self._points.items()}
        steps = sorted(set().union(*tables.values()))
        return {"step": steps, **{name: [table.get(step) for step in steps] for name, table in tables.items()}}


def _merged(points: Points) -> Points:
    kept: Points = []
    for start in range(0, len(points), 4):
        group = points[start : start + 4]
        ends = {min(range(len(group)), key=lambda i: group[i][1]), max(range(len(group)), key=lambda i: group[i][1])}
        kept += [group[i] for i in sorted(ends)]
    return kept


class LiveCell:
    """One output of a cell, replaced at each update.

    Args:
        display: `IPython.display.display`.
    """

    draws_ends_of_epochs = False  # of short epochs there may be thousands a second

    def __init__(self, display: Callable[..., Any]) -> None:
        self._display = display
        self._handle: Any = None
        self._history = History()
        self.pause = REFRESH_SECONDS

    def log(self, step: int, row: Mapping[str, float]) -> None:
        self._history.add(step, row)

    def draw(self, frame: Frame) -> None:
        start = time.perf_counter()
        texts = (frame.title, frame.position, frame.rate, frame.run_left or frame.left, frame.text)
        self._show(frame, "  ".join(text for text in texts if text), frame.place)
        self.pause = max(REFRESH_SECONDS, SHARE * (time.perf_counter() - start))

    def finish(self, frame: Frame, ending: str) -> None:
        """Show how the run ended."""
        texts = (frame.title, f"{frame.batches:,} {'batch' if frame.batches == 1 else 'batches'}", frame.text)
        self._show(frame, "  ".join(text for text in texts if text), ending)

    def _show(self, frame: Frame, text: str, below: str) -> None:
        value, most = (frame.batches, frame.total) if frame.total else (frame.batch, frame.length)
        limits = f' value="{min(value, most)}" max="{most}"' if most else ""
        bar = f'<progress{limits} style="width:16em;vertical-align:middle"></progress>'
        parts = [f'<div>{bar} <span style="white-space:pre-wrap">{escaped(text)}</span></div>']
        parts += [f'<div class="faint">{escaped(line)}</div>' for line in below.splitlines()]
        plain = "\n".join(line for line in (text, below) if line)
        bundle = {"text/plain": plain, "text/html": page("".join(parts) + self._curves())}
        if self._handle is None:
            self._handle = self._display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def _curves(self) -> str:
        blocks = curves.shown(self._history.columns())
        return "".join(Curves(block.panels[:MOST_PANELS]).html() for block in blocks if isinstance(block, Curves))

    def print(self, text: str) -> None:
        self._display({"text/plain": text}, raw=True)

    def close(self) -> None:
        """Nothing to do: the last frame stays in the output."""
