"""The manifest of a snapshot: step, metrics, environment, structure, leaves and checksums.

Three sealed JSON files: `meta/data.json` (small, read for a listing), `meta/tree.json` (structure and leaves) and
`meta/pieces.json` (where the bytes of each leaf are). A seal is a checksum of the exact text; `data.json` also has the
checksums of the other two. Nothing read here is ever used as a path or as code.
"""

from __future__ import annotations

import dataclasses
import math
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.backends.cpu

from purestep import portable
from purestep.distributed.mesh import world_size
from purestep.errors import CorruptSnapshot, explain
from purestep.snapshot import decode
from purestep.snapshot.codec import JSON, Leaf
from purestep.snapshot.header import DATA as DATA
from purestep.snapshot.header import FORMAT, PIECES, TREE, read_file
from purestep.snapshot.header import Header as Header
from purestep.snapshot.header import checksum as checksum
from purestep.snapshot.header import read_header as read_header
from purestep.snapshot.header import seal as seal
from purestep.snapshot.header import unseal as unseal
from purestep.snapshot.json_fields import Field
from purestep.snapshot.packing import Piece

_PIECES_1 = "parts/0/spec"  # format 1 knew one rank, and one piece for each leaf that has bytes


@dataclass(frozen=True)
class Manifest(Header):
    """Everything in a snapshot except its arrays.

    Attributes:
        structure: the nodes of the tree as JSON, referring to leaves by index.
        leaves: path, kind, dtype, shape of each leaf, and the text of Python leaves.
        pieces: of each stored shard of a leaf: its box, where its bytes are, their number and xxh3.
    """

    structure: JSON = None
    leaves: Sequence[Leaf] = ()
    pieces: Sequence[Piece] = ()


def environment() -> dict[str, JSON]:
    """Return the settings of this process that the bits of a run depend on, besides its inputs: JSON by name."""
    return {
        "python": sys.version.split()[0],
        "torch": torch.__version__,
        "bits": portable.record(),
        "threads": torch.get_num_threads(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn_deterministic": torch.backends.cudnn.deterministic,
        "cudnn_benchmark": torch.backends.cudnn.benchmark,
        "float32_matmul_precision": torch.get_float32_matmul_precision(),
        "world_size": world_size(),
    }


def now() -> float:
    """Return the wall-clock time that a new snapshot records."""
    return time.time()


# --- writing --------------------------------------------------------------------------------------------------------


def dump(manifest: Manifest) -> dict[str, bytes]:
    """Return the content of each file of a manifest, by its path in the snapshot."""
    files = {
        TREE: seal({"structure": manifest.structure, "leaves": [leaf.to_json() for leaf in manifest.leaves]}),
        PIECES: seal({"pieces": [list(piece) for piece in manifest.pieces]}),
    }
    head = {
        "format": FORMAT if manifest.base.parts else 2,
        "step": manifest.step,
        "created": manifest.created,
        "digest": manifest.digest,
        "digests": dict(manifest.digests),
        "scopes": {name: scope.to_json() for name, scope in manifest.scopes.items()},
        "metrics": {name: _number(value) for name, value in manifest.metrics.items()},
        "info": dict(manifest.info),
        "environment": dict(manifest.environment),
        "keep": manifest.keep,
        **({"base": dataclasses.asdict(manifest.base)} if manifest.base.parts else {}),
        "seals": {name: checksum(content) for name, content in files.items()},
    }
    return {**files, DATA: seal(head)}


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)  # NaN and infinity are no JSON


# --- reading --------------------------------------------------------------------------------------------------------


def read_manifest(directory: Path) -> Manifest:
    """Read everything but the arrays.

    Raises:
        CorruptSnapshot: a file is missing, unreadable or not what was written.
    """
    head = read_header(directory)
    body = _sealed(directory, TREE, head)
    leaves = decode.leaves(body["leaves"])
    structure = decode.structure(body["structure"], len(leaves))
    rows = _sealed(directory, _PIECES_1 if head.format == 1 else PIECES, head)["pieces"].items()
    rows = _rows_1(leaves, rows) if head.format == 1 else rows
    pieces = [decode.piece(row, leaves) for row in rows]
    known = {name: getattr(head, name) for name in Header.__dataclass_fields__}
    return Manifest(**known, structure=structure, leaves=leaves, pieces=pieces)


def _rows_1(leaves: Sequence[Leaf], rows: Sequence[Field]) -> list[Field]:
    """Return rows of format 1, one for each leaf that has bytes, as format 2 has them."""
    indexed = [(index, leaf) for index, leaf in enumerate(leaves) if leaf.has_bytes]
    if rows and len(rows) != len(indexed):
        raise rows[0].wrong(f"one of {len(indexed)} rows")
    # Format 1 stored each leaf unsharded, written by rank 0: the box is the full leaf.
    heads = [[index, [0] * len(leaf.shape), list(leaf.shape), 0] for index, leaf in indexed]
    return [
        dataclasses.replace(row, value=[*head, *(item.value for item in row.items())])
        for head, row in zip(heads, rows, strict=False)
    ]


def _sealed(directory: Path, name: str, head: Header) -> Field:
    content = read_file(directory, name)
    # Its own seal is intact in a file copied from another snapshot; this checksum ties it to this one.
    if checksum(content) != head.seals.get(name):
        why = f"it is not the file that {DATA} was written with"
        raise CorruptSnapshot(explain("a file of the snapshot is corrupt", where=str(directory / name), why=why))
    return Field(unseal(content, str(directory / name)), str(directory / name))
