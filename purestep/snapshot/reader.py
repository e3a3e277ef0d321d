"""Reading a snapshot: the template is checked first, then the arrays are read and verified, then the tree is built.

Whatever goes wrong is a `SnapshotError` that names the file or the leaf, and the earlier snapshots; nothing half loaded
is ever returned. `store` gives it the list of snapshots and the function that reads arrays.
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
from purestep.sharding import place
from purestep.snapshot import plain, template
from purestep.snapshot.codec import JSON, Leaf, from_text, show
from purestep.snapshot.digest import STATE, ReadArrays, Scope, of_value
from purestep.snapshot.index import Entry, Index, listed
from purestep.snapshot.manifest import Manifest, read_manifest
from purestep.snapshot.pack import Piece, materialize, unpack
from purestep.snapshot.ranks import Ranks
from purestep.snapshot.shards import Box, count, lay, overlap, wanted, whole, width

_ALONE = Ranks()
_READINGS = 10  # how often a list is read again because what it named is gone
Verify = bool | Literal["digest"]


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
        raise SnapshotError(_absent(index, step))
    if entries[step].header is None:
        raise CorruptSnapshot(_with_earlier(index, step, entries[step].reason))
    return entries[step]


def _absent(index: Index, step: int) -> str:
    steps = index.steps()
    have = f"the snapshots here are of steps {listed(steps)}" if steps else "there is none here"
    instead = f"step={steps[-1]}, or none for the newest" if steps else None
    return explain(f"there is no snapshot of step {step}", where=str(index.root), why=have, instead=instead)


def restore(
    index: Index,
    like: Any,
    read_arrays: ReadArrays,
    *,
    step: int | None,
    fallback: bool,
    verify: Verify,
    ranks: Ranks = _ALONE,
) -> Restored:
    """Read the snapshot of a step, or the newest that can be read, the same one on every rank. See `Store.restore`."""
    check_verify(verify)
    for _ in range(_READINGS):
        try:
            return _restore(index, like, read_arrays, step=step, fallback=fallback, verify=verify, ranks=ranks)
        except _Gone:
            continue
    what = "snapshots are deleted faster than they are read"
    raise SnapshotError(explain(what, where=str(index.root), instead="a writer that keeps more: snapshot.latest(2)"))


class _Gone(Exception):
    """A snapshot that was listed is not there any more: its writer has a newer one, so the list is read again."""


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
    candidates = ranks.from_first(lambda: [[e.step, e.path.name, e.reason] for e in _candidates(index, step)])
    if step is not None and not candidates:
        raise SnapshotError(_absent(index, step))
    skipped: list[tuple[int, str]] = []
    for left, (number, name, reason) in zip(reversed(range(len(candidates))), candidates, strict=True):
        path = index.root / name
        try:
            if reason:
                raise CorruptSnapshot(reason)
            value, found = ranks.together(functools.partial(read, path, like, read_arrays, verify=bool(verify)))
            if verify == "digest":
                ranks.agree(_wrong_digest(path, value, found))
        except TemplateMismatch as error:
            raise TemplateMismatch(f"{error}\n  snapshot: step {number} in {index.root}") from None
        except SnapshotError as error:
            if not ranks.from_first(path.exists):
                raise _Gone from error
            # Another revision of the step that was asked for is the same position of the run.
            if not fallback or (step is not None and not left):
                raise type(error)(_with_earlier(index, number, str(error))) from error
            skipped.append((number, str(error)))
            continue
        if skipped and ranks.rank == 0:
            text = f"newer snapshots cannot be read; using step {number} in {index.root}\n{_reasons(skipped)}"
            warnings.warn(text, RuntimeWarning, stacklevel=3)
        return Restored(value, found.step, found.metrics, found.info, found.digest, tuple(skipped))
    if skipped:
        raise CorruptSnapshot(explain("no snapshot can be read", where=str(index.root), why=_reasons(skipped)))
    raise SnapshotError(explain("there is no snapshot", where=str(index.root), instead="save one first"))


def check_verify(verify: Verify) -> None:
    """Refuse another answer to `verify=` than those there are."""
    if not isinstance(verify, bool) and verify != "digest":
        raise ConfigError(explain("verify= is True, False or 'digest'", where=f"verify={verify!r}"))


def _wrong_digest(directory: Path, value: Any, found: Manifest) -> CorruptSnapshot | None:
    """Return the error of a tree that does not have the digests of its manifest."""
    told = {"digest": (found.digest, Scope())} | {
        f"digests[{name!r}]": (text, found.scopes[name]) for name, text in found.digests.items() if name in found.scopes
    }
    lines = []
    for name, (text, scope) in told.items():
        if (now := of_value(value, scope)) != text:
            lines.append(f"{name}: {text[:16]} in the manifest, {now[:16]} of what was read")
    if not lines:
        return None
    what, why = "the tree that was read does not have the digest of its manifest", "\n".join(lines)
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

    Of a tensor that is split in the template, this rank's part is put together from the stored parts that it overlaps.

    Raises:
        TemplateMismatch: it is not of the structure, shapes or dtypes of `like`; no array has been read then.
        CorruptSnapshot: bytes are missing, or are not those that were saved.
    """
    found = read_manifest(directory)
    template.check(found.structure, list(found.leaves), like)
    values = _Values(found.leaves)
    template.build(found.structure, like, values.ask)
    values.contents = load(directory, found, values.asked, read_arrays, verify=verify)
    return template.build(found.structure, like, values), found


def check(directory: Path, read_arrays: ReadArrays) -> None:
    """Read every byte of a snapshot, an array at a time, without making a tree of it.

    Raises:
        CorruptSnapshot: bytes are missing, or are not those that were saved.
        SnapshotError: it was written in a format that this version does not know.
    """
    found = read_manifest(directory)
    missing = {index: count(whole(leaf)) for index, leaf in enumerate(found.leaves) if leaf.has_bytes}
    for piece in found.pieces:
        missing[piece.leaf] -= count(piece.box)
    for index, number in missing.items():
        if number:
            leaf = found.leaves[index]
            raise CorruptSnapshot(explain("the bytes of a leaf are missing", where=f"{show(leaf.path)}: {leaf}"))
    stored: dict[tuple[int, str], list[Piece]] = {}
    for piece in found.pieces:
        stored.setdefault((piece.rank, piece.array), []).append(piece)
    for (rank, _), pieces in stored.items():
        content = _arrays(directory / STATE.format(rank), found, pieces, read_arrays)
        unpack(found.leaves, pieces, content, verify=True)


class _Values:
    """Gives the leaf of an index, placed and on the device of the template's; tied leaves come back as one object."""

    def __init__(self, leaves: Sequence[Leaf]) -> None:
        self.leaves = leaves
        self.asked: dict[int, set[Box]] = {}
        self.contents: Mapping[tuple[int, Box], np.ndarray] = {}
        self.made: dict[Any, Any] = {}

    def ask(self, index: int, like: Any) -> None:
        """Note what a template wants of a leaf."""
        if self.leaves[index].text is None:
            first = self._first(index)
            self.asked.setdefault(first, set()).add(wanted(self.leaves[first], like))

    def __call__(self, index: int, like: Any) -> Any:
        leaf = self.leaves[index]
        if leaf.text is not None:
            return from_text(leaf.kind, leaf.text)
        first, part = self._first(index), place.part_of(like)
        box, device = wanted(leaf, like), template.device_of(part)
        key = (first, box, device, place.is_split(like) and id(like))
        if key not in self.made:
            value = materialize(leaf, self.contents[first, box], box[1])
            value = value if device is None else value.to(device)
            self.made[key] = place.rewrap(value, like) if place.is_split(like) else value
        return self.made[key]

    def _first(self, index: int) -> int:
        alias = self.leaves[index].alias
        return index if alias is None else alias


def load(
    directory: Path, found: Manifest, asked: Mapping[int, Iterable[Box]], read_arrays: ReadArrays, *, verify: bool
) -> dict[tuple[int, Box], np.ndarray]:
    """Return the bytes of boxes of leaves, reading the parts of one rank after the other.

    Raises:
        CorruptSnapshot: names the leaves whose bytes are missing or are not those that were saved.
    """
    _check_stored(directory, found, asked)
    contents: dict[tuple[int, Box], np.ndarray] = {}
    laid = [(index, box) for index, boxes in asked.items() for box in boxes]
    for rank, pieces in _needed(found, asked).items():
        arrays = _arrays(directory / STATE.format(rank), found, pieces, read_arrays)
        for piece, content in zip(pieces, unpack(found.leaves, pieces, arrays, verify=verify), strict=True):
            leaf = found.leaves[piece.leaf]
            for key in [(piece.leaf, box) for box in asked[piece.leaf]]:
                if key[1] == piece.box:
                    contents[key] = content
                    continue
                if key not in contents:
                    contents[key] = np.empty(count(key[1]) * width(leaf), np.uint8)
                lay(leaf, content, piece.box, contents[key], key[1])
    for index, box in laid:
        if (index, box) not in contents:
            contents[index, box] = np.empty(0, np.uint8)
    return contents


def _check_stored(directory: Path, found: Manifest, asked: Mapping[int, Iterable[Box]]) -> None:
    """Refuse a manifest that asks for more than is stored, before memory is taken for it.

    The parts of what is asked for have to make it up, and be different bytes of files that are as large as they say.
    """
    needed = [piece for pieces in _needed(found, asked).values() for piece in pieces]
    covered = {(index, box): 0 for index, boxes in asked.items() for box in boxes}
    for piece in needed:
        for box in asked[piece.leaf]:
            covered[piece.leaf, box] += count(overlap(box, piece.box))
    for (index, box), number in covered.items():
        if number != count(box):
            leaf = found.leaves[index]
            raise CorruptSnapshot(explain("the bytes of a leaf are missing", where=f"{show(leaf.path)}: {leaf}"))
    arrays = {(piece.rank, piece.array) for piece in needed if piece.nbytes}
    inside: dict[tuple[int, str], list[Piece]] = {key: [] for key in sorted(arrays)}
    for piece in found.pieces:
        if piece.nbytes and (piece.rank, piece.array) in inside:
            inside[piece.rank, piece.array].append(piece)
    for (rank, name), pieces in inside.items():
        pieces.sort(key=lambda piece: piece.offset)
        end = 0
        for piece in pieces:
            if piece.offset != end:
                leaf = found.leaves[piece.leaf]
                where = f"{show(leaf.path)}: {leaf}, {piece.nbytes} bytes from {piece.offset} in {name}"
                raise CorruptSnapshot(explain("parts of leaves do not lie one after the other", where=where))
            end += piece.nbytes
        array = directory / STATE.format(rank) / name
        if (why := plain.implausible(array, end)) is not None:
            leaf = found.leaves[pieces[0].leaf]
            where = f"{show(leaf.path)}: {leaf}" + (f" and {len(pieces) - 1} more" if len(pieces) > 1 else "")
            raise CorruptSnapshot(explain("a stored array is not as large as its leaves", where=where, why=why))


def _needed(found: Manifest, asked: Mapping[int, Iterable[Box]]) -> dict[int, list[Piece]]:
    needed: dict[int, list[Piece]] = {}
    for piece in found.pieces:
        boxes = asked.get(piece.leaf, ())
        if any(box == piece.box or count(overlap(box, piece.box)) for box in boxes):
            needed.setdefault(piece.rank, []).append(piece)
    return needed


def _arrays(state: Path, found: Manifest, pieces: Sequence[Piece], read_arrays: ReadArrays) -> Mapping[str, np.ndarray]:
    names = list(dict.fromkeys(piece.array for piece in pieces if piece.nbytes))
    if not names:
        return {}
    try:
        return read_arrays(state, names)
    except Exception as error:
        where = "\n".join(_unreadable(state, found, pieces, names, read_arrays)) or str(state)
        why = f"{type(error).__name__}: {str(error).splitlines()[0][:300] if str(error) else ''}"
        raise CorruptSnapshot(explain("stored arrays cannot be read", where=where, why=why)) from error


def _unreadable(
    state: Path, found: Manifest, pieces: Sequence[Piece], names: list[str], read_arrays: ReadArrays
) -> list[str]:
    """Name the leaves in the arrays that cannot be read one by one; the whole state when none can."""
    broken = []
    for name in names:
        try:
            read_arrays(state, [name])
        except Exception:
            broken.append(name)
    lines = []
    for name in broken[:10]:
        inside = [found.leaves[piece.leaf] for piece in pieces if piece.array == name]
        others = f" and {len(inside) - 1} more" if len(inside) > 1 else ""
        lines.append(f"{show(inside[0].path)}: {inside[0]}{others}, in {state / name}")
    return [f"{len(broken)} of {len(names)} arrays under {state}", *lines] if broken else []
