"""Leaves, pieces and structure of a snapshot from its JSON files: right ones, or `CorruptSnapshot`, for any content.

`json_fields` reads each field as the type that it must have.
"""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

from purestep.snapshot.codec import DEPTH, JSON, PYTHON_KINDS, Leaf, from_text
from purestep.snapshot.json_fields import LARGEST, Field
from purestep.snapshot.packing import ARRAY_NAME, NUMPY_DTYPE, Piece
from purestep.snapshot.shards import count, width

_KEYED, _LISTED = ("dict", "OrderedDict", "defaultdict"), ("list", "tuple", "deque")


# --- leaves and pieces ------------------------------------------------------------------------------------------------


def leaves(rows: Field) -> list[Leaf]:
    """Return the leaves of `meta/tree.json`; an alias refers to an earlier leaf that has bytes of the same form."""
    decoded: list[Leaf] = []
    for row in rows.items():
        leaf = _leaf(row)
        if leaf.alias is not None:
            first = decoded[leaf.alias] if leaf.alias < len(decoded) else None
            if first is None or not first.has_bytes or _form(first) != _form(leaf):
                raise row["alias"].wrong("the index of an earlier leaf of the same dtype and shape")
        decoded.append(leaf)
    return decoded


def _form(leaf: Leaf) -> tuple[Any, ...]:
    return leaf.kind, leaf.dtype, leaf.shape


def _leaf(row: Field) -> Leaf:
    path, kind = row["path"].text(), row["kind"].text()
    if kind in PYTHON_KINDS:
        text = row["text"]
        try:
            from_text(kind, text.text())
        except (ValueError, KeyError, OverflowError) as error:
            raise text.wrong(f"the text of a Python {kind}") from error
        return Leaf(path, kind, text=text.text())
    if kind not in ("tensor", "array", "scalar"):
        raise row["kind"].wrong("a kind of leaf that this version knows")
    dtype, alias = row["dtype"], row.get("alias")
    known = isinstance(getattr(torch, dtype.text(), None), torch.dtype) if kind == "tensor" else _is_numpy(dtype.text())
    if not known:
        raise dtype.wrong("a dtype that snapshots hold")
    shape = row["shape"].naturals()
    leaf = Leaf(path, kind, dtype.text(), shape, alias=None if alias is None else alias.natural())
    # A product of such sizes would overflow int64 in numpy and torch, or claim memory that no machine has.
    if len(shape) > 64 or math.prod(max(n, 1) for n in shape) * width(leaf) >= LARGEST or (kind == "scalar" and shape):
        raise row["shape"].wrong("a shape that a tensor can have")
    return leaf


def _is_numpy(name: str) -> bool:
    if not NUMPY_DTYPE.fullmatch(name):
        return False
    try:
        np.dtype(name)
    except TypeError:  # the right form, but no such number of bytes
        return False
    return True


def piece(row: Field, leaves: list[Leaf]) -> Piece:
    """Return one row of `meta/pieces.json`, whose box is inside of its leaf."""
    items = row.items()
    if len(items) != len(Piece._fields):
        raise row.wrong(f"a list of {len(Piece._fields)} values")
    index, start, shape, rank, array, offset, nbytes, checksum = items
    leaf = leaves[index.natural(len(leaves))]
    piece = Piece(
        *(index.natural(), start.naturals(), shape.naturals(), rank.natural()),
        *(array.text(), offset.natural(), nbytes.natural(), checksum.text()),
    )
    inside = len(piece.start) == len(piece.shape) == len(leaf.shape) and all(
        at + n <= size for at, n, size in zip(piece.start, piece.shape, leaf.shape, strict=True)
    )
    if not leaf.has_bytes or not inside or piece.nbytes != count(piece.box) * width(leaf):
        raise row.wrong(f"a shard of a leaf of {leaf}")
    if piece.nbytes and not ARRAY_NAME.fullmatch(piece.array):
        # A name of another form could lead out of the snapshot's directory.
        raise array.wrong("the name of a stored array")
    return piece


# --- the structure ----------------------------------------------------------------------------------------------------


@dataclass
class _Structure:
    """Checks the nodes of a tree, which refer to leaves by index, each leaf once."""

    number: int
    seen: set[int] = field(default_factory=set)

    def node(self, entry: Field, depth: int) -> None:
        if depth > DEPTH:
            raise entry.wrong(f"a tree of at most {DEPTH} levels")
        if entry.value is None:
            return
        if type(entry.value) is int:
            # Each leaf once: a structure that repeats them could unfold into a tree of any size.
            if entry.natural(self.number) in self.seen:
                raise entry.wrong("the index of a leaf that no other place in the tree has")
            self.seen.add(entry.value)
            return
        items = entry["items"].items()
        self.head(entry, entry["node"].text(), len(items), depth)
        for item in items:
            self.node(item, depth + 1)

    def head(self, entry: Field, kind: str, number: int, depth: int) -> None:
        names: list[str | int] | None = None
        if kind in _KEYED:
            names = [key.value if type(key.value) is int else key.text() for key in entry["keys"].items()]
        elif kind in ("namedtuple", "pytree"):
            entry["class"].text()
            names = [name.text() for name in entry["fields"].items()]
            if kind == "pytree":
                for value in entry["static"].entries().values():
                    _static(value, depth + 1)
        elif kind not in _LISTED:
            raise entry["node"].wrong("a kind of node that this version knows")
        elif kind == "deque" and (longest := entry["maxlen"]).value is not None:
            longest.natural()
        unexpected = {"keys", "fields"} & set(entry.record()) - {"keys" if kind in _KEYED else "fields"}
        if names is None and {"keys", "fields"} & set(entry.record()):
            raise entry.wrong(f"a {kind}, whose items have no names")
        if unexpected or (names is not None and (len(names) != number or len(set(names)) != number)):
            raise entry.wrong(f"a {kind} with one name for each of its {number} items")


def _static(entry: Field, depth: int) -> None:
    if depth > DEPTH:
        raise entry.wrong(f"a static field of at most {DEPTH} levels")
    if type(entry.value) is list:
        for item in entry.items():
            _static(item, depth + 1)
    elif type(entry.value) is dict:
        tag = next(iter(entry.value)) if len(entry.value) == 1 else ""
        if tag == "int":
            entry[tag].text(_HEX)
        elif tag == "opaque":
            entry[tag].text()
        elif tag == "tuple":
            for item in entry[tag].items():
                _static(item, depth + 1)
        elif tag == "dict":
            for value in entry[tag].entries().values():
                _static(value, depth + 1)
        else:
            raise entry.wrong("a static field as snapshots write it")


_HEX = re.compile(r"-?0x[0-9a-f]+")


def structure(entry: Field, number: int) -> JSON:
    """Return the nodes of a tree with that many leaves, checked."""
    _Structure(number).node(entry, 0)
    return entry.value
