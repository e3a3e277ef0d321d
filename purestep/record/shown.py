"""How records show themselves: tables as text and as HTML, escaped, without script, in the colours of the page."""

from __future__ import annotations

import datetime
import html
from collections.abc import Mapping, Sequence

_LEFT = ' style="text-align:left"'
WIDEST = 48  # characters of a cell of a table with many columns
LINE = 160  # of one with few


def text_table(head: Sequence[str], rows: Sequence[Sequence[object]], *, widest: int = WIDEST) -> str:
    """Return a table as aligned text.

    Examples:
        >>> print(text_table(["run", "updates"], [["a", 10], ["longer", 7]]))
        run     updates
        a       10
        longer  7
    """
    cells = [[cell(value, widest) for value in row] for row in [head, *rows]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) for c, w in zip(row, widths, strict=True)).rstrip() for row in cells)


def html_table(head: Sequence[str], rows: Sequence[Sequence[object]], *, title: str = "", widest: int = WIDEST) -> str:
    """Return a table as HTML. It names no colour, so it is as light or as dark as the page around it.

    Examples:
        >>> html_table(["<b>"], [["a & b"]])[-55:]
        '<td style="text-align:left">a &amp; b</td></tr></table>'
    """
    top = "".join(f"<th{_LEFT}>{html.escape(name)}</th>" for name in head)
    lines = ["".join(f"<td{_LEFT}>{html.escape(cell(value, widest))}</td>" for value in row) for row in rows]
    caption = f"<caption{_LEFT}>{html.escape(title)}</caption>" if title else ""
    return f"<table>{caption}<tr>{top}</tr>{''.join(f'<tr>{line}</tr>' for line in lines)}</table>"


def written(value: object) -> str:
    """Return a setting on one line: a call where it names a function, its fields by name where it has some.

    Examples:
        >>> written({"name": "lion", "learning_rate": 1e-4}), written({"width": 16, "depth": 2}), written([1, 2])
        ('lion(learning_rate=0.0001)', 'width=16, depth=2', '[1, 2]')
    """
    if isinstance(value, Mapping):
        inner = ", ".join(f"{name}={written(item)}" for name, item in value.items() if name != "name")
        return f"{value['name']}({inner})" if "name" in value else inner
    if isinstance(value, list):
        return f"[{', '.join(map(written, value))}]"
    return str(value)


def cell(value: object, widest: int = WIDEST) -> str:
    """Return a value on one line, short."""
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, datetime.datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M")
    if isinstance(value, Mapping):
        value = written(value)
    text = " ".join(str(value).split())
    return text if len(text) <= widest else text[: widest - 1] + "…"
