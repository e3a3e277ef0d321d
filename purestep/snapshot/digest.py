"""The digest of a saved tree, computed from the rows of all ranks: the `tree.digest` of the full tree.

A row is the kind, size and condensed bytes of one leaf, in order of the leaves, so the digest does not depend on the
placement. The row of a long sharded leaf is computed by one of the ranks that hold it, which reads the other shards
from the disk, one leaf at a time.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from purestep import bits, tree
from purestep.errors import SnapshotError, explain
from purestep.snapshot.codec import JSON, Encoded, Leaf, from_text, show
from purestep.snapshot.header import Base
from purestep.snapshot.header import Scope as Scope
from purestep.snapshot.packing import Piece, materialize, unpack
from purestep.snapshot.shards import Box, OwnedShard, copy_overlap, count, full_box, width

Row = tuple[str, int, bytes]  # kind, number of bytes, condensed bytes
Sums = Iterable[tuple[Box, str]]  # the shards of a leaf and their checksums
ReadArrays = Callable[[Path, Sequence[str]], dict[str, np.ndarray]]
_WHOLE = Scope()


def row_of(leaf: Leaf, content: np.ndarray) -> Row:
    """Return the row of a full leaf, given its bytes."""
    return bits.digest_row(leaf.path, materialize(leaf, content))


def rows_of(shards: Sequence[OwnedShard], contents: Sequence[np.ndarray]) -> dict[int, Row]:
    """Return the rows of the unsharded leaves that this rank writes, by index."""
    pairs = zip(shards, contents, strict=True)
    return {shard.index: row_of(shard.leaf, content) for shard, content in pairs if shard.is_full}


def located(pieces: Iterable[Piece], directory: Path) -> dict[Path, list[Piece]]:
    """Return pieces of the snapshot in a directory by the directory that their arrays are in."""
    by_place: dict[Path, list[Piece]] = {}
    for piece in pieces:
        by_place.setdefault(piece.location(directory)[0], []).append(piece)
    return by_place


def read_located(state: Path, pieces: Iterable[Piece], read_arrays: ReadArrays) -> dict[str, np.ndarray]:
    """Return the arrays of pieces that are in one directory, by the names that the pieces have for them."""
    names = {piece.array: piece.array.rpartition("/")[2] for piece in pieces if piece.nbytes}
    arrays = read_arrays(state, list(dict.fromkeys(names.values()))) if names else {}
    return {full: arrays[name] for full, name in names.items()}


class KnownRows:
    """The rows of leaves whose bytes seldom change, by the checksums of their shards: from the save before.

    The digest of a leaf takes several times as long as its checksums, and where it is sharded its bytes are read again.
    """

    def __init__(self) -> None:
        self._before: dict[tuple[Any, ...], Row] = {}
        self._now: dict[tuple[Any, ...], Row] = {}

    def get(self, leaf: Leaf, sums: Sums, compute: Callable[[], Row]) -> Row:
        """Return the row of a leaf, given the checksums of its shards; it is computed if it is not known."""
        key = _key(leaf, sums)
        row = self._now[key] = self._before.get(key) or compute()
        return row

    def has(self, leaf: Leaf, sums: Sums) -> bool:
        """Tell whether the row of a leaf is known."""
        return _key(leaf, sums) in self._before

    def end(self) -> None:
        """Forget what this save did not use."""
        self._before, self._now = self._now, {}


def _key(leaf: Leaf, sums: Sums) -> tuple[Any, ...]:
    return leaf.kind, leaf.dtype, leaf.shape, *sums


def to_json(rows: Mapping[int, Row]) -> JSON:
    """Return rows as JSON; those of short leaves are left out, because rank 0 reads their bytes anyway."""
    return [[index, kind, size, content.hex()] for index, (kind, size, content) in rows.items() if size > bits.BLOCK]


def from_json(rows: JSON) -> dict[int, Row]:
    """Return the rows that another rank has sent."""
    return {index: (kind, size, bytes.fromhex(content)) for index, kind, size, content in rows}


def total(encoded: Encoded, rows: Mapping[int, Row], scope: Scope | Base = _WHOLE) -> str:
    """Return the digest of a tree, or of a scope of it, from the rows of all leaves that have bytes.

    Raises:
        SnapshotError: no rank has written some leaf.
    """

    def row(index: int, leaf: Leaf) -> Row:
        # A tied leaf counts with its bytes like any other, so that tying weights does not change the digest.
        if leaf.text is not None:
            return bits.digest_row(leaf.path, from_text(leaf.kind, leaf.text))
        first = index if leaf.alias is None else leaf.alias
        if first not in rows:
            raise SnapshotError(missing(leaf))
        return rows[first]

    named = ((scope.path(leaf.path), index, leaf) for index, leaf in enumerate(encoded.leaves))
    return bits.digest_rows((path, *row(index, leaf)) for path, index, leaf in named if path is not None)


def of_value(value: object, scope: Scope | Base) -> str:
    """Return the digest of a scope of a tree in memory. A collective where tensors are sharded: every rank calls it."""
    pairs = zip(tree.paths(value), tree.leaves(value), strict=True)
    return bits.digest_leaves((path, leaf) for full, leaf in pairs if (path := scope.path(full)) is not None)


def missing(leaf: Leaf) -> str:
    """Return the message for a leaf some of whose elements no rank has written."""
    why = "the ranks do not hold the same tree, or not all of them have saved"
    return explain("shards of a leaf were written by no rank", where=f"{show(leaf.path)}: {leaf}", why=why)


class ShardedLeaves:
    """The leaves whose rows need the bytes of several ranks, and which of them this rank digests.

    Rank 0 digests the short ones, because a short row is the bytes themselves. Each long sharded leaf is digested by
    one of the ranks that hold it, in turn, so that no rank reads them all.

    Args:
        leaves: all leaves.
        pieces: of all ranks, in the same order on each.
        rank: this process.
    """

    def __init__(self, leaves: Sequence[Leaf], pieces: Iterable[Piece], rank: int) -> None:
        self.leaves = leaves
        self.pieces: dict[int, list[Piece]] = {}
        for piece in pieces:
            leaf = leaves[piece.leaf]
            if piece.box != full_box(leaf) or (piece.rank and size(leaf) <= bits.BLOCK):
                self.pieces.setdefault(piece.leaf, []).append(piece)
        self.assigned = [index for index, pieces in self.pieces.items() if self._digester(index, pieces) == rank]

    def _digester(self, index: int, pieces: list[Piece]) -> int:
        if size(self.leaves[index]) <= bits.BLOCK:
            return 0
        holders = sorted({piece.rank for piece in pieces})
        return holders[index % len(holders)]

    def rows(self, temporary: Path, read_arrays: ReadArrays, known: KnownRows, base: Collection[int]) -> dict[int, Row]:
        """Return the rows of the leaves assigned to this rank; one full leaf at a time is in memory.

        Args:
            temporary: the directory of the save.
            read_arrays: reads arrays of a directory by name.
            known: rows of the base, of the save before.
            base: indices of the leaves of the base.

        Raises:
            SnapshotError: some shard was written by no rank.
        """
        # All short leaves at once, because reading an array has a fixed cost; long ones alone, to bound the memory.
        sums = {i: [(piece.box, piece.checksum) for piece in self.pieces[i]] for i in self.assigned if i in base}
        unread = [i for i in self.assigned if i not in base or not known.has(self.leaves[i], sums[i])]
        short = [index for index in unread if size(self.leaves[index]) <= bits.BLOCK]
        groups = [[index] for index in unread if index not in set(short)]
        rows: dict[int, Row] = {}
        for group in [short, *groups] if short else groups:
            rows |= self._rows_of_group(group, temporary, read_arrays)
        return rows | {
            i: known.get(self.leaves[i], of, functools.partial(rows.__getitem__, i)) for i, of in sums.items()
        }

    def _rows_of_group(self, group: list[int], temporary: Path, read_arrays: ReadArrays) -> dict[int, Row]:
        contents = {index: np.empty(size(self.leaves[index]), np.uint8) for index in group}
        filled = dict.fromkeys(group, 0)  # elements written so far
        for state, pieces in located([piece for index in group for piece in self.pieces[index]], temporary).items():
            arrays = read_located(state, pieces, read_arrays)
            for piece, content in zip(pieces, unpack(self.leaves, pieces, arrays, verify=True), strict=True):
                leaf = self.leaves[piece.leaf]
                filled[piece.leaf] += copy_overlap(leaf, content, piece.box, contents[piece.leaf], full_box(leaf))
        for index in group:
            if filled[index] != count(full_box(self.leaves[index])):
                raise SnapshotError(missing(self.leaves[index]))
        return {index: row_of(self.leaves[index], contents[index]) for index in group}


def is_shared(leaves: Sequence[Leaf], piece: Piece) -> bool:
    """Tell whether a piece is a shard of a long leaf, which its holders digest together."""
    leaf = leaves[piece.leaf]
    return piece.box != full_box(leaf) and size(leaf) > bits.BLOCK


def size(leaf: Leaf) -> int:
    """Return the bytes of a full leaf."""
    return count(full_box(leaf)) * width(leaf)
