"""A power cut, simulated: what of a directory tree would be on the disk if the machine lost power now.

`Recorder` notes in the running process what each fsync made durable: the bytes of a file, or the entries of a directory.
`cut` rebuilds the tree from these notes alone. What was never forced to the disk is gone, empty, or (as the file system
may have written it in passing) there: a draw decides for each.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import threading
from pathlib import Path


class Recorder:
    """Notes of one process, in a directory of its own: one file for each fsync, numbered in order.

    Args:
        shadow: directory of the notes; later processes go on in it.
        run_dir: the tree. When there are no notes yet, all that it holds is taken as durable: the machine has just
            started.
    """

    def __init__(self, shadow: Path, run_dir: Path) -> None:
        self.shadow = shadow
        self._lock = threading.Lock()
        if shadow.exists():
            return
        shadow.mkdir(parents=True)
        for path in _places(run_dir).values() if run_dir.exists() else ():
            self._keep(str(path))

    def note(self, name: str, path: str) -> None:
        """Hear of an operation that is about to happen: fsync keeps what is there now, and what is removed is lost."""
        if name in ("unlink", "rmdir"):
            self._forget(path)
        elif name == "fsync":
            self._keep(path)

    def _keep(self, path: str) -> None:
        status = os.stat(path)
        partial = self.shadow / f"{status.st_ino}.partial"
        with self._lock:
            if os.path.isdir(path):
                partial.write_text(json.dumps({entry.name: entry.inode() for entry in os.scandir(path)}))
                partial.rename(_listing(self.shadow, status.st_ino))
            else:
                shutil.copyfile(path, partial)
                partial.rename(_content(self.shadow, status.st_ino))

    def _forget(self, path: str) -> None:
        try:
            inode = os.lstat(path).st_ino
        except OSError:
            return
        with self._lock:
            _listing(self.shadow, inode).unlink(missing_ok=True)
            _content(self.shadow, inode).unlink(missing_ok=True)


def _listing(shadow: Path, inode: int) -> Path:
    return shadow / f"{inode}.entries"


def _content(shadow: Path, inode: int) -> Path:
    return shadow / f"{inode}.bytes"


def cut(run_dir: Path, shadow: Path, *, seed: int, durable_only: bool) -> None:
    """Turn a run directory into what a power cut at this moment leaves of it.

    Args:
        run_dir: the directory; its process has been killed. That it exists is taken as durable.
        shadow: notes of the `Recorder`.
        seed: of what survives by luck.
        durable_only: nothing survives by luck: only what was forced to the disk is there.
    """
    draw = random.Random(seed)
    rebuilt = run_dir.with_name(f"{run_dir.name}.after-cut")
    shutil.rmtree(rebuilt, ignore_errors=True)
    places = _places(run_dir)

    def lucky() -> bool:
        return not durable_only and draw.random() < 0.5

    def rebuild(inode: int, target: Path) -> None:
        now, listing, content = places.get(inode), _listing(shadow, inode), _content(shadow, inode)
        if listing.exists() or (now is not None and now.is_dir()):
            target.mkdir()
            entries = json.loads(listing.read_text()) if listing.exists() else {}
            present = {entry.name: entry.inode() for entry in os.scandir(now)} if now is not None else {}
            for name in sorted({*entries, *present}):
                # An entry that was added, removed or renamed since the last fsync is as it was, or as it is by luck.
                settled = entries.get(name) == present.get(name)
                chosen = present.get(name) if settled or lucky() else entries.get(name)
                if chosen is not None and (chosen in places or _known(shadow, chosen)):
                    rebuild(chosen, target / name)
        elif now is not None and lucky():
            shutil.copyfile(now, target)
        elif content.exists():
            shutil.copyfile(content, target)
        else:
            target.write_bytes(b"")

    rebuild(run_dir.stat().st_ino, rebuilt)
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


def _known(shadow: Path, inode: int) -> bool:
    return _listing(shadow, inode).exists() or _content(shadow, inode).exists()
