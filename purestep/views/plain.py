"""Plain text for terminals: cells, aligned tables, sparklines, and which characters the terminal can write."""

from __future__ import annotations

import datetime
import math
import sys
from collections.abc import Mapping, Sequence

WIDEST = 48  # most characters of a cell in a table with many columns
LINE = 160  # most characters of a cell in a table with few columns
_BLOCKS, _ASCII = "▁▂▃▄▅▆▇█", "_.,-~=+#"


def cell(value: object, widest: int = WIDEST) -> str:
    """Return a value on one line, short: four digits of a float, the minute of a time, nothing for None.

    Examples:
        >>> cell(0.123456), cell(1234567), cell(None), cell("a\\nb"), cell("long words", 6)
        ('0.1235', '1,234,567', '', 'a b', 'long …')
    """
    if value is None:
        return ""
    if isinstance(value, float):
        return f"{value:.4g}"
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    if isinstance(value, datetime.datetime):
        return value.astimezone().strftime("%Y-%m-%d %H:%M")
    return shortened(written(value), widest)


def written(value: object) -> str:
    """Return a setting as text: a call if it names a function, its fields if it is a mapping.

    Examples:
        >>> written({"name": "lion", "learning_rate": 1e-4}), written({"width": 16, "depth": 2}), written([1, 2])
        ('lion(learning_rate=0.0001)', 'width=16, depth=2', '[1, 2]')
    """
    if isinstance(value, Mapping):
        inner = ", ".join(f"{name}={written(item)}" for name, item in value.items() if name != "name")
        return f"{value['name']}({inner})" if "name" in value else inner
    return f"[{', '.join(map(written, value))}]" if isinstance(value, list) else str(value)


def shortened(text: str, widest: int) -> str:
    """Return a text on one line, cut to `widest` characters."""
    text = " ".join(text.split())
    return text if len(text) <= widest else text[: widest - 1] + "…"


def to_the_right(rows: Sequence[Sequence[object]], column: int) -> bool:
    """Tell whether a column holds numbers only, which are aligned to the right."""
    values = [row[column] for row in rows if row[column] not in (None, "", "…")]
    return bool(values) and all(isinstance(v, (int, float)) and not isinstance(v, bool) for v in values)


def table(
    head: Sequence[str],
    rows: Sequence[Sequence[object]],
    *,
    widest: int = WIDEST,
    foot: Sequence[object] = (),
    right: Sequence[int] = (),
) -> str:
    """Return a table as aligned text.

    Examples:
        >>> print(table(["run", "updates"], [["a", 10], ["longer", 7]]))
        run     updates
        a            10
        longer        7
    """
    body = [*rows, foot] if foot else rows
    cells = [[cell(value, widest) for value in row] for row in [head, *body]]
    widths = [max(len(row[column]) for row in cells) for column in range(len(head))]
    rule = ["-" * width for width in widths]
    named = any(head)
    if foot:  # a rule above the foot, as below the head
        cells = [cells[0], *([rule] if named else []), *cells[1:-1], rule, cells[-1]]
    cells = cells if named else cells[1:]
    aligned = [column in right or to_the_right(body, column) for column in range(len(head))]
    lines = [[c.rjust(w) if r else c.ljust(w) for c, w, r in zip(row, widths, aligned, strict=True)] for row in cells]
    return "\n".join("  ".join(row).rstrip() for row in lines)


def sparkline(values: Sequence[float | None], *, width: int = 40, log: bool = False) -> str:
    """Return numbers as a line of block characters, the lowest for the smallest; a gap where none is finite.

    More numbers than `width` are averaged in groups of neighbours.

    Args:
        values: the numbers, evenly spaced.
        width: the most characters.
        log: use a logarithmic scale; all numbers must be positive then.

    Examples:
        >>> sparkline([0, 1, 2, 3, 4, 5, 6, 7]), sparkline([5.0, float("nan"), 5.0])
        ('▁▂▃▄▅▆▇█', '▄ ▄')
    """
    count = len(values)
    groups = min(width, count)
    means = [_mean(values[i * count // groups : (i + 1) * count // groups]) for i in range(groups)]
    heights = [math.log(mean) if log and mean is not None and mean > 0 else mean for mean in means]
    known = [height for height in heights if height is not None]
    levels = characters(_BLOCKS, _ASCII)
    if not known:
        return " " * groups
    low, high = min(known), max(known)
    if low == high:
        return "".join(" " if height is None else levels[3] for height in heights)
    # The numbers are halved first, because their difference may overflow.
    span = high / 2 - low / 2
    return "".join(" " if h is None else levels[min(7, int((h / 2 - low / 2) / span * 8))] for h in heights)


def _mean(values: Sequence[float | None]) -> float | None:
    finite = [value for value in values if value is not None and math.isfinite(value)]
    return sum(value / len(finite) for value in finite) if finite else None


def characters(wanted: str, otherwise: str) -> str:
    """Return the wanted characters, or others if the encoding of stdout lacks them, so that printing cannot fail.

    Examples:
        >>> characters("│", "|")
        '│'
    """
    try:
        wanted.encode(getattr(sys.stdout, "encoding", None) or "utf-8")
    except (UnicodeEncodeError, LookupError):
        return otherwise
    return wanted
