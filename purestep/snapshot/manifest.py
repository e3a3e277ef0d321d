"""The manifest of a snapshot: step, metrics, environment, structure, leaves and checksums.

Three sealed JSON files: `meta/data.json` (small, read for a listing), `meta/tree.json` (structure and leaves) and
`meta/pieces.json` (where the bytes of each leaf are). A seal is a checksum of the exact text; `data.json` also has the
checksums of the other two. Nothing read here is ever used as a path or as code.
"""

from __future__ import annotations

import dataclasses
import json
import math
import re
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import torch
import torch.backends.cpu

from purestep import portable
from purestep.distributed.mesh import world_size
from purestep.errors import CorruptSnapshot, SnapshotError, explain
from purestep.snapshot import decode
from purestep.snapshot.codec import JSON, Leaf
from purestep.snapshot.digest import Scope
from purestep.snapshot.packing import Piece, checksum

FORMAT = 2
DATA, TREE, PIECES = "meta/data.json", "meta/tree.json", "meta/pieces.json"
_PIECES_1 = "parts/0/spec"  # format 1 knew one rank, and one piece for each leaf that has bytes
_DIGEST = re.compile(r"[0-9a-f]{64}")
_OPEN, _MIDDLE, _CLOSE = b'{"checksum": "', b'", "body": ', b"}\n"


@dataclass(frozen=True)
class Header:
    """The small part of a manifest: all that listing and preservation policies need.

    Attributes:
        step: the step the snapshot was saved under.
        metrics: as given to `save`.
        info: as given to `save`.
        digest: `purestep.tree.digest` of the saved tree.
        digests: of subtrees, by name. A run has "state", the digest of its train state, and "run", that of the loop
            without its times; both are equal for equal runs. Snapshots of older versions have none.
        scopes: which leaves each of `digests` covers.
        created: seconds since the epoch.
        environment: versions, thread count, CPU capability, deterministic flags, world size: they influence the bits.
        keep: repr of the preservation policy of the writer.
        seals: checksum of each of the other files, 16 hex digits.
        format: version of the files; older ones are read, too.
    """

    step: int
    metrics: Mapping[str, float]
    info: Mapping[str, JSON]
    digest: str
    created: float = 0.0
    environment: Mapping[str, JSON] = field(default_factory=dict)
    keep: str = ""
    seals: Mapping[str, str] = field(default_factory=dict)
    format: int = FORMAT
    digests: Mapping[str, str] = field(default_factory=dict)
    scopes: Mapping[str, Scope] = field(default_factory=dict)


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
        "format": FORMAT,
        "step": manifest.step,
        "created": manifest.created,
        "digest": manifest.digest,
        "digests": dict(manifest.digests),
        "scopes": {name: scope.to_json() for name, scope in manifest.scopes.items()},
        "metrics": {name: _number(value) for name, value in manifest.metrics.items()},
        "info": dict(manifest.info),
        "environment": dict(manifest.environment),
        "keep": manifest.keep,
        "seals": {name: checksum(content) for name, content in files.items()},
    }
    return {**files, DATA: seal(head)}


def seal(body: JSON) -> bytes:
    """Return JSON text that carries the checksum of itself.

    Examples:
        >>> unseal(seal({"a": 1}), "meta/data.json")
        {'a': 1}
    """
    text = json.dumps(body, separators=(",", ":")).encode("ascii")
    return _OPEN + checksum(text).encode("ascii") + _MIDDLE + text + _CLOSE


def _number(value: float) -> float | str:
    return value if math.isfinite(value) else repr(value)  # NaN and infinity are no JSON


# --- reading --------------------------------------------------------------------------------------------------------


def unseal(content: bytes, name: str) -> JSON:
    """Return the body of sealed text, as parsed JSON of any type.

    Raises:
        CorruptSnapshot: the text is not what was sealed.
    """
    # Compared as bytes before anything is parsed: a damaged file never reaches the JSON parser.
    start = len(_OPEN) + 16 + len(_MIDDLE)
    text = content[start : -len(_CLOSE)]
    if content != _OPEN + checksum(text).encode("ascii") + _MIDDLE + text + _CLOSE:
        why = "its text does not match the checksum in it: it was truncated, changed, or is of another program"
        raise CorruptSnapshot(explain("a file of the snapshot is corrupt", where=name, why=why))
    return decode.parse(text, name).value


def read_header(directory: Path) -> Header:
    """Read the header of a snapshot.

    Raises:
        CorruptSnapshot: the file is missing, unreadable or not what was written.
        SnapshotError: it was written in a format that this version does not know.
    """
    file = str(directory / DATA)
    head = decode.Field(unseal(_read(directory, DATA), file), file)
    format_ = head["format"].natural()
    if format_ not in (1, FORMAT):
        what = f"the snapshot is of format {format_}, this version of purestep reads formats 1 and {FORMAT}"
        raise SnapshotError(explain(what, where=str(directory), instead="read it with the version that wrote it"))
    scopes = head.get("scopes")
    return Header(
        step=head["step"].natural(),
        metrics={name: value.number() for name, value in head["metrics"].entries().items()},
        info=head["info"].record(),
        digest=head["digest"].text(_DIGEST),
        created=head["created"].number(),
        environment=head["environment"].record(),
        keep=head["keep"].text(),
        seals=decode.texts(head["seals"]),
        format=format_,
        digests=decode.texts(head.get("digests"), _DIGEST),
        scopes={} if scopes is None else {name: _scope(field) for name, field in scopes.entries().items()},
    )


def _scope(field: decode.Field) -> Scope:
    return Scope(field["under"].text(), tuple(path.text() for path in field["without"].items()))


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


def _rows_1(leaves: Sequence[Leaf], rows: Sequence[decode.Field]) -> list[decode.Field]:
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


def _sealed(directory: Path, name: str, head: Header) -> decode.Field:
    content = _read(directory, name)
    # Its own seal is intact in a file copied from another snapshot; this checksum ties it to this one.
    if checksum(content) != head.seals.get(name):
        why = f"it is not the file that {DATA} was written with"
        raise CorruptSnapshot(explain("a file of the snapshot is corrupt", where=str(directory / name), why=why))
    return decode.Field(unseal(content, str(directory / name)), str(directory / name))


def _read(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except OSError as error:
        what = "a file of the snapshot cannot be read"
        raise CorruptSnapshot(explain(what, where=str(directory / name), why=str(error.strerror or error))) from error
