"""A griffe extension: `b1, b2: decay rates.` in a docstring documents both names."""

from __future__ import annotations

import re
from typing import Any

import griffe

SECTIONS = ("Args:", "Attributes:", "Raises:")
GROUP = re.compile(r"^    (?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): ")


class GroupedNames(griffe.Extension):
    """Gives each name of a group an entry of its own, before griffe parses the docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = split(obj.docstring.value)


def split(docstring: str) -> str:
    """Return a docstring in which no entry of `Args:`, `Attributes:` and `Raises:` names two things.

    `b1, b2: decay rates.` becomes `b1: decay rates.` and `b2: decay rates.`, each with the deeper lines below it.
    """
    section, entries = "", [[]]
    for line in docstring.splitlines():
        section = line.strip() if line and not line.startswith(" ") else section
        if not (section in SECTIONS and line.startswith(" " * 8)):  # what is deeper belongs to the entry above
            entries.append([])
        entries[-1].append(line)
    return "\n".join(line for entry in entries for line in _separated(entry))


def _separated(entry: list[str]) -> list[str]:
    match = GROUP.match(entry[0]) if entry else None
    if match is None:
        return entry
    rest = entry[0][match.end() :]
    return [line for name in match["names"].split(", ") for line in (f"    {name}: {rest}", *entry[1:])]
