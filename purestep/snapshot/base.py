"""The base of a run: leaves that stay as they are, frozen weights say, whose bytes are written once.

    snapshots/40/...                    a snapshot: what is trained, and where the bytes of the base are
    snapshots/base/<content>/state/...  the shards of the base that one rank has written, named by their content

It owns the directory `base`. Whether the leaves have really stayed as they are is not taken on trust: their bytes are
hashed in every save, and those that have changed are written again, under another name.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from purestep.snapshot import durable_directories, orbax_io, zarr_files
from purestep.snapshot.header import Header
from purestep.snapshot.packing import ARRAYS, BASE, Piece, pack
from purestep.snapshot.shards import OwnedShard

_LAYOUT = 1  # of the arrays in a part; another one would give other names to the same content


@dataclass(frozen=True)
class Part:
    """The shards of the base that one rank has, as arrays.

    Attributes:
        name: 32 hex digits that say which leaves and boxes it has, and their bytes; "" for one without bytes.
        arrays: by name.
        pieces: where the shards are in them.
    """

    name: str
    arrays: dict[str, np.ndarray]
    pieces: list[Piece]

    @property
    def nbytes(self) -> int:
        return sum(array.nbytes for array in self.arrays.values())

    def is_stored(self, root: Path) -> bool:
        """Tell whether it is beside the snapshots already, and no array of it was cut off."""
        state = root / BASE / self.name / ARRAYS
        return all(_is_whole(state / name, array.nbytes) for name, array in self.arrays.items())

    def write(self, root: Path, temporary: Path) -> None:
        """Write it durably; see `is_stored`.

        Args:
            root: the directory of snapshots.
            temporary: that of the save, which is removed if this process dies meanwhile.
        """
        final, made = root / BASE / self.name, temporary / BASE / self.name
        durable_directories.remove(final)  # where it is damaged: the bytes at hand are the right ones
        made.mkdir(parents=True)
        orbax_io.write_arrays(made / ARRAYS, self.arrays)
        durable_directories.fsync_tree(made)
        durable_directories.make_root(final.parent, parents=False)
        os.rename(made, final)
        durable_directories.fsync(final.parent)


def _is_whole(array: Path, nbytes: int) -> bool:
    return (array / ".zarray").is_file() and zarr_files.implausible(array, nbytes) is None


def part_of(shards: Sequence[OwnedShard], contents: Sequence[np.ndarray], sums: Sequence[str], rank: int = 0) -> Part:
    """Return shards of the base as a part.

    Args:
        shards: those that this rank owns.
        contents: uint8[nbytes] of each.
        sums: their checksums.
        rank: this one.
    """
    import xxhash

    rows = [[s.leaf.path, s.leaf.kind, s.leaf.dtype, *s.box, total] for s, total in zip(shards, sums, strict=True)]
    # Numbered in the base, not in the tree: the same weights have the same names below another tree.
    packed = pack([dataclasses.replace(s, index=i) for i, s in enumerate(shards)], contents, rank=rank)
    name = xxhash.xxh3_128_hexdigest(json.dumps([_LAYOUT, rows]).encode()) if packed.arrays else ""
    pieces = [
        piece._replace(leaf=shard.index, array=f"{name}/{piece.array}" if piece.array else "", checksum=total)
        for piece, shard, total in zip(packed.pieces, shards, sums, strict=True)
    ]
    return Part(name, packed.arrays, pieces)


def is_any_stored(root: Path) -> bool:
    """Tell whether a base is beside the snapshots."""
    return (root / BASE).is_dir()


def close(temporary: Path) -> None:
    """Remove what the parts of all ranks have left in the temporary directory of a save: empty directories."""
    shutil.rmtree(temporary / BASE, ignore_errors=True)


def parts_of(pieces: Iterable[Piece]) -> tuple[str, ...]:
    """Return the names of the parts in which the bytes of pieces are, in order."""
    return tuple(sorted({piece.array.rpartition("/")[0] for piece in pieces} - {""}))


def remove_unused(root: Path, headers: Sequence[Header | None]) -> None:
    """Remove the parts that no snapshot refers to.

    Args:
        root: the directory of snapshots.
        headers: of all snapshots; None of a damaged one, which may refer to any part, so that all of them stay.
    """
    if None in headers or not (root / BASE).is_dir():
        return
    used = {name for header in headers if header is not None for name in header.base.parts}
    for path in (root / BASE).iterdir():
        if path.name not in used:
            with contextlib.suppress(OSError):
                durable_directories.remove(path)
    with contextlib.suppress(OSError):  # it is not empty
        (root / BASE).rmdir()
