"""Leaves <-> the few flat arrays that are written to disk, with a checksum for each leaf.

A large leaf is an array of its own, small ones are concatenated into arenas: thousands of tiny files would cost more
than their bytes. It owns dtypes and checksums; it never touches a file.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple
from urllib.parse import quote

import numpy as np
import torch

from purestep.errors import CorruptSnapshot, explain
from purestep.snapshot.codec import Leaf, Stored, show
from purestep.snapshot.header import checksum as checksum
from purestep.snapshot.shards import Box, OwnedShard, count, width

SMALL = 1 << 20  # bytes; a smaller leaf goes into an arena
ARENA = 32 << 20  # bytes; an arena takes no more leaves once it is as large
STATE, BASE, ARRAYS = "parts/{}/state", "base", "state"  # of a snapshot's rank; beside it; in a part of the base
ARRAY_NAME = re.compile(r"([0-9a-f]{32}/)?(arena-\d+|\d+-[\w%-]*)", re.ASCII)
NUMPY_DTYPE = re.compile(r"[<>|=][biufc]\d{1,2}")
_STANDARD = re.compile(r"bool|u?int(8|16|32|64)|float(16|32|64)|complex(64|128)")
_MINI_FLOAT = re.compile(r"bfloat16|float8_\w+")
_HASH_THREADS = 4
_NO_CHECKSUM = ""


class Piece(NamedTuple):
    """Where the bytes of a shard of a leaf are stored.

    Attributes:
        leaf: index of the leaf.
        start, shape: box of the shard in the full leaf.
        rank: that wrote it.
        array: name of the array of that rank, "" for a shard without bytes. One of the base has the name of its part
            before it.
        offset, nbytes: range of bytes in the array.
        checksum: xxh3 of the bytes.
    """

    leaf: int
    start: tuple[int, ...]
    shape: tuple[int, ...]
    rank: int
    array: str
    offset: int
    nbytes: int
    checksum: str

    @property
    def box(self) -> Box:
        return self.start, self.shape

    def location(self, directory: Path) -> tuple[Path, str]:
        """Return in which directory the array is, and its name there, of a snapshot in a directory."""
        part, _, name = self.array.rpartition("/")
        return (directory.parent / BASE / part / ARRAYS if part else directory / STATE.format(self.rank)), name

    @staticmethod
    def from_json(row: Sequence[Any]) -> Piece:
        leaf, start, shape, *rest = row
        return Piece(leaf, tuple(start), tuple(shape), *rest)


@dataclass(frozen=True)
class Packed:
    """Flat arrays by name, and one piece for each shard, in order of the leaves, without checksums yet."""

    arrays: dict[str, np.ndarray]
    pieces: list[Piece]


def checksums(contents: Iterable[np.ndarray]) -> list[str]:
    """Return the checksum of each content; large ones in threads, because hashing them releases the GIL."""
    contents = list(contents)
    large = [i for i, content in enumerate(contents) if content.nbytes >= SMALL]
    sums: dict[int, str] = {}
    if len(large) > 1:
        with ThreadPoolExecutor(_HASH_THREADS) as pool:
            sums = dict(zip(large, pool.map(lambda i: checksum(contents[i]), large), strict=True))
    return [sums[i] if i in sums else checksum(content) for i, content in enumerate(contents)]


def with_checksums(pieces: Sequence[Piece], sums: Sequence[str]) -> list[Piece]:
    """Return pieces with their checksums, which another thread computes while the arrays are written to disk."""
    return [piece._replace(checksum=checksum) for piece, checksum in zip(pieces, sums, strict=True)]


def pack(shards: Sequence[OwnedShard], contents: Sequence[np.ndarray], *, rank: int = 0) -> Packed:
    """Place the bytes of shards in arrays.

    Args:
        shards: those that this rank writes.
        contents: uint8[nbytes] of each, contiguous; large ones are not copied.
        rank: of this process.
    """
    arrays: dict[str, np.ndarray] = {}
    pieces: list[Piece] = []
    arena: list[np.ndarray] = []
    filled = number = 0
    for shard, content in zip(shards, contents, strict=True):
        if content.nbytes >= SMALL:
            # With its dtype and shape, so that other programs can read the array with zarr or Orbax alone.
            name, offset = array_name(shard.index, shard.leaf.path), 0
            arrays[name] = _typed(content, shard.leaf, shard.box[1])
        else:
            # Small leaves share an arena, in order. It is closed only when it is full: a leaf is never cut, so an arena
            # may be one leaf longer than ARENA.
            if filled >= ARENA:
                arrays[f"arena-{number}"] = np.concatenate(arena)
                arena, filled, number = [], 0, number + 1
            name, offset = f"arena-{number}" if content.nbytes else "", filled
            arena.append(content)
            filled += content.nbytes
        pieces.append(Piece(shard.index, *shard.box, rank, name, offset, content.nbytes, _NO_CHECKSUM))
    if filled:
        arrays[f"arena-{number}"] = np.concatenate(arena)
    return Packed(arrays, pieces)


def array_name(index: int, path: str) -> str:
    """Return the name of a large leaf's array: unique, and valid as the name of a file.

    Examples:
        >>> array_name(3, ".params['0/../weight']")
        '3-params%5B%270%2F%2E%2E%2Fweight%27%5D'
    """
    # `quote` keeps "." and "~", which `ARRAY_NAME` does not allow.
    return f"{index}-" + quote(show(path), safe="").replace(".", "%2E").replace("~", "%7E")[:150]


def _typed(content: np.ndarray, leaf: Leaf, shape: tuple[int, ...]) -> np.ndarray:
    """View bytes as the dtype that other readers of the array expect; as bytes where numpy has no such dtype."""
    if leaf.kind == "tensor":
        dtype = _numpy_dtype(leaf.dtype)
    else:
        dtype = np.dtype(leaf.dtype) if np.dtype(leaf.dtype).isnative else None
    return content if dtype is None else content.view(dtype).reshape(shape)


def _numpy_dtype(name: str) -> np.dtype | None:
    if _STANDARD.fullmatch(name):
        return np.dtype(name)
    if _MINI_FLOAT.fullmatch(name):  # only these: 4-bit types of ml_dtypes do not keep every bit of a byte
        import ml_dtypes  # comes with Orbax

        return np.dtype(getattr(ml_dtypes, name))
    return None


def unpack(
    leaves: Sequence[Leaf], pieces: Sequence[Piece], arrays: Mapping[str, np.ndarray], *, verify: bool
) -> list[np.ndarray]:
    """Return uint8[nbytes] of each piece, in memory that no other piece shares.

    Args:
        leaves: all leaves, which the pieces refer to by index.
        pieces: of one rank.
        arrays: the arrays that this rank has written, by name.
        verify: whether to compare checksums.

    Raises:
        CorruptSnapshot: names the leaves whose bytes are missing or are not the bytes that were saved.
    """
    flat = {name: np.ascontiguousarray(array).reshape(-1).view(np.uint8) for name, array in arrays.items()}
    contents = [_slice(flat, leaves[piece.leaf], piece) for piece in pieces]
    if verify:
        pairs = zip(pieces, checksums(contents), strict=True)
        wrong = [piece.leaf for piece, actual in pairs if actual != piece.checksum]
        if wrong:
            where = "\n".join(f"{show(leaves[i].path)}: {leaves[i]}" for i in wrong[:10])
            where += f"\nand {len(wrong) - 10} more" if len(wrong) > 10 else ""
            why = "their checksums are not those of the manifest: the bytes changed after they were saved"
            raise CorruptSnapshot(explain("stored leaves are corrupt", where=where, why=why))
    return contents


def _slice(flat: Mapping[str, np.ndarray], leaf: Leaf, piece: Piece) -> np.ndarray:
    # The manifest is sealed, yet another program may have written it: a box is checked before it is used as a slice.
    inside = all(start >= 0 and start + n <= size for start, n, size in zip(*piece.box, leaf.shape, strict=True))
    if not inside or piece.nbytes != count(piece.box) * width(leaf):
        where = f"{show(leaf.path)}: {leaf}, {piece.nbytes} bytes for {list(piece.shape)} from {list(piece.start)}"
        raise CorruptSnapshot(explain("a shard of a leaf exceeds its shape", where=where))
    if piece.nbytes == 0:
        return np.empty(0, np.uint8)
    array = flat.get(piece.array)
    if array is None or piece.offset < 0 or array.nbytes < piece.offset + piece.nbytes:
        what = "the bytes of a leaf are missing"
        raise CorruptSnapshot(explain(what, where=f"{show(leaf.path)}: {leaf}, in array {piece.array!r}"))
    # A slice of an arena is copied, so that no leaf keeps the whole arena alive or shares its storage.
    is_array = array.nbytes == piece.nbytes
    return array if is_array and array.flags.writeable else array[piece.offset : piece.offset + piece.nbytes].copy()


def materialize(leaf: Leaf, content: np.ndarray, shape: tuple[int, ...] | None = None) -> Stored | np.generic:
    """View uint8[nbytes] as the tensor, array or scalar that a leaf describes. Nothing is copied.

    Args:
        leaf: the leaf.
        content: its bytes, or those of a shard of it.
        shape: of the shard; by default that of the leaf.

    Raises:
        CorruptSnapshot: the bytes cannot be of that dtype and shape.
    """
    shape = leaf.shape if shape is None else shape
    try:
        if leaf.kind == "tensor":
            # The name comes from a file, and torch has attributes of every kind: only a dtype is accepted.
            dtype = getattr(torch, leaf.dtype)
            if not isinstance(dtype, torch.dtype):
                raise TypeError(f"torch.{leaf.dtype} is not a dtype")
            host = torch.from_numpy(content) if content.size else torch.empty(0, dtype=torch.uint8)
            return host.view(dtype).reshape(shape)
        if not NUMPY_DTYPE.fullmatch(leaf.dtype):
            raise TypeError(f"{leaf.dtype!r} is not a dtype that snapshots hold")
        array = content.view(np.dtype(leaf.dtype)).reshape(shape)
        return array[()] if leaf.kind == "scalar" else array
    except (TypeError, ValueError, RuntimeError, AttributeError) as error:
        where = f"{show(leaf.path)}: {leaf.dtype}{list(leaf.shape)} from {content.nbytes} bytes"
        raise CorruptSnapshot(explain("a leaf cannot be rebuilt", where=where, why=str(error))) from error
