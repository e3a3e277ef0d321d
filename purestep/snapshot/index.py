"""The list of what counts as a snapshot in a directory.

A directory counts when it is named by its step, and its `meta/data.json` is whole and says the same step. That file is
read once and remembered by its inode, time and size. Nothing here changes a file.
"""

from __future__ import annotations

import os
import threading
from dataclasses import dataclass, field
from pathlib import Path

from purestep.errors import SnapshotError
from purestep.snapshot.keep import Record
from purestep.snapshot.manifest import DATA, Header, read_header

_Stamp = tuple[int, int, int]
_LISTINGS = 5  # how often a directory that changes meanwhile is listed


@dataclass(frozen=True)
class Entry:
    """One directory named by a step: its header, or the reason why it is no snapshot."""

    step: int
    path: Path
    header: Header | None
    reason: str = ""


@dataclass
class Index:
    """The snapshots under a root, which need not exist yet."""

    root: Path
    _seen: dict[int, tuple[_Stamp, Entry]] = field(default_factory=dict)
    _lock: threading.Lock = field(default_factory=threading.Lock)

    def entries(self) -> list[Entry]:
        """Return the directories that are or were snapshots, in order of step; strays are left out."""
        with self._lock:
            for _ in range(_LISTINGS):
                before = _changed(self.root)
                steps = _numbered(self.root)
                found = [entry for step in steps if (entry := self._entry(step)) is not None]
                # Beside a writer a listing may miss what was renamed meanwhile, and name what is deleted by now.
                if found and _changed(self.root) == before and all(entry.path.exists() for entry in found):
                    break
                if before is None:
                    break
            self._seen = {entry.step: self._seen[entry.step] for entry in found if entry.step in self._seen}
        return found

    def steps(self) -> list[int]:
        """Return the steps of the snapshots, in order."""
        return [entry.step for entry in self.entries() if entry.header is not None]

    def records(self) -> list[Record]:
        """Return (step, metrics) of the snapshots, in order."""
        return [(entry.step, entry.header.metrics) for entry in self.entries() if entry.header is not None]

    def _entry(self, step: int) -> Entry | None:
        path = self.root / str(step)
        try:
            status = os.stat(path / DATA)
        except OSError:
            # Every committed snapshot has it: with our parts but without it, one was damaged; anything else is a stray.
            ours = (path / "parts").is_dir() or (path / "meta").is_dir()
            return Entry(step, path, None, f"{DATA} is missing") if ours else None
        stamp = (status.st_ino, status.st_mtime_ns, status.st_size)
        if step in self._seen and self._seen[step][0] == stamp:
            return self._seen[step][1]
        entry = _read(step, path)
        self._seen[step] = (stamp, entry)
        return entry


def listed(steps: list[int]) -> str:
    """Return steps as a message lists them: the last few."""
    return ", ".join(["..."] * (len(steps) > 10) + [str(step) for step in steps[-10:]])


def _changed(root: Path) -> int | None:
    try:
        return os.stat(root).st_mtime_ns
    except OSError:
        return None


def _numbered(root: Path) -> list[int]:
    try:
        with os.scandir(root) as items:
            names = [item.name for item in items if item.is_dir(follow_symlinks=False)]
    except (FileNotFoundError, NotADirectoryError):
        return []
    # Longer numbers are no steps, and Python refuses to read those of thousands of digits.
    digits = [name for name in names if name.isascii() and name.isdecimal() and len(name) < 20]
    return sorted(int(name) for name in digits if str(int(name)) == name)


def _read(step: int, path: Path) -> Entry:
    try:
        header = read_header(path)
    except SnapshotError as error:
        return Entry(step, path, None, str(error))
    if header.step != step:
        return Entry(step, path, None, f"{path} holds the snapshot of step {header.step}: it was copied or renamed")
    return Entry(step, path, header)
