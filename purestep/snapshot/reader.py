"""Reading a snapshot: the template is checked first, then the arrays are read and verified, then the tree is built.

Whatever goes wrong is a `SnapshotError` that names the file or the leaf, and the earlier snapshots; nothing half loaded
is ever returned. `store` gives it the list of snapshots and the function that reads arrays.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from purestep.errors import CorruptSnapshot, SnapshotError, TemplateMismatch, explain
from purestep.snapshot import template
from purestep.snapshot.codec import JSON, Leaf, from_text, show
from purestep.snapshot.index import Entry, Index, listed
from purestep.snapshot.manifest import Manifest, read_manifest
from purestep.snapshot.pack import ARRAY_NAME, unpack
from purestep.snapshot.writer import STATE

ReadArrays = Callable[[Path, Sequence[str]], dict[str, np.ndarray]]


@dataclass(frozen=True)
class Restored:
    """What `Store.restore` gives back.

    Attributes:
        value: the tree.
        step, metrics, info, digest: as they were saved.
        skipped: (step, reason) of each newer snapshot that could not be read.
    """

    value: Any
    step: int
    metrics: Mapping[str, float]
    info: Mapping[str, JSON]
    digest: str
    skipped: tuple[tuple[int, str], ...] = ()


def find(index: Index, step: int) -> Entry:
    """Return the entry of a step.

    Raises:
        CorruptSnapshot: there is a snapshot of that step, and it is damaged.
        SnapshotError: there is none.
    """
    entries = {entry.step: entry for entry in index.entries()}
    if step not in entries:
        steps = index.steps()
        have = f"the snapshots here are of steps {listed(steps)}" if steps else "there is none here"
        raise SnapshotError(explain(f"there is no snapshot of step {step}", where=str(index.root), why=have))
    if entries[step].header is None:
        raise CorruptSnapshot(_with_earlier(index, step, entries[step].reason))
    return entries[step]


def restore(
    index: Index, like: Any, read_arrays: ReadArrays, *, step: int | None, fallback: bool, verify: bool
) -> Restored:
    """Read the snapshot of a step, or the newest that can be read. See `Store.restore`."""
    entries = list(reversed(index.entries())) if step is None else [find(index, step)]
    skipped: list[tuple[int, str]] = []
    for entry in entries:
        try:
            if entry.header is None:
                raise CorruptSnapshot(entry.reason)
            value, found = read(entry.path, like, read_arrays, verify=verify)
        except TemplateMismatch as error:
            raise TemplateMismatch(f"{error}\n  snapshot: step {entry.step} in {index.root}") from None
        except SnapshotError as error:
            if step is not None or not fallback:
                raise type(error)(_with_earlier(index, entry.step, str(error))) from error
            skipped.append((entry.step, str(error)))
            continue
        if skipped:
            text = f"newer snapshots cannot be read; using step {entry.step} in {index.root}\n{_reasons(skipped)}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        return Restored(value, found.step, found.metrics, found.info, found.digest, tuple(skipped))
    if skipped:
        raise CorruptSnapshot(explain("no snapshot can be read", where=str(index.root), why=_reasons(skipped)))
    raise SnapshotError(explain("there is no snapshot", where=str(index.root), instead="save one first"))


def _reasons(skipped: list[tuple[int, str]]) -> str:
    return "\n".join(f"step {step}: {reason}" for step, reason in skipped)


def _with_earlier(index: Index, step: int, text: str) -> str:
    earlier = [other for other in index.steps() if other < step]
    hint = f"restore(step={earlier[-1]}); snapshots before it: {listed(earlier)}" if earlier else None
    why = text if earlier else f"{text}\nthere is no earlier snapshot"
    return explain(f"the snapshot of step {step} cannot be read", where=str(index.root), why=why, instead=hint)


def read(directory: Path, like: Any, read_arrays: ReadArrays, *, verify: bool) -> tuple[Any, Manifest]:
    """Return the tree in a snapshot directory, and its manifest.

    Raises:
        TemplateMismatch: it is not of the structure, shapes or dtypes of `like`; no array has been read then.
        CorruptSnapshot: bytes are missing, or are not those that were saved.
    """
    try:
        found = read_manifest(directory)
        template.check(found.structure, list(found.leaves), like)
        own = [leaf for leaf in found.leaves if leaf.has_bytes]
        values = iter(unpack(own, found.pieces, _arrays(directory / STATE, found, read_arrays), verify=verify))
        loaded = [next(values) if leaf.has_bytes else None for leaf in found.leaves]
        return template.build(found.structure, like, _Values(found.leaves, loaded)), found
    except (SnapshotError, MemoryError):
        raise
    except Exception as error:  # a sealed manifest that does not make sense: written by something else
        what = "the snapshot does not make sense"
        raise CorruptSnapshot(explain(what, where=str(directory), why=f"{type(error).__name__}: {error}")) from error


class _Values:
    """Gives the leaf of an index, on a device; tied leaves come back as one object."""

    def __init__(self, leaves: Sequence[Leaf], loaded: list[Any]) -> None:
        self.leaves, self.loaded = leaves, loaded
        self.placed: dict[tuple[int, torch.device], torch.Tensor] = {}

    def __call__(self, index: int, device: torch.device | None) -> Any:
        leaf = self.leaves[index]
        if leaf.text is not None:
            return from_text(leaf.kind, leaf.text)
        first = index if leaf.alias is None else leaf.alias
        value = self.loaded[first]
        if device is None:
            return value
        if (first, device) not in self.placed:
            self.placed[first, device] = value.to(device)
        return self.placed[first, device]


def _arrays(state: Path, found: Manifest, read_arrays: ReadArrays) -> Mapping[str, np.ndarray]:
    names = list(dict.fromkeys(piece.array for piece in found.pieces if piece.nbytes))
    if not names:
        return {}
    if bad := [name for name in names if not ARRAY_NAME.fullmatch(name)]:
        why = "a name like this could lead out of the snapshot's directory"
        raise CorruptSnapshot(explain("the name of a stored array is not one of ours", where=repr(bad[0]), why=why))
    try:
        return read_arrays(state, names)
    except Exception as error:
        where = "\n".join(_unreadable(state, found, names, read_arrays)) or str(state)
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
        raise CorruptSnapshot(explain("stored arrays cannot be read", where=where, why=why)) from error


def _unreadable(state: Path, found: Manifest, names: list[str], read_arrays: ReadArrays) -> list[str]:
    """Name the leaves in the arrays that cannot be read one by one; the whole state when none can."""
    broken = []
    for name in names:
        try:
            read_arrays(state, [name])
        except Exception:
            broken.append(name)
    own = [leaf for leaf in found.leaves if leaf.has_bytes]
    lines = []
    for name in broken[:10]:
        inside = [leaf for leaf, piece in zip(own, found.pieces, strict=True) if piece.array == name]
        others = f" and {len(inside) - 1} more" if len(inside) > 1 else ""
        lines.append(f"{show(inside[0].path)}: {inside[0]}{others}, in {state / name}")
    return [f"{len(broken)} of {len(names)} arrays under {state}", *lines] if broken else []
