"""The public names of purestep, read from its sources, and the page of each room."""

from __future__ import annotations

import ast
from pathlib import Path

TOP = "purestep"  # the room of what is written `ps.name`


def rooms(root: Path) -> dict[str, list[str]]:
    """Return the full names that each page documents, by room: what `purestep/__init__.py` re-exports."""
    found: dict[str, list[str]] = {TOP: []}
    for name, full in _reexported(root, TOP).items():
        if _source(root, full):
            found[name] = list(_defined(root, full).values())
        else:
            found[TOP].append(full)
    return {room: sorted(names) for room, names in sorted(found.items(), key=lambda x: (x[0] != TOP, x[0]))}


def page(root: Path, room: str) -> str:
    """Return the Markdown of a room: its docstring, then every name with its own."""
    title, full = ("`ps`", TOP) if room == TOP else (f"`ps.{room}`", _reexported(root, TOP)[room])
    return "\n\n".join([f"# {title}", _docstring(root, full), *(f"::: {name}" for name in rooms(root)[room])]) + "\n"


def _defined(root: Path, room: str) -> dict[str, str]:
    """The public names of a room: what it, or its `__init__`, re-exports and defines."""
    nodes = _parsed(root, room).body
    own = [node.name for node in nodes if isinstance(node, ast.FunctionDef | ast.ClassDef)]
    return _reexported(root, room) | {name: f"{room}.{name}" for name in own if not name.startswith("_")}


def _reexported(root: Path, room: str) -> dict[str, str]:
    """Every `from home import name as name` of a room's `__init__`, under `if TYPE_CHECKING:` too: where it leads."""
    found = {}
    for node in ast.walk(_parsed(root, room)) if _is_package(root, room) else []:
        for alias in node.names if isinstance(node, ast.ImportFrom) else []:
            name, home = alias.asname, f"{node.module}.{alias.name}"
            if name and not name.startswith("_"):
                # Where a file has the name of a function (`data.batches`), or a room has another name than its
                # package, readers of sources find the name only where it is defined.
                found[name] = home if _source(root, f"{room}.{name}") or _source(root, home) else f"{room}.{name}"
    return found


def _source(root: Path, full: str) -> Path | None:
    base = root.joinpath(*full.split("."))
    return next((path for path in (base / "__init__.py", base.with_suffix(".py")) if path.exists()), None)


def _is_package(root: Path, full: str) -> bool:
    source = _source(root, full)
    return source is not None and source.name == "__init__.py"


def _parsed(root: Path, full: str) -> ast.Module:
    source = _source(root, full)
    return ast.parse(source.read_text() if source else "")


def _docstring(root: Path, full: str) -> str:
    return ast.get_docstring(_parsed(root, full)) or ""
