"""The progress bar: one live line on a terminal or in a notebook, and no output elsewhere.

Owns drawing and its errors: a closed or broken stdout ends the bar, never the run. It reads no tensor and does not know
the loop, whose `progress` callback calls it. rich is imported when a bar is first drawn.
"""

from __future__ import annotations

import html
import os
import sys
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from typing import TYPE_CHECKING, Any, Protocol

if TYPE_CHECKING:
    from rich.console import Console

REFRESH_SECONDS = 0.1
BAR_WIDTH = 24  # characters


class Renderer(Protocol):
    """Draws frames on one kind of output. `ProgressSink` chooses one, and catches its errors."""

    def draw(self, frame: Frame) -> None: ...
    def print(self, text: str) -> None: ...
    def close(self) -> None: ...


class Frame:
    """The content of the bar at one moment, as text and numbers."""

    def __init__(
        self,
        *,
        epoch: int,
        epochs: int | None,
        batch: int,
        length: int | None,
        metrics: Mapping[str, float],
        rate: float | None,
        note: str,
    ) -> None:
        # After the last epoch all are complete, and the bar still names the last one.
        self.title = f"epoch {epoch + 1}" if epochs is None else f"epoch {min(epoch + 1, epochs)}/{epochs}"
        self.batch, self.length = batch, length
        self.position = f"{batch}/{length}" if length is not None else f"{batch} batches"
        numbers = [f"{name} {value:.4g}" for name, value in metrics.items()]
        self.rate = "" if rate is None else f"{rate:.1f} batches/s" if rate < 100 else f"{rate:,.0f} batches/s"
        self.left = ""
        if rate and length is not None and batch < length:
            self.left = f"{duration((length - batch) / rate)} left"
        self.text = "  ".join([*numbers, *([note] if note else [])])


def duration(seconds: float) -> str:
    """Return a number of seconds as minutes and seconds, or hours, minutes and seconds.

    Examples:
        >>> duration(7.2), duration(83), duration(7384)
        ('0:07', '1:23', '2:03:04')
    """
    minutes, rest = divmod(int(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


class ProgressSink:
    """A progress bar whose errors never reach the run.

    On a terminal it is one live line (output of the program is printed above it), in a notebook one output that is
    replaced, and elsewhere it draws nothing. It redraws at most ten times a second, in `update`: it has no thread.

    Args:
        console: a rich console to draw on; by default one on stdout.

    Examples:
        >>> bar = ProgressSink()
        >>> bar.update(epoch=0, epochs=2, batch=10, length=100, metrics={"loss": 0.5}, rate=250.0)
        >>> bar.close()
    """

    def __init__(self, console: Console | None = None) -> None:
        self._console = console
        self._renderer: Renderer | None = None
        self._started = self._closed = False
        self._drawn = float("-inf")
        self._pending: Frame | None = None

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
        """
        if self._closed:
            return
        if not self._started:
            self._start()
        if self._renderer is None:
            return
        frame = Frame(epoch=epoch, epochs=epochs, batch=batch, length=length, metrics=metrics, rate=rate, note=note)
        # The last batch of an epoch is always drawn: an evaluation may follow, and a stale bar would stand meanwhile.
        now = time.monotonic()
        if now - self._drawn < REFRESH_SECONDS and batch != length:
            self._pending = frame
            return
        self._drawn, self._pending = now, None
        self._shielded(self._renderer.draw, frame)

    def print(self, text: str) -> None:
        """Print a line above the bar, where there is one."""
        if not self._started and not self._closed:
            self._start()
        if self._renderer is not None:
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
            self._renderer = _choose(self._console)
        except Exception:  # closed stdout, another live display, a broken install: the run goes on without a bar
            self._renderer = None

    def _shielded(self, call: Callable[..., None], *args: object) -> None:
        try:
            call(*args)
        except Exception:  # closed file, broken pipe, lost terminal, a charset without blocks: likewise
            broken, self._renderer = self._renderer, None
            if isinstance(broken, TerminalBar):
                broken.abandon()


def _choose(console: Console | None) -> Renderer | None:
    if console is None:
        if display := _notebook_display():
            return NotebookBar(display)
        if sys.stdout is None or not sys.stdout.isatty() or os.environ.get("TERM") == "dumb":
            return None
        from rich.console import Console

        console = Console()
    return TerminalBar(console) if console.is_terminal and not console.is_dumb_terminal else None


def _notebook_display() -> Callable[..., Any] | None:
    """`IPython.display.display` in a notebook kernel, else None. A kernel has imported IPython, so this never does."""
    ipython = sys.modules.get("IPython")
    shell = ipython.get_ipython() if ipython is not None else None
    if shell is None or not hasattr(shell, "kernel"):
        return None
    from IPython.display import display

    return display


class TerminalBar:
    """A live line drawn by rich."""

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


class NotebookBar:
    """One output of a cell, replaced at each draw. It needs no widgets."""

    def __init__(self, display: Callable[..., Any]) -> None:
        self._display = display
        self._handle: Any = None

    def draw(self, frame: Frame) -> None:
        texts = (frame.title, frame.position, frame.rate, frame.left, frame.text)
        text = "  ".join(item for item in texts if item)
        limits = f"value='{frame.batch}' max='{frame.length}'" if frame.length else ""
        bar = f"<progress {limits} style='width:16em;vertical-align:middle'></progress>"
        bundle = {"text/plain": text, "text/html": f"{bar} <code style='white-space:pre'>{html.escape(text)}</code>"}
        if self._handle is None:
            self._handle = self._display(bundle, raw=True, display_id=True)
        else:
            self._handle.update(bundle, raw=True)

    def print(self, text: str) -> None:
        self._display({"text/plain": text}, raw=True)

    def close(self) -> None:
        """Nothing to do: the last frame stays in the output."""
