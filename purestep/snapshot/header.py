"""The header of a snapshot, `meta/data.json`, and the seal of it and of the other files: JSON with its own checksum.

Listings and tables of runs read thousands of headers and nothing else, so this file needs no torch. `manifest` reads
the other files.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from purestep.errors import CorruptSnapshot, SnapshotError, explain
from purestep.snapshot import json_fields
from purestep.snapshot.json_fields import JSON

FORMAT = 3  # 2 is written where there is no base, so that older versions read those snapshots
DATA, TREE, PIECES = "meta/data.json", "meta/tree.json", "meta/pieces.json"
_DIGEST = re.compile(r"[0-9a-f]{64}")
_PART = re.compile(r"[0-9a-f]{32}")
_OPEN, _MIDDLE, _CLOSE = b'{"checksum": "', b'", "body": ', b"}\n"


@dataclass(frozen=True)
class Scope:
    """Which leaves of a tree a digest covers: those under a path, without others; paths count from there.

    Examples:
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


@dataclass(frozen=True)
class Base:
    """Which leaves of a tree stay as they are, so that their bytes are written once, beside the snapshots.

    Attributes:
        paths: of the leaves, as `purestep.tree.paths` prints them.
        under: the paths in the digest of the base count from there.

    Examples:
        >>> base = Base(frozenset({".buffers['w']"}), ".buffers")
        >>> base.path(".buffers['w']"), base.path(".buffers['mean']")
        ("['w']", None)
    """

    paths: frozenset[str] = frozenset()
    under: str = ""

    def path(self, path: str) -> str | None:
        """Return the path of a leaf in the digest of the base, None when it is not of the base."""
        return path.removeprefix(self.under) if path in self.paths else None


@dataclass(frozen=True)
class StoredBase:
    """What a snapshot says of its base.

    Attributes:
        digest: of these leaves; "" without a base. Of a run with one train state it is the digest of its frozen
            parameters by name, as in a file of `ps.save_adapters`.
        parts: names of the directories under `base`, beside the snapshots, that hold the bytes.
    """

    digest: str = ""
    parts: tuple[str, ...] = ()


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
        base: the leaves whose bytes are written once, beside the snapshots.
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
    base: StoredBase = field(default_factory=StoredBase)


def checksum(data: Any) -> str:
    """Return the xxh3 (64 bit) of some bytes, in hex."""
    import xxhash

    return xxhash.xxh3_64_hexdigest(data)


def seal(body: JSON) -> bytes:
    """Return JSON text that carries the checksum of itself.

    Examples:
        >>> unseal(seal({"a": 1}), "meta/data.json")
        {'a': 1}
    """
    text = json.dumps(body, separators=(",", ":")).encode("ascii")
    return _OPEN + checksum(text).encode("ascii") + _MIDDLE + text + _CLOSE


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
    return json_fields.parse(text, name).value


def read_header(directory: Path) -> Header:
    """Read the header of a snapshot.

    Raises:
        CorruptSnapshot: the file is missing, unreadable or not what was written.
        SnapshotError: it was written in a format that this version does not know.
    """
    return parse_header(read_file(directory, DATA), str(directory / DATA))


def parse_header(content: bytes, file: str) -> Header:
    """Return the header that is the content of `meta/data.json`; errors, those of `read_header`, name `file`."""
    head = json_fields.Field(unseal(content, file), file)
    format_ = head["format"].natural()
    if not 1 <= format_ <= FORMAT:
        what = f"the snapshot is of format {format_}, this version of purestep reads formats 1 to {FORMAT}"
        where = file.removesuffix(f"/{DATA}")
        raise SnapshotError(explain(what, where=where, instead="read it with the version that wrote it"))
    scopes = head.get("scopes")
    return Header(
        step=head["step"].natural(),
        metrics={name: value.number() for name, value in head["metrics"].entries().items()},
        info=head["info"].record(),
        digest=head["digest"].text(_DIGEST),
        created=head["created"].number(),
        environment=head["environment"].record(),
        keep=head["keep"].text(),
        seals=json_fields.texts(head["seals"]),
        format=format_,
        digests=json_fields.texts(head.get("digests"), _DIGEST),
        scopes={} if scopes is None else {name: _scope(field) for name, field in scopes.entries().items()},
        base=StoredBase() if (base := head.get("base")) is None else _base(base),
    )


def _scope(field: json_fields.Field) -> Scope:
    return Scope(field["under"].text(), tuple(path.text() for path in field["without"].items()))


def _base(field: json_fields.Field) -> StoredBase:
    return StoredBase(field["digest"].text(_DIGEST), tuple(name.text(_PART) for name in field["parts"].items()))


def read_file(directory: Path, name: str) -> bytes:
    try:
        return (directory / name).read_bytes()
    except OSError as error:
        what = "a file of the snapshot cannot be read"
        raise CorruptSnapshot(explain(what, where=str(directory / name), why=str(error.strerror or error))) from error
