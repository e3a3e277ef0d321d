"""The base of a run elsewhere: the directories beside its snapshots that hold their frozen leaves, copied once."""

from __future__ import annotations

from collections.abc import Collection
from pathlib import Path

from purestep.errors import CorruptSnapshot, explain
from purestep.remote.contents import COPY, get, parsed, put, sealed
from purestep.remote.files import Files
from purestep.snapshot import durable_directories, free_space
from purestep.snapshot.packing import BASE


def upload(files: Files, root: Path, part: str) -> None:
    """Copy a part from a directory of snapshots, unless it is there.

    Raises:
        FileNotFoundError: the writer has deleted it, with the last snapshot that referred to it.
    """
    top = f"{BASE}/{part}"
    if files.read(f"{top}/{COPY}") is not None:
        return
    files.remove_all(top)  # what an upload that was interrupted has left
    source = root / BASE / part
    if not source.is_dir():
        raise FileNotFoundError(source)
    files.write(f"{top}/{COPY}", sealed(put(files, top, source)))


def download(files: Files, part: str, root: Path) -> None:
    """Copy a part into a directory of snapshots, durably, unless it is there.

    Raises:
        CorruptSnapshot: bytes are missing, or are not those that were copied.
    """
    final, top = root / BASE / part, f"{BASE}/{part}"
    if final.is_dir():
        return
    told = files.read(f"{top}/{COPY}")
    if told is None:
        raise CorruptSnapshot(explain("the base of the remote copy is missing", where=f"{files.url}/{top}"))
    contents = parsed(told, f"{files.url}/{top}/{COPY}")
    durable_directories.make_root(final.parent)
    free_space.check_room(root, sum(content.size for content in contents.values()))
    temporary = durable_directories.begin(final.parent, part)
    try:
        get(files, top, temporary, contents)
        durable_directories.commit(temporary, final)
    except BaseException:
        durable_directories.abandon(temporary)
        raise


def remove_unused(files: Files, used: Collection[str]) -> None:
    """Remove the parts that are not used, so that none is ever listed with a part of its files."""
    for part in {path.partition("/")[0] for path in files.sizes(BASE)} - set(used):
        files.remove(f"{BASE}/{part}/{COPY}")
        files.remove_all(f"{BASE}/{part}")
