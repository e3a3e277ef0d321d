"""The digest of a saved tree, put together from what each rank has: the `tree.digest` of the whole tree.

Every leaf counts with its own bytes, in order, so the digest knows nothing of placement. A long leaf that is split is
digested by one of the ranks that hold it, which reads the other parts from the disk, one leaf at a time.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from purestep import bits, tree
from purestep.errors import SnapshotError, explain
from purestep.snapshot.codec import JSON, Encoded, Leaf, from_text, show
from purestep.snapshot.pack import Piece, materialize, unpack
from purestep.snapshot.shards import Owned, count, lay, whole, width

Row = tuple[str, int, bytes]  # kind, number of bytes, condensed bytes
ReadArrays = Callable[[Path, Sequence[str]], dict[str, np.ndarray]]
STATE = "parts/{}/state"


@dataclass(frozen=True)
class Scope:
    """Which leaves of a tree a digest covers: those under a path, without others; paths count from there.

    Example:
        >>> Scope(".train").path(".train.params['w']"), Scope("", (".elapsed",)).path(".elapsed")
        (".params['w']", None)
    """

    under: str = ""
    without: tuple[str, ...] = ()

    def path(self, path: str) -> str | None:
        """Return the path of a leaf in the scope, None when it is not in it."""
        if not _inside(path, self.under) or any(_inside(path, other) for other in self.without):
            return None
        return path[len(self.under) :]

    def to_json(self) -> JSON:
        return {"under": self.under, "without": list(self.without)}


def _inside(path: str, under: str) -> bool:
    return path.startswith(under) and (not under or path[len(under) : len(under) + 1] in ("", ".", "["))


def row_of(leaf: Leaf, content: np.ndarray) -> Row:
    """Return the row of a whole leaf, given its bytes."""
    return bits.digest_row(leaf.path, materialize(leaf, content))


def rows_of(parts: Sequence[Owned], contents: Sequence[np.ndarray]) -> dict[int, Row]:
    """Return the rows of the leaves that this rank holds whole, by index."""
    pairs = zip(parts, contents, strict=True)
    return {part.index: row_of(part.leaf, content) for part, content in pairs if part.is_whole}


def to_json(rows: Mapping[int, Row]) -> JSON:
    """Return rows as JSON; only of long leaves, because a short one has its bytes in its row."""
    return [[index, kind, size, content.hex()] for index, (kind, size, content) in rows.items() if size > bits.BLOCK]


def from_json(rows: JSON) -> dict[int, Row]:
    """Return the rows that another rank has sent."""
    return {index: (kind, size, bytes.fromhex(content)) for index, kind, size, content in rows}


def total(encoded: Encoded, rows: Mapping[int, Row], scope: Scope = Scope()) -> str:
    """Return the digest of a tree, or of a part of it, from the rows of all leaves that have bytes.

    Raises:
        SnapshotError: no rank has written some leaf.
    """

    def row(index: int, leaf: Leaf) -> Row:
        if leaf.text is not None:
            return bits.digest_row(leaf.path, from_text(leaf.kind, leaf.text))
        first = index if leaf.alias is None else leaf.alias
        if first not in rows:
            raise SnapshotError(missing(leaf))
        return rows[first]

    named = ((scope.path(leaf.path), index, leaf) for index, leaf in enumerate(encoded.leaves))
    return bits.digest_rows((path, *row(index, leaf)) for path, index, leaf in named if path is not None)


def of_value(value: Any, scope: Scope) -> str:
    """Return the digest of a part of a tree in memory. Where it is split over ranks, each of them calls this."""
    pairs = zip(tree.paths(value), tree.leaves(value), strict=True)
    return bits.digest_leaves((path, leaf) for full, leaf in pairs if (path := scope.path(full)) is not None)


def missing(leaf: Leaf) -> str:
    """Return the message of a leaf of which no rank has written some part."""
    why = "the ranks do not hold the same tree, or not all of them have saved"
    return explain("parts of a leaf were written by no rank", where=f"{show(leaf.path)}: {leaf}", why=why)


class Others:
    """The leaves whose rows can be made only when all ranks have written, and which of them this rank makes.

    Short ones are made by rank 0, which needs their bytes. Long ones that are split are shared by their holders.

    Args:
        leaves: all leaves.
        pieces: of all ranks, in the same order everywhere.
        rank: this process.
    """

    def __init__(self, leaves: Sequence[Leaf], pieces: Iterable[Piece], rank: int) -> None:
        self.leaves = leaves
        self.open: dict[int, list[Piece]] = {}
        for piece in pieces:
            leaf = leaves[piece.leaf]
            if piece.box != whole(leaf) or (piece.rank and size(leaf) <= bits.BLOCK):
                self.open.setdefault(piece.leaf, []).append(piece)
        self.mine = [index for index, found in self.open.items() if self._maker(index, found) == rank]

    def _maker(self, index: int, pieces: list[Piece]) -> int:
        if size(self.leaves[index]) <= bits.BLOCK:
            return 0
        holders = sorted({piece.rank for piece in pieces})
        return holders[index % len(holders)]

    def rows(self, temporary: Path, read_arrays: ReadArrays) -> dict[int, Row]:
        """Return the rows of this rank's leaves; whole leaves are in memory one at a time.

        Raises:
            SnapshotError: some part was written by no rank.
        """
        short = [index for index in self.mine if size(self.leaves[index]) <= bits.BLOCK]
        groups = [[index] for index in self.mine if index not in set(short)]
        found: dict[int, Row] = {}
        for group in [short, *groups] if short else groups:
            found |= self._group(group, temporary, read_arrays)
        return found

    def _group(self, group: list[int], temporary: Path, read_arrays: ReadArrays) -> dict[int, Row]:
        contents = {index: np.empty(size(self.leaves[index]), np.uint8) for index in group}
        filled = dict.fromkeys(group, 0)
        by_rank: dict[int, list[Piece]] = {}
        for index in group:
            for piece in self.open[index]:
                by_rank.setdefault(piece.rank, []).append(piece)
        for rank, pieces in by_rank.items():
            names = list(dict.fromkeys(piece.array for piece in pieces if piece.nbytes))
            arrays = read_arrays(temporary / STATE.format(rank), names) if names else {}
            for piece, content in zip(pieces, unpack(self.leaves, pieces, arrays, verify=True), strict=True):
                leaf = self.leaves[piece.leaf]
                filled[piece.leaf] += lay(leaf, content, piece.box, contents[piece.leaf], whole(leaf))
        for index in group:
            if filled[index] != count(whole(self.leaves[index])):
                raise SnapshotError(missing(self.leaves[index]))
        return {index: row_of(self.leaves[index], contents[index]) for index in group}


def is_shared(leaves: Sequence[Leaf], piece: Piece) -> bool:
    """Tell whether a piece is one part of a long leaf: then its rank and the others digest such leaves together."""
    leaf = leaves[piece.leaf]
    return piece.box != whole(leaf) and size(leaf) > bits.BLOCK


def size(leaf: Leaf) -> int:
    """Return the bytes of a whole leaf."""
    return count(whole(leaf)) * width(leaf)
