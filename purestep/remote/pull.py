"""Bringing a run from elsewhere onto this disk: the record first, then the snapshots that a policy selects."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from pathlib import Path

from purestep.errors import CorruptSnapshot, SnapshotError, explain
from purestep.remote import copies as copies_
from purestep.remote.copies import Copy, RunFiles
from purestep.remote.files import Files
from purestep.snapshot.listing import DIRECTORY, Index, listed
from purestep.snapshot.retention import Keep


def pull(
    files: Files, copies: Sequence[Copy], told: RunFiles, run_dir: Path, keep: Keep, *, step: int | None = None
) -> list[int]:
    """Bring the record of a run, its newest copy that is intact, and what else a policy selects.

    Args:
        files: where from.
        copies: of snapshots, as listed there.
        told: the other files, as listed there; they replace those on the disk.
        run_dir: where to. Snapshots that are on the disk stay.
        keep: selects among the snapshots here and there.
        step: bring this snapshot, and none after it; an intact newest one by default.

    Returns:
        The steps that were brought.

    Raises:
        CorruptSnapshot: no copy is intact, or not that of `step`.
        SnapshotError: there is no copy, or not of `step`.
    """
    root = run_dir / DIRECTORY
    there = copies_.current(copies)
    if not there or step not in (None, *there):
        which = "no snapshot" if step is None else f"no snapshot of step {step}"
        raise SnapshotError(explain(f"there is {which} in the remote copy", where=_where(files, list(there))))
    run_dir.mkdir(parents=True, exist_ok=True)
    # Stopped between the record and a snapshot, the directory has no snapshot, and the next start comes here again.
    copies_.download_record(files, told, run_dir)
    here = {at: header.metrics for at, header in _headers(root).items()}
    skipped: list[str] = []
    brought: list[int] = []
    first = None
    for at in sorted(there, reverse=True):
        if step is not None and at > step:
            continue
        if at in here or _brought(files, there[at], root, skipped, strict=at == step):
            brought += [] if at in here else [at]
            first = at
            break
    if first is None:
        raise CorruptSnapshot(
            explain("no snapshot of the remote copy is intact", where=files.url, why="\n".join(skipped))
        )
    known = {at: copy.header.metrics for at, copy in there.items() if at <= first} | here
    for at in sorted(keep.select(sorted(known.items())) - {first, *here}, reverse=True):
        if _brought(files, there[at], root, skipped):
            brought.append(at)
    if skipped:
        text = f"some snapshots of the remote copy cannot be read; using step {first}\n  " + "\n  ".join(skipped)
        warnings.warn(text, RuntimeWarning, stacklevel=2)
    return sorted(brought)


def _brought(files: Files, copy: Copy, root: Path, skipped: list[str], *, strict: bool = False) -> bool:
    try:
        copies_.download(files, copy, root)
    except CorruptSnapshot as error:
        if strict:
            raise
        skipped.append(f"{copy.header.step}: {error}".replace("\n", "\n  "))
        return False
    except OSError as error:
        what, why = "a snapshot of the remote copy cannot be written here", f"{type(error).__name__}: {error}"
        raise SnapshotError(explain(what, where=str(root), why=why)) from error
    return True


def _headers(root: Path) -> dict:
    return {entry.step: entry.header for entry in Index(root).entries() if entry.header is not None}


def _where(files: Files, steps: list[int]) -> str:
    return f"{files.url}: {listed(sorted(steps)) or 'none'}"
