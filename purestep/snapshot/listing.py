"""The list of the snapshots in a directory.

A subdirectory is a snapshot if its name is a step and its `meta/data.json` is intact and names the same step. A step
that was saved again is in `<step>.1`, `<step>.2`, ...; until the writer has removed the earlier revisions, the highest
intact one counts. The file is read once and cached by its inode, time and size. Nothing here changes a file.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from purestep import _cells
from purestep.arguments import Location, checked
from purestep.errors import SnapshotError
from purestep.snapshot.header import DATA, Header, read_header
from purestep.snapshot.retention import Record

DIRECTORY = "snapshots"  # where a run keeps them, under its run directory
_Stamp = tuple[int, int, int]
_NAME = re.compile(r"(0|[1-9][0-9]{0,18})(?:[.]([1-9][0-9]{0,18}))?", re.ASCII)
_LISTINGS = 5  # how often a directory is listed again that a writer changes during the listing


@dataclass(frozen=True)
class Entry:
    """One directory named by a step: its header, or the reason why it is no snapshot.

    Attributes:
        step: from its name.
        path: of the directory.
        header: of its manifest; None when it is damaged.
        reason: why there is no header.
        revision: how many times the step had been saved before.
    """

    step: int
    path: Path
    header: Header | None
    reason: str = ""
    revision: int = 0


@dataclass
class Index:
    """The snapshots under a root, which need not exist yet."""

    root: Path
    _cache: dict[Path, tuple[_Stamp, Entry]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def revisions(self) -> list[Entry]:
        """Return every directory that is or was a snapshot, in order of step and revision, and no other directory."""
        with self._lock:
            for _ in range(_LISTINGS):
                before = _modified(self.root)
                entries = [entry for name in _names(self.root) if (entry := self._entry(*name)) is not None]
                # A listing made while a writer renames may miss the new name, and may have one that is deleted by now.
                if entries and _modified(self.root) == before and all(entry.path.exists() for entry in entries):
                    break
                if before is None:
                    break
            self._cache = {entry.path: self._cache[entry.path] for entry in entries if entry.path in self._cache}
        return entries

    def entries(self) -> list[Entry]:
        """Return one directory for each step, in order: its highest intact revision, else the highest."""
        by_step: dict[int, Entry] = {}
        for entry in self.revisions():
            if entry.header is not None or entry.step not in by_step or by_step[entry.step].header is None:
                by_step[entry.step] = entry
        return list(by_step.values())

    def superseded(self) -> list[Entry]:
        """Return the revisions below an intact one of their step, which a writer that died did not delete."""
        current = {entry.step: entry.revision for entry in self.entries() if entry.header is not None}
        return [entry for entry in self.revisions() if entry.revision < current.get(entry.step, 0)]

    def steps(self) -> list[int]:
        """Return the steps of the snapshots, in order."""
        return [entry.step for entry in self.entries() if entry.header is not None]

    def records(self) -> list[Record]:
        """Return (step, metrics) of the snapshots, in order."""
        return [(entry.step, entry.header.metrics) for entry in self.entries() if entry.header is not None]

    def _entry(self, step: int, revision: int) -> Entry | None:
        path = self.root / directory_name(step, revision)
        try:
            status = os.stat(path / DATA)
        except OSError:
            # Every committed snapshot has this file. A directory with our subdirectories and without it is a damaged
            # snapshot; any other one is not ours.
            return Entry(step, path, None, f"{DATA} is missing", revision) if is_ours(path) else None
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if path in self._cache and self._cache[path][0] == stamp:
            return self._cache[path][1]
        entry = _read(step, path, revision)
        self._cache[path] = (stamp, entry)
        return entry


def newest(root: Path) -> Entry | None:
    """Return the newest intact snapshot and read no manifest besides; a damaged one where none is, None without any.

    It is for tables of many runs. Where a writer is at work it may miss the newest.
    """
    damaged: Entry | None = None
    for step, revision in reversed(_names(root)):
        entry = _read(step, root / directory_name(step, revision), revision)
        if entry.header is not None:
            return entry
        if damaged is None and is_ours(entry.path):
            damaged = entry
    return damaged


def directory_name(step: int, revision: int = 0) -> str:
    """Return the name of the directory of a step that had been saved so many times before.

    Examples:
        >>> directory_name(40), directory_name(40, 1)
        ('40', '40.1')
    """
    return f"{step}.{revision}" if revision else str(step)


def next_revision(root: Path, step: int) -> int:
    """Return the revision above every one of a step that is in use, by files of other programs too."""
    taken = [revision for number, revision in _names(root, directories=False) if number == step]
    return max(taken, default=-1) + 1


def is_ours(path: Path) -> bool:
    """Tell whether a directory was written by this package, intact or not."""
    return not path.is_symlink() and any((path / name).is_dir() for name in ("meta", "parts"))


def listed(steps: list[int]) -> str:
    """Return the last ten steps as text for a message."""
    return ", ".join(["..."] * (len(steps) > 10) + [str(step) for step in steps[-10:]])


def _modified(root: Path) -> int | None:
    try:
        return os.stat(root).st_mtime_ns
    except OSError:
        return None


def _names(root: Path, *, directories: bool = True) -> list[tuple[int, int]]:
    """Return (step, revision) of each name of a snapshot under a root, in order; with other files on request."""
    try:
        with os.scandir(root) as items:
            names = [item.name for item in items if not directories or item.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    matches = [match for name in names if (match := _NAME.fullmatch(name))]
    return sorted((int(match[1]), int(match[2] or 0)) for match in matches)


def _read(step: int, path: Path, revision: int) -> Entry:
    try:
        header = read_header(path)
    except SnapshotError as error:
        return Entry(step, path, None, str(error), revision)
    if header.step != step:
        reason = f"{path} holds the snapshot of step {header.step}: it was copied or renamed"
        return Entry(step, path, None, reason, revision)
    return Entry(step, path, header, revision=revision)


@checked(SnapshotError)
def root_of(run_dir: Location) -> Path:
    """Return the directory of the snapshots of a run; a directory that holds none below is taken for it."""
    path = _cells.located(run_dir)
    nested = path / DIRECTORY
    return nested if nested.is_dir() else path
