"""Directories that appear complete or not at all, and that survive a power cut.

It owns temporary names, fsync, the rename that commits, and removal. It does not know the content of the files.
"""

from __future__ import annotations

import contextlib
import itertools
import os
import shutil
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

MARK = ".purestep-tmp-"  # in the name of every directory that is not yet, or no longer, a snapshot
_SYNC_THREADS = 8
_numbers = itertools.count()
_active: set[Path] = set()  # temporary directories that this process is writing
_left: set[Path] = set()  # temporary directories that this process has tried to remove, and could not


def begin(root: Path, name: str, token: str | None = None) -> Path:
    """Make and return a temporary directory under an existing root.

    Args:
        root: the directory.
        name: the name that it will be committed under.
        token: unique in this root; by default a new one.
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
    """Return a name that no file of this directory has or had: not of this process, nor of another host."""
    return f"{os.getpid()}-{next(_numbers)}-{os.urandom(4).hex()}"


def make_root(root: Path, *, parents: bool = True) -> None:
    """Make a directory durably; with `parents` its missing parents too, else a missing parent is an error."""
    missing = [path for path in (root, *root.parents) if not path.exists()]
    root.mkdir(parents=parents, exist_ok=True)
    for path in missing:
        fsync(path.parent)  # the name of a new directory is in its parent


def write(directory: Path, files: Mapping[str, bytes]) -> None:
    """Write small files, by their relative names."""
    for name, content in files.items():
        path = directory / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)


def fsync(path: Path) -> None:
    """Write a file or a directory through to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def fsync_tree(directory: Path, *, skip: Path | None = None) -> None:
    """Write everything under a directory through to the disk, files before the directories that name them.

    Args:
        directory: the directory.
        skip: a directory under it whose content is on the disk already.
    """
    directories, files = [], []
    for parent, subdirectories, names in os.walk(directory):
        directories.append(Path(parent))
        files += [Path(parent, name) for name in names]
        subdirectories[:] = [name for name in subdirectories if Path(parent, name) != skip]
    # Each call waits for a flush of the device; calls from several threads share one flush.
    with ThreadPoolExecutor(_SYNC_THREADS) as pool:
        list(pool.map(fsync, files))
        list(pool.map(fsync, directories))


def commit(temporary: Path, final: Path, *, synced: Path | None = None) -> None:
    """Make a temporary directory the final one, in one step that is durable on return.

    Args:
        temporary: from `begin`.
        final: its name from now on.
        synced: a directory in it that `fsync_tree` has written through already.
    """
    # Content before name: after a power cut the name must not exist with files that are empty or cut short.
    fsync_tree(temporary, skip=synced)
    os.rename(temporary, final)
    try:
        fsync(final.parent)
    except OSError:
        # The new name may not survive a power cut, so this save is reported as failed; then it must not be found later.
        with contextlib.suppress(OSError):
            os.rename(final, temporary)
        raise
    _active.discard(temporary)


def abandon(temporary: Path) -> None:
    """Remove a temporary directory; errors are ignored, because `retry` and `clean` try again."""
    shutil.rmtree(temporary, ignore_errors=True)
    _active.discard(temporary)
    if _may_exist(temporary):
        _left.add(temporary)
    else:
        _left.discard(temporary)


def retry(root: Path) -> None:
    """Try again to remove what this process has abandoned under a root: the disk may have been mended since."""
    for path in [path for path in _left if path.parent == root]:
        abandon(path)


def remove(directory: Path) -> None:
    """Remove a committed directory, so that a reader never takes a half-removed one for a snapshot."""
    # Renamed before its files are removed, and the rename is durable before that: after a power cut in between, the
    # directory is there with all its files under its old name, or under a temporary one.
    with contextlib.suppress(FileNotFoundError):
        renamed = rename_to_temporary(directory)
        try:
            fsync(directory.parent)
        except OSError:
            _active.discard(renamed)  # so that the next `clean` removes it
            raise
        abandon(renamed)


def rename_to_temporary(path: Path) -> Path:
    """Rename a directory to a temporary name, under which the next writer removes it; return the new path."""
    renamed = path.with_name(f"{path.name.partition(MARK)[0]}{MARK}{unique()}")
    _active.add(renamed)
    try:
        os.rename(path, renamed)
    except OSError:
        _active.discard(renamed)  # a network file system may report an error and rename all the same; `clean` finds it
        raise
    return renamed


def _may_exist(path: Path) -> bool:
    try:
        os.lstat(path)
    except FileNotFoundError:
        return False
    except OSError:
        return True  # for example, permission to search the directory above it has gone
    return True


def clean(root: Path) -> None:
    """Remove the temporary directories of dead writers. Only the one writer of that root may call it."""
    for path in root.glob(f"*{MARK}*"):
        if path not in _active:
            shutil.rmtree(path, ignore_errors=True)
