"""Snapshots: a tree on disk, committed atomically, with a manifest of checksums.

`Store` writes and reads one directory; the functions here read the snapshots of a run. Importing this loads no Orbax.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from purestep.snapshot.keep import Keep as Keep
from purestep.snapshot.keep import all_ as all_
from purestep.snapshot.keep import best as best
from purestep.snapshot.keep import every_steps as every_steps
from purestep.snapshot.keep import latest as latest
from purestep.snapshot.manifest import Manifest as Manifest
from purestep.snapshot.manifest import environment as environment
from purestep.snapshot.ranks import Ranks as Ranks
from purestep.snapshot.reader import Restored as Restored
from purestep.snapshot.store import Store as Store

DIRECTORY = "snapshots"  # where a run keeps them, under its run directory


def restore(run_dir: str | Path, like: Any = ..., *, step: int | None = None) -> Any:
    """Return the tree that a run has stored.

    Args:
        run_dir: the directory of a run, or of its snapshots.
        like: a template, see `Store.restore`; by default everything comes as it is stored.
        step: which snapshot; the newest that can be read by default.

    Raises:
        TemplateMismatch: the snapshot is not of the structure, shapes or dtypes of `like`.
        CorruptSnapshot: stored bytes are missing or changed.
        SnapshotError: there is no snapshot.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as run_dir:
        ...     with Store(f"{run_dir}/snapshots") as store:
        ...         store.save(5, {"w": torch.arange(3), "name": "digits"})
        ...     restore(run_dir, like={"w": torch.empty(3, dtype=torch.int64), "name": ...})
        {'w': tensor([0, 1, 2]), 'name': 'digits'}
    """
    return Store(_root(run_dir)).restore(like, step=step).value


def steps(run_dir: str | Path) -> list[int]:
    """Return the steps of the snapshots of a run, in order."""
    return Store(_root(run_dir)).steps()


def manifest(run_dir: str | Path, step: int) -> Manifest:
    """Return all that a snapshot of a run says about itself, without reading arrays.

    Raises:
        CorruptSnapshot: a file of it is missing or is not what was written.
        SnapshotError: there is no snapshot of that step.
    """
    return Store(_root(run_dir)).read_manifest(step)


def _root(run_dir: str | Path) -> Path:
    nested = Path(run_dir) / DIRECTORY
    return nested if nested.is_dir() else Path(run_dir)
