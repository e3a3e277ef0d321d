"""What griffe does not know of our docstrings and signatures: groups of names, arguments that a dataclass declares."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

import griffe

SECTIONS = ("Args:", "Attributes:", "Raises:")
TAKES = re.compile(r"takes\((\w+)\)")
GROUP = re.compile(r"^    (?P<names>\*{0,2}\w+(?:, \*{0,2}\w+)+): ")


class GroupedNames(griffe.Extension):
    """Gives each name of a group an entry of its own, before griffe parses the docstring."""

    def on_object(self, *, obj: griffe.Object, **_: Any) -> None:
        """Rewrite the docstring of one object."""
        if obj.docstring:
            obj.docstring.value = split(obj.docstring.value)


class TakenArguments(griffe.Extension):
    """Gives a function under `@takes(Arguments)` the parameters that it is called with: the fields of the dataclass."""

    def on_package(self, *, pkg: griffe.Module, **_: Any) -> None:
        """Look through all functions, when the classes they name are loaded."""
        for module in _modules(pkg):
            for function in module.functions.values():
                for decorator in [] if function.is_alias else function.decorators:
                    if found := TAKES.fullmatch(str(decorator.value)):
                        fields = module.modules_collection[module.resolve(found[1])]
                        function.parameters = griffe.Parameters(*[p for p in fields.parameters if p.name != "self"])


def _modules(module: griffe.Module) -> Iterator[griffe.Module]:
    yield module
    for inner in module.modules.values():
        if not inner.is_alias:
            yield from _modules(inner)


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
