"""The rules of the house a machine can hold: who may import whom, and what may not be in a file."""

from __future__ import annotations

import ast
import io
import re
import tokenize
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "purestep"

# The order of rooms: each may import from those before it, and from itself. `__init__` stands above all.
ROOMS = (
    "lazy errors arguments cpus _torch_cpu portable_kernels portable "
    "bits tree transforms recompute given notebook random keyed slots treesum "
    "sharding metrics optim precision functional state grad accumulate parallel step jit data snapshot loggers "
    "ui loop callbacks trainer testing cli"
).split()

# Libraries with one importer. Keys are top-level modules, values the only file that may name them.
SINGLE_IMPORTERS = {"optree": "tree.py", "orbax": "snapshot/arrays.py"}


def room_of(relative: Path) -> str:
    """The room a file of the package belongs to."""
    return relative.parts[0].removesuffix(".py")


def imported_modules(source: str, relative: Path) -> list[tuple[int, str]]:
    """Line and absolute dotted name of everything a source imports, lazily or under TYPE_CHECKING included."""
    package = ["purestep", *relative.parts[:-1]]
    found: list[tuple[int, str]] = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import):
            found += [(node.lineno, alias.name) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = [] if node.level == 0 else package[: len(package) - node.level + 1]
            module = ".".join([*base, *([node.module] if node.module else [])])
            # `from purestep import tree` names the room only in the alias; `from torch import nn` gains nothing.
            names = [f"{module}.{alias.name}" for alias in node.names] if module == "purestep" else [module]
            found += [(node.lineno, name) for name in names]
    return found


def wrong_imports(source: str, relative: Path) -> list[str]:
    """Each import of a file that the order of rooms, or the list of single importers, forbids."""
    room, problems = room_of(relative), []
    for line, name in imported_modules(source, relative):
        top, *rest = name.split(".")
        place = f"purestep/{relative}:{line}"
        if SINGLE_IMPORTERS.get(top, str(relative)) != str(relative):
            problems.append(f"{place} imports {top}; only purestep/{SINGLE_IMPORTERS[top]} may")
        if top != "purestep" or room == "__init__":
            continue
        if not rest:
            problems.append(f"{place} imports the whole package; import the room it needs")
        elif rest[0] not in ROOMS:
            problems.append(f"{place} imports purestep.{rest[0]}, which is not a room of ROOMS")
        elif ROOMS.index(rest[0]) > ROOMS.index(room):
            problems.append(f"{place}: {room} imports {rest[0]}, which stands below it")
    return problems


def forbidden_words(source: str, relative: Path) -> list[str]:
    """Assertions, stubs, and the notes that mark unfinished work, in a file."""
    problems = []
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Assert):
            problems.append(f"purestep/{relative}:{node.lineno} asserts; raise an error of purestep.errors")
        # Catching it is fine: other libraries raise it.
        if isinstance(node, ast.Raise) and node.exc is not None and "NotImplementedError" in ast.dump(node.exc):
            problems.append(f"purestep/{relative}:{node.lineno} raises NotImplementedError; write it or leave it out")
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        if match := re.search(r"\b(TODO|FIXME|XXX|HACK)\b", token.string):
            problems.append(f"purestep/{relative}:{token.start[0]} has {match.group()}; finish it or leave it out")
    return problems


def no_docstring(source: str, relative: Path) -> list[str]:
    missing = source.strip() and ast.get_docstring(ast.parse(source)) is None
    return [f"purestep/{relative} does not say what it owns: no module docstring"] if missing else []


RULES = [wrong_imports, forbidden_words, no_docstring]
FILES = sorted(path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))


@pytest.mark.parametrize("rule", RULES, ids=lambda rule: rule.__name__)
def test_the_package_keeps_the_rule(rule):
    assert FILES
    problems = [p for relative in FILES for p in rule((PACKAGE / relative).read_text(), relative)]
    assert not problems, "\n" + "\n".join(problems)


def test_every_file_belongs_to_a_room():
    strangers = {room_of(relative) for relative in FILES} - {*ROOMS, "__init__", "__main__"}
    assert not strangers, f"add to ROOMS, in the order of who imports whom: {sorted(strangers)}"


@pytest.mark.parametrize(
    ("relative", "source", "message"),
    [
        ("tree.py", "from purestep.loop import run", "purestep/tree.py:1: tree imports loop, which stands below it"),
        ("tree.py", "from purestep import loop", "tree imports loop, which stands below it"),
        ("tree.py", "from . import loop", "tree imports loop, which stands below it"),
        ("tree.py", "import purestep.loop.run as r", "tree imports loop, which stands below it"),
        ("optim/base.py", "from ..state import TrainState", "optim imports state, which stands below it"),
        ("optim/base.py", "def f():\n    from purestep.step import x", "purestep/optim/base.py:2: optim imports step"),
        ("step.py", "import purestep as ps", "imports the whole package"),
        ("step.py", "from purestep.utils import x", "imports purestep.utils, which is not a room"),
        ("state.py", "import optree", "imports optree; only purestep/tree.py may"),
        ("snapshot/codec.py", "import orbax.checkpoint as ocp", "imports orbax; only purestep/snapshot/arrays.py may"),
        ("snapshot/codec.py", "from orbax import checkpoint", "imports orbax; only purestep/snapshot/arrays.py may"),
    ],
)
def test_a_wrong_import_is_caught(relative, source, message):
    (problem,) = wrong_imports(source, Path(relative))
    assert message in problem


@pytest.mark.parametrize(
    ("relative", "source"),
    [
        ("__init__.py", "from purestep.loop import run as run"),
        ("optim/clip.py", "from purestep.optim import base\nfrom . import base\nfrom .base import x"),
        ("optim/clip.py", "import torch\nfrom purestep import tree\nfrom .. import tree\nfrom ..errors import explain"),
        ("tree.py", "import optree"),
        ("snapshot/arrays.py", "import orbax.checkpoint as ocp"),
    ],
)
def test_a_right_import_passes(relative, source):
    assert wrong_imports(source, Path(relative)) == []


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("def f(x):\n    assert x", "purestep/a.py:2 asserts"),
        ("x = 1  # TODO later", "purestep/a.py:1 has TODO"),
        ('"""FIXME"""', "has FIXME"),
        ("raise NotImplementedError", "purestep/a.py:1 raises NotImplementedError"),
        ("raise NotImplementedError('later') from None", "raises NotImplementedError"),
    ],
)
def test_a_forbidden_word_is_caught(source, message):
    (problem,) = forbidden_words(source, Path("a.py"))
    assert message in problem


def test_a_file_without_a_docstring_is_caught():
    assert no_docstring("x = 1", Path("a.py"))
    assert not no_docstring("", Path("a.py"))
    assert not no_docstring('"""Owns x."""', Path("a.py"))
