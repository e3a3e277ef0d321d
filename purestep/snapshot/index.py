"""The list of what counts as a snapshot in a directory.

A directory counts when it is named by its step, and its `meta/data.json` is whole and says the same step. A step that
was saved again lies in `<step>.1`, `<step>.2`, ...; until its writer has removed the earlier revisions, the highest one
that is whole counts. The file is read once and remembered by its inode, time and size. Nothing here changes a file.
"""

from __future__ import annotations

import os
import re
import threading
from dataclasses import dataclass, field
from pathlib import Path

from purestep.errors import SnapshotError
from purestep.snapshot.keep import Record
from purestep.snapshot.manifest import DATA, Header, read_header

_Stamp = tuple[int, int, int]
_NAME = re.compile(r"(0|[1-9][0-9]{0,18})(?:[.]([1-9][0-9]{0,18}))?", re.ASCII)
_LISTINGS = 5  # how often a directory that changes meanwhile is listed


@dataclass(frozen=True)
class Entry:
    """One directory named by a step: its header, or the reason why it is no snapshot.

    Attributes:
        step: from its name.
        path: of the directory.
        header: what lists it; None when it is damaged.
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
    _seen: dict[Path, tuple[_Stamp, Entry]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def revisions(self) -> list[Entry]:
        """Return every directory that is or was a snapshot, in order of step and revision; strays are left out."""
        with self._lock:
            for _ in range(_LISTINGS):
                before = _changed(self.root)
                found = [entry for name in _named(self.root) if (entry := self._entry(*name)) is not None]
                # Beside a writer a listing may miss what was renamed meanwhile, and name what is deleted by now.
                if found and _changed(self.root) == before and all(entry.path.exists() for entry in found):
                    break
                if before is None:
                    break
            self._seen = {entry.path: self._seen[entry.path] for entry in found if entry.path in self._seen}
        return found

    def entries(self) -> list[Entry]:
        """Return one directory for each step, in order: its highest revision that can be listed, else the highest."""
        chosen: dict[int, Entry] = {}
        for entry in self.revisions():
            if entry.header is not None or entry.step not in chosen or chosen[entry.step].header is None:
                chosen[entry.step] = entry
        return list(chosen.values())

    def superseded(self) -> list[Entry]:
        """Return the revisions below a whole one of their step: what a writer that died could not delete any more."""
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
            # Every committed snapshot has it: with our parts but without it, one was damaged; anything else is a stray.
            return Entry(step, path, None, f"{DATA} is missing", revision) if is_ours(path) else None
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if path in self._seen and self._seen[path][0] == stamp:
            return self._seen[path][1]
        entry = _read(step, path, revision)
        self._seen[path] = (stamp, entry)
        return entry


def directory_name(step: int, revision: int = 0) -> str:
    """Return the name of the directory of a step that had been saved so many times before.

    Example:
        >>> directory_name(40), directory_name(40, 1)
        ('40', '40.1')
    """
    return f"{step}.{revision}" if revision else str(step)


def next_revision(root: Path, step: int) -> int:
    """Return the first revision of a step above all that are there, strays of another owner included."""
    taken = [revision for number, revision in _named(root, directories=False) if number == step]
    return max(taken, default=-1) + 1


def is_ours(path: Path) -> bool:
    """Tell whether a directory was written by this package, whole or not."""
    return not path.is_symlink() and any((path / part).is_dir() for part in ("meta", "parts"))


def listed(steps: list[int]) -> str:
    """Return steps as a message lists them: the last few."""
    return ", ".join(["..."] * (len(steps) > 10) + [str(step) for step in steps[-10:]])


def _changed(root: Path) -> int | None:
    try:
        return os.stat(root).st_mtime_ns
    except OSError:
        return None


def _named(root: Path, *, directories: bool = True) -> list[tuple[int, int]]:
    """Return (step, revision) of the directories (or of anything) under a root that have such a name, in order."""
    try:
        with os.scandir(root) as items:
            names = [item.name for item in items if not directories or item.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    found = [match for name in names if (match := _NAME.fullmatch(name))]
    return sorted((int(match[1]), int(match[2] or 0)) for match in found)


def _read(step: int, path: Path, revision: int) -> Entry:
    try:
        header = read_header(path)
    except SnapshotError as error:
        return Entry(step, path, None, str(error), revision)
    if header.step != step:
        reason = f"{path} holds the snapshot of step {header.step}: it was copied or renamed"
        return Entry(step, path, None, reason, revision)
    return Entry(step, path, header, revision=revision)
