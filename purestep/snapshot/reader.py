"""Reading a snapshot: the template is checked first, then the arrays are read and verified, then the tree is built.

Every failure is a `SnapshotError` that names the file or the leaf, and the earlier snapshots; a tree is returned
complete or not at all. `store` passes it the index of snapshots and the function that reads arrays.
"""

from __future__ import annotations

import functools
import warnings
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np

from purestep.errors import ConfigError, CorruptSnapshot, SnapshotError, TemplateMismatch, explain
from purestep.sharding import placement
from purestep.snapshot import template, zarr_files
from purestep.snapshot.codec import JSON, Leaf, from_text, show
from purestep.snapshot.digest import ReadArrays, Scope, located, of_value, read_located
from purestep.snapshot.listing import Entry, Index, listed
from purestep.snapshot.manifest import Manifest, read_manifest
from purestep.snapshot.packing import Piece, materialize, unpack
from purestep.snapshot.processes import Ranks
from purestep.snapshot.shards import Box, box_for, copy_overlap, count, full_box, overlap, width

_ONE_PROCESS = Ranks()
_ATTEMPTS = 10  # a snapshot may be deleted between listing and reading; then the list is read again
Verify = bool | Literal["digest"]


@dataclass(frozen=True)
class Restored:
    """The result of `Store.restore`.

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
        raise SnapshotError(_absent(index, step))
    if entries[step].header is None:
        raise CorruptSnapshot(_with_earlier(index, step, entries[step].reason))
    return entries[step]


def _absent(index: Index, step: int) -> str:
    steps = index.steps()
    why = f"the snapshots here are of steps {listed(steps)}" if steps else "there is none here"
    instead = f"step={steps[-1]}, or none for the newest" if steps else None
    return explain(f"there is no snapshot of step {step}", where=str(index.root), why=why, instead=instead)


def restore(
    index: Index,
    like: Any,
    read_arrays: ReadArrays,
    *,
    step: int | None,
    fallback: bool,
    verify: Verify,
    ranks: Ranks = _ONE_PROCESS,
) -> Restored:
    """Read the snapshot of a step, or the newest that can be read, the same one on every rank. See `Store.restore`."""
    check_verify(verify)
    for _ in range(_ATTEMPTS):
        try:
            return _restore(index, like, read_arrays, step=step, fallback=fallback, verify=verify, ranks=ranks)
        except _Gone:
            continue
    what = "snapshots are deleted faster than they are read"
    raise SnapshotError(explain(what, where=str(index.root), instead="a writer that keeps more: snapshot.latest(2)"))


class _Gone(Exception):
    """The writer has deleted a snapshot after it was listed, so it has a newer one: the list is read again."""


def _restore(
    index: Index,
    like: Any,
    read_arrays: ReadArrays,
    *,
    step: int | None,
    fallback: bool,
    verify: Verify,
    ranks: Ranks,
) -> Restored:
    # Rank 0 alone lists: on a shared file system two ranks may see other lists, and would read other snapshots.
    candidates = ranks.from_first(lambda: [[e.step, e.path.name, e.reason] for e in _candidates(index, step)])
    if step is not None and not candidates:
        raise SnapshotError(_absent(index, step))
    skipped: list[tuple[int, str]] = []
    for remaining, (number, name, reason) in zip(reversed(range(len(candidates))), candidates, strict=True):
        path = index.root / name
        try:
            if reason:
                raise CorruptSnapshot(reason)
            value, manifest = ranks.together(functools.partial(read, path, like, read_arrays, verify=bool(verify)))
            if verify == "digest":
                ranks.raise_everywhere(_wrong_digest(path, value, manifest))
        except TemplateMismatch as error:
            raise TemplateMismatch(f"{error}\n  snapshot: step {number} in {index.root}") from None
        except SnapshotError as error:
            # Every rank is here, because `together` raises on all of them; so all may call a collective.
            if not ranks.from_first(path.exists):
                raise _Gone from error
            # A given step never falls back to another one; an older revision of it is the same position of the run.
            if not fallback or (step is not None and not remaining):
                raise type(error)(_with_earlier(index, number, str(error))) from error
            skipped.append((number, str(error)))
            continue
        if skipped and ranks.rank == 0:
            text = f"newer snapshots cannot be read; using step {number} in {index.root}\n{_reasons(skipped)}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        return Restored(value, manifest.step, manifest.metrics, manifest.info, manifest.digest, tuple(skipped))
    if skipped:
        raise CorruptSnapshot(explain("no snapshot can be read", where=str(index.root), why=_reasons(skipped)))
    raise SnapshotError(explain("there is no snapshot", where=str(index.root), instead="save one first"))


def check_verify(verify: Verify) -> None:
    """Refuse a value of `verify=` that is none of its three."""
    if not isinstance(verify, bool) and verify != "digest":
        raise ConfigError(explain("verify= is True, False or 'digest'", where=f"verify={verify!r}"))


def _wrong_digest(directory: Path, value: object, manifest: Manifest) -> CorruptSnapshot | None:
    """Return the error of a tree that does not have the digests of its manifest."""
    recorded = {"digest": (manifest.digest, Scope())} | {
        f"digests[{name!r}]": (digest, manifest.scopes[name])
        for name, digest in manifest.digests.items()
        if name in manifest.scopes
    }
    lines = []
    for name, (digest, scope) in recorded.items():
        if (actual := of_value(value, scope)) != digest:
            lines.append(f"{name}: {digest[:16]} in the manifest, {actual[:16]} of the tree")
    if not lines:
        return None
    what, why = "the restored tree does not have the digest of its manifest", "\n".join(lines)
    return CorruptSnapshot(explain(what, where=str(directory), why=why))


def _candidates(index: Index, step: int | None) -> list[Entry]:
    return [entry for entry in reversed(index.revisions()) if step is None or entry.step == step]


def _reasons(skipped: list[tuple[int, str]]) -> str:
    return "\n".join(f"step {step}: {reason}" for step, reason in skipped)


def _with_earlier(index: Index, step: int, text: str) -> str:
    earlier = [other for other in index.steps() if other < step]
    hint = f"restore(step={earlier[-1]}); snapshots before it: {listed(earlier)}" if earlier else None
    why = text if earlier else f"{text}\nthere is no earlier snapshot"
    return explain(f"the snapshot of step {step} cannot be read", where=str(index.root), why=why, instead=hint)


def read(directory: Path, like: Any, read_arrays: ReadArrays, *, verify: bool) -> tuple[Any, Manifest]:
    """Return the tree in a snapshot directory, and its manifest.

    This rank's shard of a tensor that is sharded in the template is assembled from the stored shards that it overlaps.

    Raises:
        TemplateMismatch: it is not of the structure, shapes or dtypes of `like`; no array has been read then.
        CorruptSnapshot: bytes are missing, or are not those that were saved.
    """
    manifest = read_manifest(directory)
    template.check(manifest.structure, list(manifest.leaves), like)
    values = _LeafValues(manifest.leaves)
    # Built twice: the first time only records which box of each leaf the template needs, so that all are read at once.
    template.build(manifest.structure, like, values.request)
    values.contents = load(directory, manifest, values.requested, read_arrays, verify=verify)
    return template.build(manifest.structure, like, values), manifest


def check(directory: Path, read_arrays: ReadArrays) -> None:
    """Read and verify every byte of a snapshot, an array at a time, without building its tree.

    Raises:
        CorruptSnapshot: bytes are missing, or are not those that were saved.
        SnapshotError: it was written in a format that this version does not know.
    """
    manifest = read_manifest(directory)
    # A missing piece leaves elements of its leaf uncovered: it is named before any array is read.
    missing = {index: count(full_box(leaf)) for index, leaf in enumerate(manifest.leaves) if leaf.has_bytes}
    for piece in manifest.pieces:
        missing[piece.leaf] -= count(piece.box)
    for index, number in missing.items():
        if number:
            leaf = manifest.leaves[index]
            raise CorruptSnapshot(explain("the bytes of a leaf are missing", where=f"{show(leaf.path)}: {leaf}"))
    by_array: dict[tuple[Path, str], list[Piece]] = {}
    for piece in manifest.pieces:
        by_array.setdefault(piece.location(directory), []).append(piece)
    for (state, _), pieces in by_array.items():
        _contents(state, manifest, pieces, read_arrays, verify=True)


class _LeafValues:
    """The value of each leaf, by index, sharded and on the device as in the template; tied leaves are one object."""

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self.leaves = leaves
        self.requested: dict[int, set[Box]] = {}
        self.contents: Mapping[tuple[int, Box], np.ndarray] = {}
        self.cache: dict[tuple[Any, ...], Any] = {}

    def request(self, index: int, like: object) -> None:
        """Record which box of a leaf a template needs."""
        if self.leaves[index].text is None:
            first = self._first(index)
            self.requested.setdefault(first, set()).add(box_for(self.leaves[first], like))

    def __call__(self, index: int, like: Any) -> Any:
        leaf = self.leaves[index]
        if leaf.text is not None:
            return from_text(leaf.kind, leaf.text)
        first, part = self._first(index), placement.part_of(like)
        box, device = box_for(leaf, like), template.device_of(part)
        # Two leaves of the template that are tied in the snapshot may differ in box or device, and are two values then.
        key = (first, box, device, placement.is_split(like) and id(like))
        if key not in self.cache:
            value: Any = materialize(leaf, self.contents[first, box], box[1])
            value = value if device is None else value.to(device)
            self.cache[key] = placement.rewrap(value, like) if placement.is_split(like) else value
        return self.cache[key]

    def _first(self, index: int) -> int:
        alias = self.leaves[index].alias
        return index if alias is None else alias


Requested = Mapping[int, Iterable[Box]]  # boxes by index of the leaf


def load(
    directory: Path, manifest: Manifest, requested: Requested, read_arrays: ReadArrays, *, verify: bool
) -> dict[tuple[int, Box], np.ndarray]:
    """Return the bytes of boxes of leaves, reading the arrays of one rank after the other.

    Args:
        directory: of the snapshot.
        manifest: of the snapshot.
        requested: the boxes, by index of the leaf.
        read_arrays: reads arrays of a directory by name.
        verify: whether to check the checksum of every piece that is read.

    Returns:
        uint8[nbytes] of each (index, box), contiguous.

    Raises:
        CorruptSnapshot: names the leaves whose bytes are missing or are not those that were saved.
    """
    _check_stored(directory, manifest, requested)
    contents: dict[tuple[int, Box], np.ndarray] = {}
    keys = [(index, box) for index, boxes in requested.items() for box in boxes]
    # One writing rank after the other, so that the arrays of one rank at a time are in memory besides the result.
    for state, pieces in located(_needed(manifest, requested), directory).items():
        for piece, content in zip(pieces, _contents(state, manifest, pieces, read_arrays, verify=verify), strict=True):
            leaf = manifest.leaves[piece.leaf]
            for key in [(piece.leaf, box) for box in requested[piece.leaf]]:
                if key[1] == piece.box:  # stored with the same shards: the bytes are taken as they are
                    contents[key] = content
                    continue
                if key not in contents:
                    contents[key] = np.empty(count(key[1]) * width(leaf), np.uint8)
                copy_overlap(leaf, content, piece.box, contents[key], key[1])
    for index, box in keys:
        if (index, box) not in contents:  # a box without elements overlaps no piece
            contents[index, box] = np.empty(0, np.uint8)
    return contents


def _check_stored(directory: Path, manifest: Manifest, requested: Requested) -> None:
    """Refuse a manifest that claims more bytes than are stored, before memory is allocated for them.

    A forged or damaged manifest may claim a leaf of any size. So the pieces must cover each requested box exactly, must
    be adjacent ranges of their array, and the array must be as large on the disk as they say.
    """
    needed = _needed(manifest, requested)
    covered = {(index, box): 0 for index, boxes in requested.items() for box in boxes}
    for piece in needed:
        for box in requested[piece.leaf]:
            covered[piece.leaf, box] += count(overlap(box, piece.box))
    for (index, box), number in covered.items():
        if number != count(box):
            leaf = manifest.leaves[index]
            raise CorruptSnapshot(explain("the bytes of a leaf are missing", where=f"{show(leaf.path)}: {leaf}"))
    arrays = {piece.location(directory) for piece in needed if piece.nbytes}
    by_array: dict[tuple[Path, str], list[Piece]] = {key: [] for key in sorted(arrays)}
    for piece in manifest.pieces:
        if piece.nbytes and (place := piece.location(directory)) in by_array:
            by_array[place].append(piece)
    for (state, name), pieces in by_array.items():
        pieces.sort(key=lambda piece: piece.offset)
        end = 0
        for piece in pieces:
            if piece.offset != end:
                leaf = manifest.leaves[piece.leaf]
                where = f"{show(leaf.path)}: {leaf}, {piece.nbytes} bytes from {piece.offset} in {name}"
                raise CorruptSnapshot(explain("the bytes of leaves overlap or leave a gap", where=where))
            end += piece.nbytes
        if (why := zarr_files.implausible(state / name, end)) is not None:
            leaf = manifest.leaves[pieces[0].leaf]
            where = f"{show(leaf.path)}: {leaf}" + (f" and {len(pieces) - 1} more" if len(pieces) > 1 else "")
            raise CorruptSnapshot(explain("a stored array is not as large as its leaves", where=where, why=why))


def _needed(manifest: Manifest, requested: Requested) -> list[Piece]:
    """The pieces that overlap a requested box."""

    def is_needed(piece: Piece) -> bool:
        boxes = requested.get(piece.leaf, ())
        return any(box == piece.box or count(overlap(box, piece.box)) for box in boxes)

    return [piece for piece in manifest.pieces if is_needed(piece)]


def _contents(
    state: Path, manifest: Manifest, pieces: Sequence[Piece], read_arrays: ReadArrays, *, verify: bool
) -> list[np.ndarray]:
    """Return uint8[nbytes] of each piece; their arrays are in one directory."""
    of_base = any("/" in piece.array for piece in pieces)
    if of_base and not state.is_dir():
        raise CorruptSnapshot(_other_base("the base of the snapshot is not there", state, manifest))
    try:
        return unpack(manifest.leaves, pieces, _read_pieces(state, manifest, pieces, read_arrays), verify=verify)
    except CorruptSnapshot as error:
        if not of_base:
            raise
        raise CorruptSnapshot(f"{_other_base('the base has another digest', state, manifest)}\n{error}") from error


def _other_base(what: str, state: Path, manifest: Manifest) -> str:
    return explain(
        what,
        where=f"{state.parent}; the snapshot of step {manifest.step} was taken beside base {manifest.base.digest[:16]}",
        why="the bytes of frozen parameters are written once, there, and every snapshot of the run refers to them",
        instead=f"bring back the directory {state.parent.name}, from a copy of the run directory",
    )


def _read_pieces(
    state: Path, manifest: Manifest, pieces: Sequence[Piece], read_arrays: ReadArrays
) -> Mapping[str, np.ndarray]:
    try:
        return read_located(state, pieces, read_arrays)
    except Exception as error:
        where = "\n".join(_unreadable(state, manifest, pieces, read_arrays)) or str(state)
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
        raise CorruptSnapshot(explain("stored arrays cannot be read", where=where, why=why)) from error


def _unreadable(state: Path, manifest: Manifest, pieces: Sequence[Piece], read_arrays: ReadArrays) -> list[str]:
    """One line for each array that cannot be read, with its first leaf: the error of Orbax names no leaf."""
    names = list(dict.fromkeys(piece.array.rpartition("/")[2] for piece in pieces if piece.nbytes))
    broken = []
    for name in names:
        try:
            read_arrays(state, [name])
        except Exception:
            broken.append(name)
    lines = []
    for name in broken[:10]:
        leaves = [manifest.leaves[piece.leaf] for piece in pieces if piece.array.rpartition("/")[2] == name]
        others = f" and {len(leaves) - 1} more" if len(leaves) > 1 else ""
        lines.append(f"{show(leaves[0].path)}: {leaves[0]}{others}, in {state / name}")
    return [f"{len(broken)} of {len(names)} arrays under {state}", *lines] if broken else []
