"""Whether the next snapshots can be written to a directory: that it can be made and written, and has free space.

It measures and words the errors; `Store.check` and the save itself raise them.
"""

from __future__ import annotations

import errno
import shutil
from pathlib import Path

from purestep.bits import human_bytes
from purestep.errors import SnapshotError, explain
from purestep.snapshot import durable_directories
from purestep.snapshot.retention import Keep

_SLACK = 1 << 20  # bytes of manifest and directories, besides the arrays


def check_writable(root: Path) -> None:
    """Make a directory of snapshots, write a file in it durably, and remove that file.

    Raises:
        SnapshotError: it cannot be made or written; the message names the cause.
    """
    try:
        durable_directories.make_root(root)
        trial = durable_directories.begin(root, "trial")
        try:
            durable_directories.write(trial, {"bytes": bytes(4096)})
            durable_directories.fsync_tree(trial)
        finally:
            durable_directories.abandon(trial)
    except OSError as error:
        raise SnapshotError(
            explain(
                "snapshots cannot be written here",
                where=str(root),
                why=f"{type(error).__name__}: {error}",
                instead="repair it (exists? permissions? mounted read-only? full?), or choose another run_dir=",
            )
        ) from error


def check_room(root: Path, nbytes: int) -> None:
    """Refuse a save of more bytes than are free, before it writes any.

    Raises:
        OSError: ENOSPC, with both numbers.
    """
    free = _free(root)
    if free < nbytes + _SLACK:
        raise OSError(errno.ENOSPC, f"{human_bytes(nbytes + _SLACK)} to write, {human_bytes(free)} free", str(root))


def check_fits(root: Path, nbytes: int) -> None:
    """Refuse a directory in which the next snapshot does not fit.

    Raises:
        SnapshotError: with both numbers.
    """
    try:
        check_room(root, nbytes)
    except OSError as error:
        instead = "free space, or choose another run_dir="
        raise SnapshotError(
            explain("the next snapshot does not fit here", where=str(root), why=error.strerror, instead=instead)
        ) from error


def shortage(root: Path, nbytes: int, policy: Keep, present: int, *, once: int = 0) -> str | None:
    """Return the text of a warning if the snapshots that a policy will keep do not all fit, None if they do.

    A new snapshot is written before an old one is deleted, so one more than the policy keeps must fit.

    Args:
        root: the directory.
        nbytes: of one snapshot.
        policy: how many are kept; of a policy without a bound only the next one must fit.
        present: how many are on disk already.
        once: bytes that are written beside them, once.
    """
    most = policy.most()
    coming = 1 if most is None else max(most + 1 - present, 1)
    free, needed = _free(root), coming * (nbytes + _SLACK) + once
    if free >= needed:
        return None
    return explain(
        f"only {max(free - once, 0) // (nbytes + _SLACK)} of the next {coming} snapshots fit on the disk",
        where=f"{root}: {human_bytes(free)} free, {human_bytes(needed)} needed",
        why=f"{policy} keeps up to {'all' if most is None else most}, of {human_bytes(nbytes)} each and "
        f"{human_bytes(_SLACK)} around it, and a new one is written before an old one is deleted",
        instead="free space, keep fewer, or choose another run_dir=",
    )


def _free(root: Path) -> int:
    present = next(path for path in (root, *root.parents) if path.is_dir())
    return shutil.disk_usage(present).free
