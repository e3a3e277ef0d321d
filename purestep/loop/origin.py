"""Where a run comes from: settings, program, command line, commit and parent, in `run.json` of the run directory.

A run writes it at its start and at its end, atomically. `record` reads it; nothing of it is ever executed, and a run
never reads a value from it that its bits depend on.
"""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
import math
import os
import subprocess
import sys
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purestep import _cells
from purestep.errors import ConfigError, explain
from purestep.loggers.base import remove_partials, write_atomically

FILE = "run.json"
FORMAT = 1
_LARGEST = 16 << 20  # bytes of a file that is read: sources of programs, not data
_STARTS = 50  # that are kept: the first one, and the latest
_GIT_SECONDS = 2.0  # a work tree on a slow disk does not hold up the start of a run


@dataclasses.dataclass(frozen=True)
class Program:
    """The code that started a run, and how it was called.

    Attributes:
        module, function: of the place that called `fit`; "<module>" for the top level of a file.
        file: its path, or the name that a notebook gave the cell.
        line: of the call.
        source: the text of that file or cell, "" where it is not known.
        cell: the name of the cell, such as "In[7]"; "" where it is no cell.
        notebook: the file of the notebook, "" where the front end does not name it.
        session: the cells that had run until then in a notebook, that one included: they define what it uses.
        command: the command line of the process.
        directory: the working directory.
        commit: of the git repository that holds the file, None where there is none.
        clean: whether no tracked file differed from that commit; None where it is not known.
    """

    module: str = ""
    function: str = ""
    file: str = ""
    line: int = 0
    source: str = dataclasses.field(default="", repr=False)
    cell: str = ""
    notebook: str = ""
    session: str = dataclasses.field(default="", repr=False)
    command: tuple[str, ...] = ()
    directory: str = ""
    commit: str | None = None
    clean: bool | None = None


def caller() -> Program:
    """Describe the nearest caller that is not purestep itself; its commit is not asked for yet."""
    frame = _cells.caller()
    if frame is None:
        return Program(command=tuple(sys.orig_argv), directory=_working_directory())
    notebook = _cells.notebook()
    return Program(
        module=str(frame.f_globals.get("__name__", "")),
        function=frame.f_code.co_qualname,
        file=frame.f_code.co_filename,
        line=frame.f_lineno,
        source=_cells.source(frame),
        cell=_cells.cell_name(frame.f_code.co_filename),
        notebook="" if notebook is None else str(notebook),
        session=_cells.session(),
        command=tuple(sys.orig_argv),
        directory=_working_directory(),
    )


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode("utf-8", "replace")).hexdigest() if text else ""


def _working_directory() -> str:
    try:
        return os.getcwd()
    except OSError:  # it was deleted
        return ""


def with_commit(program: Program) -> Program:
    """Return the program with the commit that its file is at, as far as git says so in time."""
    file = Path(program.notebook or program.file)
    directory = file.parent if file.is_file() else Path(program.directory or ".")
    # A file system monitor that the repository configures would be a program that it starts.
    command = ["git", "-c", "core.fsmonitor=false", "-C", str(directory.absolute())]
    command += ["status", "--porcelain=v2", "--branch", "--untracked-files=no"]
    environment = {**os.environ, "GIT_OPTIONAL_LOCKS": "0", "LC_ALL": "C"}
    try:
        done = subprocess.run(command, capture_output=True, timeout=_GIT_SECONDS, env=environment, check=False)
    except (OSError, subprocess.SubprocessError, ValueError):
        return program
    lines = done.stdout.decode("utf-8", "replace").splitlines()
    heads = [line.rpartition(" ")[2] for line in lines if line.startswith("# branch.oid ")]
    if done.returncode or not heads:
        return program
    clean = not any(not line.startswith("#") for line in lines)
    return dataclasses.replace(program, commit=heads[0], clean=clean)


# --- settings ---------------------------------------------------------------------------------------------------------


def plain_settings(settings: object) -> dict[str, Any]:
    """Return a copy of the settings of a run as JSON holds them: tuples become lists.

    Raises:
        ConfigError: something in them is no JSON.

    Examples:
        >>> plain_settings({"lr": 0.1, "widths": (8, 8)})
        {'lr': 0.1, 'widths': [8, 8]}
    """
    if not isinstance(settings, Mapping):
        raise ConfigError(
            explain("settings= are names and values", where=f"settings={settings!r}", instead="settings={'lr': 0.1}")
        )
    return {str(name): _plain(name, value, f"settings[{name!r}]") for name, value in settings.items()}


def _plain(name: object, value: object, path: str) -> Any:
    if isinstance(name, str):
        if value is None or type(value) in (bool, int, str) or (type(value) is float and math.isfinite(value)):
            return value
        if isinstance(value, Mapping):
            return {str(key): _plain(key, item, f"{path}[{key!r}]") for key, item in value.items()}
        if isinstance(value, (list, tuple)):
            return [_plain("", item, f"{path}[{index}]") for index, item in enumerate(value)]
    shown = repr(value)
    raise ConfigError(
        explain(
            "settings are JSON: numbers, strings, booleans, None, lists and mappings of them by name",
            where=f"{path} = {shown if len(shown) <= 100 else shown[:97] + '...'}",
            why="they are written into the run directory and shown in tables; what a run computes with is passed to it",
            instead="a number or a name that stands for it, such as settings={'model': 'small', 'lr': 0.1}",
        )
    )


# --- the file ---------------------------------------------------------------------------------------------------------


def read(run_dir: Path) -> dict[str, Any]:
    """Return what `run.json` holds; empty where there is none: the run was of an earlier version.

    Raises:
        ValueError: it is damaged, or of a later format.
    """
    path = run_dir / FILE
    try:
        with path.open("rb") as file:
            content = file.read(_LARGEST + 1)
    except FileNotFoundError:
        return {}
    except OSError as error:
        raise ValueError(f"{path}: {error.strerror or error}") from error
    if len(content) > _LARGEST:
        raise ValueError(f"{path} is larger than any that a run writes")
    try:
        found = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} is not JSON: it was cut off or changed") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise ValueError(f"{path} is not of format {FORMAT}")
    return found


def write(run_dir: Path, content: Mapping[str, Any]) -> None:
    """Write `run.json`; a run goes on where that fails, because nothing of it depends on this file."""
    try:
        remove_partials(run_dir / FILE)
        write_atomically(run_dir / FILE, json.dumps({"format": FORMAT, **content}, indent=1) + "\n")
    except OSError as error:
        text = f"{run_dir / FILE} could not be written: {error}\n  training goes on; ps.open and ps.runs know less"
        warnings.warn(text, stacklevel=2)


class Origin:
    """What one run writes about itself. Only the first rank has one, and only with a run directory.

    Args:
        run_dir: of the run, which holds its lock.
        program: that started it.
        settings: of the run, as JSON.
    """

    def __init__(self, run_dir: Path, program: Program, settings: Mapping[str, Any]) -> None:
        self.run_dir = run_dir
        self._program, self._settings = program, settings
        self._content: dict[str, Any] = {}
        self._known: dict[str, Any] = {}  # what was recorded before, by starts that trained what there is
        self._at = 0

    def begin(self, at: int | None) -> None:
        """Note a start, at the snapshot `at` or at the beginning."""
        known: dict[str, Any] = {}
        with contextlib.suppress(ValueError):  # a damaged one is written anew
            known = read(self.run_dir)
        program = with_commit(self._program)
        start = {**dataclasses.asdict(program), "time": time.time(), "at": at or 0}
        # A source is kept once for all starts that had it.
        texts = {_digest(text): text for text in (program.source, program.session) if text}
        start["source"], start["session"] = _digest(program.source), _digest(program.session)
        earlier = known.get("starts", []) if at is not None else []
        earlier = [old for old in earlier if isinstance(old, dict)] if isinstance(earlier, list) else []
        self._known, self._at = known if earlier else {}, at or 0
        starts = [*earlier[:1], *earlier[1:][-(_STARTS - 2) :], start]
        old = known.get("sources")
        sources = {**(old if isinstance(old, dict) else {}), **texts}
        used = {item.get(name) for item in starts for name in ("source", "session")}
        self._content = {
            "settings": dict(self._settings),
            "parent": known.get("parent"),
            "starts": starts,
            "sources": {name: text for name, text in sources.items() if name in used},
            "end": None,
        }
        write(self.run_dir, self._content)

    def end(self, reason: str, batches: int) -> None:
        """Note why and where the run ended.

        A start that trained nothing leaves the settings as they were: what is stored was not computed with its own. One
        that found the run at its end leaves nothing at all.
        """
        if not self._content:
            return
        self._content["end"] = {"reason": reason, "time": time.time(), "batches": batches}
        if self._known and batches == self._at:
            old = self._known.get("end")
            ended = isinstance(old, dict) and (old.get("reason"), old.get("batches")) == (reason, batches)
            self._content = self._known if ended else {**self._content, "settings": self._known.get("settings")}
        write(self.run_dir, self._content)
