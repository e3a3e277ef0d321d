"""Output of the command: tables by rich on a terminal, aligned text in a pipe, JSON for scripts."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping, Sequence
from typing import Any

from purestep.views import plain


def table(
    head: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "", widest: int = plain.WIDEST
) -> None:
    """Print a table."""
    if not sys.stdout.isatty():
        print(plain.table(head, rows, widest=widest))
        return
    from rich import box
    from rich.console import Console
    from rich.table import Table

    drawn = Table(title=title or None, box=box.SIMPLE_HEAD, title_justify="left", pad_edge=False)
    for name in head:
        drawn.add_column(name, overflow="fold")
    for row in rows:
        drawn.add_row(*(_escaped(plain.cell(value, widest)) for value in row))
    Console().print(drawn)


def facts(rows: Mapping[str, object], *, title: str = "") -> None:
    """Print names and values."""
    kept = [(name, value) for name, value in rows.items() if value is not None]
    if not sys.stdout.isatty():
        width = max((len(name) for name, _ in kept), default=0)
        print("\n".join(f"{name:<{width}}  {plain.cell(value, plain.LINE)}".rstrip() for name, value in kept))
        return
    from rich.console import Console
    from rich.table import Table

    grid = Table.grid(padding=(0, 2))
    for name, value in kept:
        grid.add_row(f"[bold]{_escaped(name)}", _escaped(plain.cell(value, plain.LINE)))
    Console().print(grid)


def _escaped(text: str) -> str:
    from rich.markup import escape

    return escape(text)


def as_json(value: Any) -> None:
    """Print JSON, with null for numbers that are not finite."""
    print(json.dumps(_plain(value), indent=1, default=str))


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if isinstance(value, Mapping):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    return value


def say(text: str) -> None:
    """Print a progress line on stderr, if stderr is a terminal."""
    if sys.stderr.isatty():
        print(text, file=sys.stderr)
