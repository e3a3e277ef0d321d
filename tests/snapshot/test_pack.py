from __future__ import annotations

import numpy as np
import pytest
import torch

from purestep.errors import CorruptSnapshot
from purestep.snapshot import packing as module
from purestep.snapshot.codec import encode
from purestep.snapshot.packing import (
    ARRAY_NAME,
    Packed,
    array_name,
    checksums,
    materialize,
    pack,
    unpack,
    with_checksums,
)
from purestep.snapshot.processes import Ranks
from purestep.snapshot.shards import owned
from purestep.snapshot.staging import Staging


def packed(value):
    encoded = encode(value)
    parts = owned(encoded, Ranks())
    contents = Staging().copy([part.value for part in parts])()
    laid = pack(parts, contents)
    return encoded.leaves, Packed(laid.arrays, with_checksums(laid.pieces, checksums(contents)))


def unpacked(leaves, pieces, arrays):
    contents = unpack(leaves, pieces, arrays, verify=True)
    return [materialize(leaves[piece.leaf], content) for piece, content in zip(pieces, contents, strict=True)]


@pytest.mark.parametrize("small", [1, 100, 1 << 20])
@pytest.mark.parametrize("arena", [1, 1000, 1 << 25])
def test_layout_does_not_change_what_comes_back(monkeypatch, seed, small, arena):
    monkeypatch.setattr(module, "SMALL", small)
    monkeypatch.setattr(module, "ARENA", arena)
    value = [torch.randn(n) for n in (0, 1, 3, 17, 100, 401)] + [torch.arange(5), torch.ones(2, 3).bfloat16()]
    leaves, result = packed(value)
    back = unpacked(leaves, result.pieces, result.arrays)
    assert all(torch.equal(a, b) and a.dtype == b.dtype for a, b in zip(value, back, strict=True))
    assert sum(array.nbytes for array in result.arrays.values()) == sum(t.nbytes for t in value)
    assert all(ARRAY_NAME.fullmatch(name) for name in result.arrays)


def test_large_leaves_are_arrays_of_their_dtype(seed):
    value = {
        "w": torch.randn(600, 700),
        "b": torch.randn(1 << 20).bfloat16(),
        "f": torch.zeros(1 << 20, dtype=torch.int8),
    }
    _, result = packed(value)
    assert [str(array.dtype) for array in result.arrays.values()] == ["float32", "bfloat16", "int8"]
    assert next(iter(result.arrays.values())).shape == (600, 700)


def test_four_bit_dtypes_keep_every_bit():
    raw = torch.randint(0, 256, (1 << 20,), dtype=torch.uint8)
    for dtype in (torch.float4_e2m1fn_x2, torch.uint4, torch.bits8):
        leaves, result = packed(raw.view(dtype))
        back = unpacked(leaves, result.pieces, result.arrays)[0]
        assert back.dtype is dtype
        assert torch.equal(back.view(torch.uint8), raw)


def test_each_flipped_bit_is_found_and_its_leaf_named(seed):
    value = {"small": torch.randn(5), "large": torch.randn(1 << 19)}
    leaves, result = packed(value)
    for piece, name in zip(result.pieces, value, strict=True):
        raw = result.arrays[piece.array].reshape(-1).view(np.uint8)
        for position in (piece.offset, piece.offset + piece.nbytes - 1):
            raw[position] ^= 4
            with pytest.raises(CorruptSnapshot, match=rf"stored leaves are corrupt\n  where:   \['{name}'\]: float32"):
                unpack(leaves, result.pieces, result.arrays, verify=True)
            raw[position] ^= 4
    unpack(leaves, result.pieces, result.arrays, verify=True)


def test_pieces_without_checksums_are_refused(seed):
    encoded = encode({"x": torch.randn(5)})
    parts = owned(encoded, Ranks())
    laid = pack(parts, Staging().copy([part.value for part in parts])())
    with pytest.raises(CorruptSnapshot, match="stored leaves are corrupt"):
        unpack(encoded.leaves, laid.pieces, laid.arrays, verify=True)


def test_missing_and_short_arrays(seed):
    leaves, result = packed({"x": torch.randn(5)})
    for arrays in ({}, {"arena-0": result.arrays["arena-0"][:-1]}):
        with pytest.raises(CorruptSnapshot, match=r"bytes of a leaf are missing\n  where:   \['x'\]: float32\[5\]"):
            unpack(leaves, result.pieces, arrays, verify=True)
    with pytest.raises(CorruptSnapshot, match="missing"):
        unpack(leaves, [result.pieces[0]._replace(offset=-4)], result.arrays, verify=False)


@pytest.mark.parametrize(
    ("kind", "dtype"), [("tensor", "load"), ("tensor", "nothing"), ("array", "O"), ("array", "M8[s]")]
)
def test_only_dtypes_are_dtypes(kind, dtype):
    leaf = type(encode(torch.zeros(2)).leaves[0])("", kind, dtype, (1,))
    with pytest.raises(CorruptSnapshot, match="cannot be rebuilt"):
        module.materialize(leaf, np.zeros(8, np.uint8))


def test_names_of_arrays_are_safe_and_unique():
    paths = ["['../../x']", "['a/b']", "['.']", "['" + "x" * 5000 + "']", "['ü~\\0']", "['W']", "['w']"]
    names = [array_name(i, path) for i, path in enumerate(paths)]
    assert all(ARRAY_NAME.fullmatch(name) and len(name) < 200 for name in names)
    assert len({name.lower() for name in names}) == len(names)
    assert not ARRAY_NAME.fullmatch("0-../x")
    assert not ARRAY_NAME.fullmatch("..")
    assert not ARRAY_NAME.fullmatch("/etc/x")
