"""The digests of a stored snapshot, computed from its bytes without the classes of its tree, against its manifest.

What has come from elsewhere is checked by it before it counts as a snapshot.
"""

from __future__ import annotations

from pathlib import Path

from purestep import bits
from purestep.errors import CorruptSnapshot, explain
from purestep.snapshot import digest, orbax_io, reader
from purestep.snapshot.codec import Encoded
from purestep.snapshot.header import Scope
from purestep.snapshot.manifest import read_manifest
from purestep.snapshot.shards import full_box


def check(directory: Path) -> None:
    """Read every byte of a snapshot, and compare checksums and digests with those of its manifest.

    One leaf above 1 MiB at a time is in memory.

    Raises:
        CorruptSnapshot: bytes are missing, or are not those that were saved.
        SnapshotError: it was written in a format that this version does not know.
    """
    manifest = read_manifest(directory)
    leaves = manifest.leaves
    stored = [index for index, leaf in enumerate(leaves) if leaf.has_bytes]
    # Short leaves together, because reading an array has a fixed cost; long ones alone, to bound the memory.
    short = [index for index in stored if digest.size(leaves[index]) <= bits.BLOCK]
    long = [[index] for index in stored if digest.size(leaves[index]) > bits.BLOCK]
    rows: dict[int, digest.Row] = {}
    for group in [short, *long]:
        boxes = {index: [full_box(leaves[index])] for index in group}
        contents = reader.load(directory, manifest, boxes, orbax_io.read_arrays, verify=True)
        rows |= {index: digest.row_of(leaves[index], contents[index, box]) for index, (box,) in boxes.items()}
    encoded = Encoded(manifest.structure, list(leaves), [])
    recorded = {"digest": (manifest.digest, Scope())}
    recorded |= {
        f"digests[{name!r}]": (text, manifest.scopes[name])
        for name, text in manifest.digests.items()
        if name in manifest.scopes
    }
    for name, (text, scope) in recorded.items():
        if (found := digest.total(encoded, rows, scope)) != text:
            why = f"{name}: {text[:16]} in the manifest, {found[:16]} of the bytes"
            raise CorruptSnapshot(
                explain("the stored bytes do not have the digest of their manifest", where=str(directory), why=why)
            )
