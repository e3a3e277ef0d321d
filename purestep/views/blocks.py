"""Blocks, the parts of a display, each as HTML and as text; and the base class of values that are displayed by blocks.

A value returns its blocks from `view`. A notebook shows their HTML, a terminal their text.
"""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, Protocol

from purestep.views import chart, markup, plain
from purestep.views.chart import Line, Panel

_SPARK = 40  # characters of a curve in a terminal


class Block(Protocol):
    """A part of the display of a value."""

    def html(self) -> str: ...

    def text(self) -> str: ...


@dataclasses.dataclass(frozen=True)
class Note:
    """A line of text, or several."""

    content: str

    def html(self) -> str:
        return "".join(f"<p>{markup.escaped(line)}</p>" for line in self.content.splitlines())

    def text(self) -> str:
        return self.content


@dataclasses.dataclass(frozen=True)
class Table:
    """A table; columns of numbers are aligned to the right.

    Attributes:
        head: names of the columns; all empty for a table without a head.
        rows: a value for each column, None for an empty cell.
        title: line above the table.
        wide: whether cells may be as long as a line, as in a table of names and values.
        foot: a last row below a rule, for sums.
        right: columns of text to align to the right.
    """

    head: Sequence[str]
    rows: Sequence[Sequence[object]]
    title: str = ""
    wide: bool = False
    foot: Sequence[object] = ()
    right: Sequence[int] = ()

    def html(self) -> str:
        widest = plain.LINE if self.wide else plain.WIDEST
        return markup.table(self.head, self.rows, title=self.title, widest=widest, foot=self.foot, right=self.right)

    def text(self) -> str:
        widest = plain.LINE if self.wide else plain.WIDEST
        lines = plain.table(self.head, self.rows, widest=widest, foot=self.foot, right=self.right)
        return f"{self.title}\n{lines}" if self.title else lines


@dataclasses.dataclass(frozen=True)
class Facts:
    """Names and texts, without truncation."""

    items: Sequence[tuple[str, str]]

    def html(self) -> str:
        return markup.table(["", ""], self.items, widest=sys.maxsize)

    def text(self) -> str:
        return "\n".join(f"  {label + ':':<10} {text}" for label, text in self.items)


@dataclasses.dataclass(frozen=True)
class Tree:
    """A node of a tree with its children.

    Attributes:
        label: name of the node.
        note: text beside the label.
        children: the nodes inside.
    """

    label: str
    note: str = ""
    children: tuple[Tree, ...] = ()

    def html(self) -> str:
        if not self.children:
            return markup.leaf_line(self.label, note=self.note)
        return markup.unfolding(self.label, self.note, "".join(child.html() for child in self.children))

    def text(self) -> str:
        return "\n".join(self._lines())

    def _lines(self) -> Iterator[str]:
        yield f"{self.label}  {self.note}".rstrip()
        strokes = plain.characters("├─ ╰─ │", "|- `- |")
        for child in self.children:
            last = child is self.children[-1]
            for number, line in enumerate(child._lines()):
                stem = (strokes[3:5] if last else strokes[0:2]) if number == 0 else ("  " if last else strokes[6] + " ")
                yield f"{stem} {line}"


@dataclasses.dataclass(frozen=True)
class Curves:
    """Panels of curves: drawn in a notebook, a line of block characters for each curve in a terminal."""

    panels: Sequence[Panel]

    def html(self) -> str:
        return f'<div class="panels">{"".join(map(chart.figure, self.panels))}</div>' if self.panels else ""

    def text(self) -> str:
        lines = [(panel, line) for panel in self.panels for line in panel.lines if line.values]
        axes = {panel.axis for panel, _ in lines}
        head = ["", "first", "last", "smallest", "largest", axes.pop() if len(axes) == 1 else "axis", ""]
        rows = [[_named(line, panel), *_spark(line, panel.log)] for panel, line in lines]
        return plain.table(head, rows) if rows else ""


def _named(line: Line, panel: Panel) -> str:
    """Return the name of a curve outside of its panel: with the title of the panel, unless that contains it."""
    return line.name if panel.title in line.name else f"{line.name} {panel.title}"


def _spark(line: Line, log: bool) -> tuple[float, float, float, float, str, str]:
    values, ends = line.values, (line.points[0][0], line.points[-1][0])
    shape = plain.sparkline([value for _, value in line.points], width=_SPARK, log=log)
    return values[0], values[-1], min(values), max(values), "-".join(map(chart.written, ends)), shape


class View:
    """Base of values with a display: HTML in a notebook, text by `print`.

    A subclass returns its blocks from `view`. Its `repr` is unchanged.
    """

    def view(self) -> Iterable[Block]:
        """Return the blocks of the display."""
        return (Note(repr(self)),)

    def __str__(self) -> str:
        lines: list[str] = []
        after_table = False
        for block in self.view():
            if text := block.text():
                # An empty line separates two tables, or a table and its curves.
                lines += ["", text] if after_table and not isinstance(block, Note) else [text]
                after_table = isinstance(block, Table)
        return "\n".join(lines)

    def _repr_html_(self) -> str:
        return markup.page("".join(block.html() for block in self.view()))

    def _repr_pretty_(self, printer: Any, cycle: bool) -> None:
        """Print the text in IPython on a terminal, in place of the `repr`."""
        printer.text("..." if cycle else str(self))


class Printed(View):
    """Base of results, which no expression can recreate: their `repr` is the text, too."""

    def __repr__(self) -> str:
        return str(self)
