"""A simulated power cut: the directory tree that would be on the disk if the machine lost power now.

`Recorder` records in the running process what each fsync made durable: the bytes of a file, or the entries of a
directory. `cut` rebuilds the tree from these records. Data without an fsync is missing, empty, or present (the file
system may have written it already), at random for each file.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import threading
from pathlib import Path


class Recorder:
    """The records of the durable data, one file for each file or directory.

    Args:
        shadow: directory of the records; later processes continue them.
        run_dir: the tree. If there are no records yet, all its files count as durable, as after a start of the machine.
    """

    def __init__(self, shadow: Path, run_dir: Path) -> None:
        self.shadow = shadow
        self._lock = threading.Lock()
        if shadow.exists():
            return
        shadow.mkdir(parents=True)
        for path in _places(run_dir).values() if run_dir.exists() else ():
            self._keep(str(path))

    def note(self, name: str, path: str, target: str = "") -> None:
        """Record an operation that is about to happen: an fsync keeps the present content."""
        if name in ("unlink", "rmdir"):
            self._forget(path)
        elif name in ("rename", "replace"):
            self._forget(target)
        elif name == "fsync":
            self._keep(path)

    def _keep(self, path: str) -> None:
        status = os.stat(path)
        with self._lock:
            key = _key(self.shadow, status.st_ino)
            partial = self.shadow / f"{key}.partial"
            if os.path.isdir(path):
                partial.write_text(json.dumps(_entries(self.shadow, Path(path))))
                partial.rename(self.shadow / f"{key}.entries")
            else:
                shutil.copyfile(path, partial)
                partial.rename(self.shadow / f"{key}.bytes")

    def _forget(self, path: str) -> None:
        """Forget a deleted file, because its inode may be reused for another."""
        with contextlib.suppress(OSError):
            inode = os.lstat(path).st_ino
            with self._lock:
                (self.shadow / f"{inode}.version").write_text(str(_version(self.shadow, inode) + 1))


def _version(shadow: Path, inode: int) -> int:
    path = shadow / f"{inode}.version"
    return int(path.read_text()) if path.exists() else 0


def _key(shadow: Path, inode: int) -> str:
    """Return the name of the file that has an inode now."""
    return f"{inode}.{_version(shadow, inode)}"


def _entries(shadow: Path, directory: Path) -> dict[str, str]:
    return {entry.name: _key(shadow, entry.inode()) for entry in os.scandir(directory)}


def cut(run_dir: Path, shadow: Path, *, seed: int, durable_only: bool) -> None:
    """Replace a run directory by the files that a power cut at this moment leaves.

    Args:
        run_dir: the directory, whose process has been killed; its own existence counts as durable.
        shadow: records of the `Recorder`.
        seed: seed of the data without an fsync that survives.
        durable_only: whether only data with an fsync survives.
    """
    draw = random.Random(seed)
    rebuilt = run_dir.with_name(f"{run_dir.name}.after-cut")
    shutil.rmtree(rebuilt, ignore_errors=True)
    places = {_key(shadow, inode): path for inode, path in _places(run_dir).items()}

    def lucky() -> bool:
        return not durable_only and draw.random() < 0.5

    def rebuild(key: str, target: Path) -> None:
        now, listing, content = places.get(key), shadow / f"{key}.entries", shadow / f"{key}.bytes"
        if now.is_dir() if now is not None else listing.exists():
            target.mkdir()
            entries = json.loads(listing.read_text()) if listing.exists() else {}
            present = {} if now is None else _entries(shadow, now)
            for name in sorted({*entries, *present}):
                # An entry that was added, removed or renamed since the last fsync has its old or new form, at random.
                chosen = present.get(name) if entries.get(name) == present.get(name) or lucky() else entries.get(name)
                if chosen is not None:
                    rebuild(chosen, target / name)
        elif now is not None and lucky():
            shutil.copyfile(now, target)
        elif content.exists():
            shutil.copyfile(content, target)
        else:
            target.write_bytes(b"")

    rebuild(_key(shadow, run_dir.stat().st_ino), rebuilt)
    shutil.rmtree(run_dir)
    rebuilt.rename(run_dir)
    shutil.rmtree(shadow)


def _places(root: Path) -> dict[int, Path]:
    found = {root.stat().st_ino: root}
    for parent, below, names in os.walk(root):
        for name in (*below, *names):
            path = Path(parent, name)
            found[path.lstat().st_ino] = path
    return found
