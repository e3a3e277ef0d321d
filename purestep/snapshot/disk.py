"""Directories that appear whole or not at all, and that survive a power cut.

It owns temporary names, fsync, the rename that commits, and removal. It knows nothing of what the files hold.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MARK = ".purestep-tmp-"  # in the name of everything that is not, or no longer, a snapshot
_SYNC_THREADS = 8
_numbers = itertools.count()
_active: set[Path] = set()  # temporary directories that this process is writing


def begin(root: Path, name: str, token: str | None = None) -> Path:
    """Make and return a temporary directory under an existing root.

    Args:
        root: the directory.
        name: what it is to become.
        token: what nothing else there has in its name; made by default.
    """
    path = temporary_path(root, name, token or unique())
    _active.add(path)
    try:
        path.mkdir()
    except OSError:
        _active.discard(path)
        raise
    return path


def temporary_path(root: Path, name: str, token: str) -> Path:
    """Return the path of a temporary directory."""
    return root / f"{name}{MARK}{token}"


def unique() -> str:
    """Return a name that nothing else in this directory has or had, whichever machine wrote it."""
    return f"{os.getpid()}-{next(_numbers)}-{os.urandom(4).hex()}"


def make_root(root: Path, *, parents: bool = True) -> None:
    """Make a directory, and its parents unless they have to be there, durably."""
    missing = [path for path in (root, *root.parents) if not path.exists()]
    root.mkdir(parents=parents, exist_ok=True)
    for path in missing:
        fsync(path.parent)


def write(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write small files, by their relative names."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def fsync(path: Path) -> None:
    """Force a file or a directory to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path, *, skip: Path | None = None) -> None:
    """Force all that lies under a directory to the disk, files before the directories that name them.

    Args:
        directory: the directory.
        skip: a directory under it whose content has been forced already.
    """
    directories, files = [], []
    for parent, below, names in os.walk(directory):
        directories.append(Path(parent))
        files += [Path(parent, name) for name in names]
        below[:] = [name for name in below if Path(parent, name) != skip]
    # Each waits for the device; from several threads they share its flushes.
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:
        list(pool.map(fsync, files))
        list(pool.map(fsync, directories))


def commit(temporary: Path, final: Path, *, synced: Path | None = None) -> None:
    """Make a temporary directory the final one, in one step that is durable on return.

    Args:
        temporary: from `begin`.
        final: its name from now on.
        synced: a directory in it that `fsync_tree` has forced to the disk already.
    """
    fsync_tree(temporary, skip=synced)
    os.rename(temporary, final)
    try:
        fsync(final.parent)
    except OSError:  # the new name may not survive a power cut: what is told as failed must not be found later
        with contextlib.suppress(OSError):
            os.rename(final, temporary)
        raise
    _active.discard(temporary)


def abandon(temporary: Path) -> None:
    """Remove a temporary directory, as far as the disk lets us."""
    shutil.rmtree(temporary, ignore_errors=True)
    _active.discard(temporary)


def remove(directory: Path) -> None:
    """Remove a committed directory so that no half of it can ever be taken for a whole."""
    with contextlib.suppress(FileNotFoundError):
        trash = set_aside(directory)
        try:
            fsync(directory.parent)
        except OSError:
            _active.discard(trash)  # so that the next `clean` removes it
            raise
        abandon(trash)


def set_aside(path: Path) -> Path:
    """Rename something to a temporary name that the next writer removes."""
    trash = path.with_name(f"{path.name.partition(MARK)[0]}{MARK}{unique()}")
    _active.add(trash)
    try:
        os.rename(path, trash)
    except OSError:
        _active.discard(trash)  # a network file system may have done it all the same; then `clean` finds it
        raise
    return trash


def clean(root: Path) -> None:
    """Remove what dead writers left in a root. Only the one writer of that root may call it."""
    for path in root.glob(f"*{MARK}*"):
        if path not in _active:
            shutil.rmtree(path, ignore_errors=True)
