"""The progress bar: one live line on a terminal or in a notebook, and no output elsewhere.

Owns drawing and its errors: a closed or broken stdout ends the bar, never the run. It reads no tensor and does not know
the loop, whose `progress` callback calls it. rich is imported when a bar is first drawn.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Literal, Protocol, get_args

from purestep import _cells
from purestep.display.frame import Frame

if TYPE_CHECKING:
    from rich.console import Console

REFRESH_SECONDS = 0.1
BAR_WIDTH = 24  # characters


Where = Literal["auto", "terminal", "notebook", "none"]
_PLACES = get_args(Where)
VARIABLE = "PURESTEP_DISPLAY"  # of the environment: where to show what is to choose for itself


class Renderer(Protocol):
    """Draws frames on one kind of output. `ProgressSink` chooses one, and catches its errors.

    Attributes:
        pause: seconds between two frames, at least.
        draws_ends_of_epochs: whether the last batch of an epoch is drawn without that pause.
    """

    pause: float
    draws_ends_of_epochs: bool

    def log(self, step: int, row: Mapping[str, float]) -> None: ...
    def draw(self, frame: Frame) -> None: ...
    def finish(self, frame: Frame, ending: str) -> None: ...
    def print(self, text: str) -> None: ...
    def close(self) -> None: ...


class ProgressSink:
    """A progress bar whose errors never reach the run.

    On a terminal it is one live line (output of the program is printed above it), in a notebook one output that is
    replaced, and elsewhere it draws nothing. It redraws at most ten times a second, in `update`: it has no thread.

    Args:
        console: a rich console to draw on; by default one on stdout.
        where: "terminal", "notebook" or "none"; "auto" is what `PURESTEP_DISPLAY` says, and without it what there is.

    Examples:
        >>> bar = ProgressSink()
        >>> bar.update(epoch=0, epochs=2, batch=10, length=100, metrics={"loss": 0.5}, rate=250.0)
        >>> bar.close()
    """

    def __init__(self, console: Console | None = None, *, where: Where = "auto") -> None:
        self._console, self._where = console, where
        self._renderer: Renderer | None = None
        self._started = self._closed = False
        self._drawn = float("-inf")
        self._pending: Frame | None = None
        self._latest: Frame | None = None

    def update(
        self,
        *,
        epoch: int,
        epochs: int | None,
        batch: int,
        length: int | None,
        metrics: Mapping[str, float],
        rate: float | None,
        note: str = "",
        batches: int = 0,
        total: int | None = None,
        run_left: float | None = None,
        place: str = "",
        now: bool = False,
    ) -> None:
        """Show the progress of the run.

        Args:
            epoch: number of complete epochs, so 0 during the first, which is shown as 1.
            epochs: number of epochs of the run; None if it is unknown.
            batch: number of complete batches of this epoch.
            length: batches an epoch; None if it is unknown.
            metrics: the latest numbers, by name.
            rate: batches a second; None before it is measured.
            note: what the run does besides training, such as "evaluating".
            batches: number of batches of the run so far.
            total: number of batches of the run, None if it is unknown.
            run_left: seconds until its end, None if they are unknown.
            place: where it writes, for a notebook.
            now: draw at once, however short the time since the last frame.
        """
        if not self._is_open():
            return
        frame = Frame(
            epoch=epoch,
            epochs=epochs,
            batch=batch,
            length=length,
            metrics=metrics,
            rate=rate,
            note=note,
            batches=batches,
            total=total,
            run_left=run_left,
            place=place,
        )
        self._latest, moment = frame, time.monotonic()
        renderer = self._renderer
        if renderer is None:
            return
        # On a terminal the end of an epoch is always drawn: an evaluation may follow, and a stale bar would stand.
        now = now or (renderer.draws_ends_of_epochs and batch == length)
        if moment - self._drawn < renderer.pause and not now:
            self._pending = frame
            return
        self._drawn, self._pending = moment, None
        self._shielded(renderer.draw, frame)

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Add a row of the log to the curves, where there are any."""
        if self._is_open() and self._renderer is not None:
            self._shielded(self._renderer.log, step, row)

    def finish(self, ending: str) -> None:
        """Show how the run ended, in place of the times of the last frame, and close."""
        if self._latest is not None and self._renderer is not None and not self._closed:
            self._pending = None
            self._shielded(self._renderer.finish, self._latest, ending)
        self.close()

    def _is_open(self) -> bool:
        if not self._started and not self._closed:
            self._start()
        return not self._closed and self._renderer is not None

    def print(self, text: str) -> None:
        """Print a line above the bar, where there is one."""
        if self._is_open() and self._renderer is not None:
            self._shielded(self._renderer.print, text)

    def close(self) -> None:
        """Draw the last frame, which stays visible. It may be called again."""
        self._closed = True
        if self._renderer is not None and self._pending is not None:
            self._shielded(self._renderer.draw, self._pending)
        if self._renderer is not None:
            self._shielded(self._renderer.close)
        self._renderer = self._pending = None

    def _start(self) -> None:
        self._started = True
        try:
            self._renderer = _choose(self._console, self._where)
        except Exception:  # closed stdout, another live display, a broken install: the run goes on without a bar
            self._renderer = None

    def _shielded(self, call: Callable[..., None], *args: object) -> None:
        try:
            call(*args)
        except Exception:  # closed file, broken pipe, lost terminal, a charset without blocks: likewise
            broken, self._renderer = self._renderer, None
            if isinstance(broken, TerminalBar):
                broken.abandon()


def shown_in(where: Where = "auto") -> Where:
    """Return where progress is shown: "terminal", "notebook" or "none".

    Args:
        where: what was asked for; "auto" looks into the environment variable `PURESTEP_DISPLAY`, and where that is not
            set, at the process: a Jupyter kernel, or a stdout that is a terminal.

    Examples:
        >>> shown_in("notebook"), shown_in("none")
        ('notebook', 'none')
    """
    asked = where if where != "auto" else os.environ.get(VARIABLE, "auto")
    for known in _PLACES:
        if asked == known != "auto":
            return known
    if _cells.in_kernel():
        return "notebook"
    if sys.stdout is None or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
        return "none"
    return "terminal"


def _choose(console: Console | None, where: Where) -> Renderer | None:
    if console is None:
        shown = shown_in(where)
        if shown == "none":
            return None
        if shown == "notebook":
            from IPython.display import display

            from purestep.display.live import LiveCell

            return LiveCell(display)
        from rich.console import Console

        console = Console(force_terminal=True if where == "terminal" else None)
    return TerminalBar(console) if console.is_terminal and not console.is_dumb_terminal else None


class TerminalBar:
    """A live line drawn by rich."""

    pause = REFRESH_SECONDS
    draws_ends_of_epochs = True

    def __init__(self, console: Console) -> None:
        from rich import progress
        from rich.table import Column

        # rich would end the process on a broken pipe; an exception ends the bar only.
        console.on_broken_pipe = _raise_broken_pipe  # type: ignore[method-assign]

        def column(field: str, **how: Any) -> progress.ProgressColumn:
            layout = Column(no_wrap=True, overflow="ellipsis")
            return progress.TextColumn(f"{{task.fields[{field}]}}", markup=False, table_column=layout, **how)

        self._bar = progress.Progress(
            column("title"),
            progress.BarColumn(bar_width=BAR_WIDTH),
            column("position"),
            column("rate", style="dim"),
            column("left", style="dim"),
            column("text"),
            console=console,
            auto_refresh=False,
        )
        self._task = self._bar.add_task("", visible=False, title="", position="", rate="", left="", text="")
        self._bar.start()

    def draw(self, frame: Frame) -> None:
        # On a narrow terminal the metrics are left out first, then the times, so that the bar stays one line.
        room = self._bar.console.width - BAR_WIDTH - len(frame.title) - len(frame.position) - 6
        fields: dict[str, Any] = {"title": frame.title, "position": frame.position}
        for name in ("rate", "left", "text"):
            text: str = getattr(frame, name)
            fits = len(text) <= room or (name == "text" and room >= len("loss 0.1"))
            fields[name] = _shortened(text, room) if fits else ""
            room -= len(fields[name])
        self._bar.update(self._task, total=frame.length, completed=frame.batch, visible=True, **fields)
        self._bar.refresh()

    def log(self, step: int, row: Mapping[str, float]) -> None:
        """Nothing to do: a line has no curves."""

    def finish(self, frame: Frame, ending: str) -> None:
        self.draw(frame)

    def print(self, text: str) -> None:
        self._bar.console.print(text, markup=False, highlight=False, soft_wrap=True)

    def close(self) -> None:
        self._bar.stop()

    def abandon(self) -> None:
        """Restore stdout and stderr, which rich replaces while it is live, after the terminal was lost."""
        with suppress(Exception):
            self._bar.stop()


def _shortened(text: str, limit: int) -> str:
    return text if len(text) <= limit else text[: limit - 1] + "…"


def _raise_broken_pipe() -> None:
    raise BrokenPipeError("the reader of the progress bar has closed its pipe")
