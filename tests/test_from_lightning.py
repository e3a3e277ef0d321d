"""The page for users of Lightning: its lines run, all that Lightning has is on it, and its counts are right."""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import importlib.util
import inspect
import io
import itertools
import os
import re
import shlex
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
from torch.distributed.run import parse_args as torchrun_arguments

from purestep.cli.command import main

PAGE = Path(__file__).parents[1] / "docs/from-lightning.md"
TEXT = PAGE.read_text()


@dataclasses.dataclass(frozen=True)
class Row:
    """A row of a table.

    Attributes:
        section: heading above it.
        names: what is in code in its first column.
        priority: A, B or C.
        dagger: whether its lines are looked at and not run.
        lines: what is in code in its third column: Python, or a command after `$ `.
        absent: whether it says that there is nothing yet.
    """

    section: str
    names: tuple[str, ...]
    priority: str
    dagger: bool
    lines: tuple[str, ...]
    absent: bool

    def __str__(self) -> str:
        return f"{self.section}: {' '.join(self.names)}"


def code_in(cell: str) -> tuple[str, ...]:
    return tuple(re.findall(r"`([^`]+)`", cell))


def rows() -> list[Row]:
    found = []
    for part in re.split(r"^## ", TEXT, flags=re.MULTILINE)[1:]:
        section = part.splitlines()[0]
        for line in part.splitlines():
            cells = [cell.strip().replace(r"\|", "|") for cell in re.split(r"(?<!\\)\|", line)[1:-1]]
            if len(cells) == 4 and (priority := cells[1].removesuffix(" †")) in ("A", "B", "C"):
                lines, absent = code_in(cells[2]), cells[2].startswith("not yet")
                names = code_in(cells[0]) or (cells[0],)
                found.append(Row(section, names, priority, cells[1].endswith("†"), lines, absent))
    return found


ROWS = rows()
RUN = [row for row in ROWS if row.lines and not row.dagger]


def blocks() -> list[str]:
    return re.findall(r"^```python\n(.*?)^```", TEXT, re.DOTALL | re.MULTILINE)


def execute(source: str, namespace: dict[str, Any]) -> None:
    exec(compile(source, PAGE.name, "exec", dont_inherit=True), namespace)


@contextlib.contextmanager
def within(directory: Path):
    before = Path.cwd()
    os.chdir(directory)
    try:
        with contextlib.redirect_stdout(io.StringIO()):
            yield
    finally:
        os.chdir(before)


@pytest.fixture(scope="module")
def prepared(tmp_path_factory):
    """The names that lines use, and the directory in which the blocks of the page left a run and an experiment."""
    directory = tmp_path_factory.mktemp("page")
    namespace: dict[str, Any] = {"__name__": "page"}
    with within(directory):
        for block in blocks():
            if block.startswith("# train.py"):
                Path("train.py").write_text(block)
            execute(block, namespace)
    return namespace, directory


@pytest.fixture
def page(request, prepared, tmp_path):
    """Names of the test's own, in a directory of its own: one with the run where a line of the row reads it."""
    namespace, directory = prepared
    lines = " ".join(request.node.callspec.params["row"].lines if "row" in request.fixturenames else ())
    if "runs/first" in lines:
        shutil.copytree(directory / "runs", tmp_path / "runs")
    shutil.copy(directory / "train.py", tmp_path)
    with within(tmp_path):
        yield dict(namespace)


def purestep(words: list[str]) -> int:
    """Call the command in this process, and forget the experiment that it imports."""
    path = list(sys.path)
    try:
        return main(words)
    finally:
        sys.path[:] = path
        sys.modules.pop("train", None)


QUICK = ("max_epochs=5", "min_epochs=3", "Callback", "consolidate")


def is_slow(row: Row) -> bool:
    """Whether a row trains, or imports what no other test needs, and is none of the few that are quick all the same."""
    trains = any(word in line for line in row.lines for word in ("fit(", "import", "export(", "$ ", "Store("))
    return trains and not set(QUICK) & set(row.names)


@pytest.mark.parametrize("row", [pytest.param(r, id=str(r), marks=[pytest.mark.slow] * is_slow(r)) for r in RUN])
def test_every_line_runs(row, page):
    for line in row.lines:
        if line.startswith("$ "):
            assert purestep(shlex.split(line)[2:]) == 0
        else:
            execute(line, page)


# --- lines that need more than this process ---------------------------------------------------------------------------


def test_every_line_names_what_is_there(page):
    """Also those that the slow tests run."""
    for row in ROWS:
        assert row.lines or not row.dagger
        for line in row.lines:
            if not line.startswith("$ "):
                check_calls(line, page)


@pytest.mark.parametrize("row", [pytest.param(r, id=str(r)) for r in ROWS if r.dagger and r.lines[0].startswith("$ ")])
def test_commands_that_need_more_have_the_right_options(row, page):
    for line in row.lines:
        check_command(shlex.split(line)[1:])


def check_command(words: list[str]) -> None:
    """Check the arguments of torchrun, srun and purestep, by the parsers of torchrun and purestep."""
    words = list(itertools.dropwhile(lambda word: re.fullmatch(r"[A-Z_]+=\S+", word) or word == "srun", words))
    if words[0] == "torchrun":
        assert torchrun_arguments(words[1:]).training_script == "train.py"
    else:
        assert words[0] == "purestep"
        plain = [w for i, w in enumerate(words[1:]) if w != "--processes" and words[i] != "--processes"]
        assert purestep([*plain, "--print-config"]) == 0


def check_calls(line: str, namespace: dict[str, Any]) -> None:
    """Check that each dotted name is there, and that each call has arguments that its function takes."""
    for node in ast.walk(ast.parse(line)):
        if isinstance(node, ast.Attribute) and is_of(node, ("ps", "torch")):
            eval(ast.unparse(node), namespace)
        if isinstance(node, ast.Call) and is_of(node.func, ("ps", "fit")):
            function = eval(ast.unparse(node.func), namespace)
            given = [arg for arg in node.args if not isinstance(arg, ast.Starred)]
            inspect.signature(function).bind(*given, **{k.arg: k.value for k in node.keywords if k.arg})


def is_of(node: ast.AST, roots: tuple[str, ...]) -> bool:
    """Whether a dotted name begins with one of these."""
    while isinstance(node, ast.Attribute):
        node = node.value
    return isinstance(node, ast.Name) and node.id in roots


@pytest.mark.parametrize("line", ["ps.loggers.weights()", "ps.loggers.wandb(projekt='a')", "ps.loggers.wandb('a')"])
def test_a_wrong_line_that_is_only_looked_at_is_found(line, page):
    with pytest.raises((AttributeError, TypeError)):
        check_calls(line, page)


@pytest.mark.parametrize("line", ["torchrun --processes 4 train.py", "purestep run train.py --plan nowhere"])
def test_a_wrong_command_that_is_only_looked_at_is_found(line, page):
    with contextlib.redirect_stderr(io.StringIO()), pytest.raises((AssertionError, SystemExit)):
        check_command(line.split())


# --- counts -----------------------------------------------------------------------------------------------------------


def counted(priority: str) -> tuple[int, int]:
    of = [row for row in ROWS if row.priority == priority]
    return sum(not row.absent for row in of), len(of)


def test_the_counts_at_the_top_are_those_of_the_rows():
    (a, all_a), (b, all_b), (_, c) = (counted(p) for p in "ABC")
    found = f"| {a} of {all_a} have their line | {b} of {all_b} have their line | {c} are named, with what stands in |"
    shown = next(line for line in TEXT.splitlines() if "are named, with what" in line)
    assert shown == found


def test_a_row_has_a_line_or_says_that_it_has_none():
    assert [str(row) for row in ROWS if row.priority in "AB" and bool(row.lines) == row.absent] == []
    names = [(row.section, row.names) for row in ROWS]
    assert len(set(names)) == len(names)


# --- what Lightning has: read from its sources, never imported --------------------------------------------------------


@functools.cache
def lightning(file: str) -> ast.Module:
    spec = importlib.util.find_spec("lightning")
    if spec is None or spec.origin is None:
        pytest.skip("lightning is not installed")
    return ast.parse((Path(spec.origin).parent / file).read_text())


def exported(file: str) -> set[str]:
    """The classes that a package imports from its files."""
    imports = [node for node in lightning(file).body if isinstance(node, ast.ImportFrom)]
    return {alias.name for node in imports for alias in node.names if alias.name[0].isupper()}


def methods(file: str, name: str) -> dict[str, ast.FunctionDef]:
    (found,) = [n for n in ast.walk(lightning(file)) if isinstance(n, ast.ClassDef) and n.name == name]
    return {n.name: n for n in found.body if isinstance(n, ast.FunctionDef)}


def trainer_arguments() -> set[str]:
    return {argument.arg for argument in methods("pytorch/trainer/trainer.py", "Trainer")["__init__"].args.kwonlyargs}


def fabric_methods() -> set[str]:
    return {name for name in methods("fabric/fabric.py", "Fabric") if not name.startswith("_")}


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(trainer_arguments, id="Trainer"),
        pytest.param(lambda: exported("pytorch/callbacks/__init__.py"), id="callbacks"),
        pytest.param(lambda: exported("pytorch/loggers/__init__.py") - {"Logger"}, id="loggers"),
        pytest.param(lambda: exported("pytorch/profilers/__init__.py"), id="profilers"),
        pytest.param(
            lambda: exported("fabric/plugins/environments/__init__.py") - {"ClusterEnvironment"}, id="environments"
        ),
        pytest.param(fabric_methods, id="Fabric"),
    ],
)
def test_everything_of_lightning_has_a_row(names):
    there = {word for row in ROWS for name in row.names for word in re.findall(r"\w+", name)}
    wanted = names()
    assert len(wanted) > 5
    assert wanted - there == set()
