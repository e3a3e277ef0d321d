"""Loader states survive the way through plain values, whatever they hold; what cannot, is named."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purestep import tree
from purestep.data.plain_state import pack, unpack
from purestep.errors import DataError

scalars = st.none() | st.booleans() | st.integers() | st.floats(allow_nan=False) | st.text() | st.binary()
keys = st.text() | st.integers() | st.just("__kind__") | st.tuples(st.integers(), st.binary())
values = st.recursive(
    scalars,
    lambda inner: (
        st.lists(inner) | st.dictionaries(keys, inner) | st.lists(inner).map(tuple) | st.binary().map(bytearray)
    ),
    max_leaves=20,
)


def same(a: object, b: object) -> bool:
    if type(a) is not type(b):
        return False
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    return a == b


@given(values)
def test_round_trip_through_json(value: object) -> None:
    assert same(unpack(json.loads(json.dumps(pack(value)))), value)


@pytest.mark.parametrize(
    "array", [np.arange(6.0).reshape(2, 3)[:, ::2], np.zeros((0, 2)), np.array(3, ">i4"), np.arange(3) > 1]
)
def test_arrays_and_scalars(array: np.ndarray) -> None:
    back = unpack(pack({"a": array, "s": np.float32(2.5), "t": torch.ones(2)}))
    assert back["a"].dtype == array.dtype
    assert np.array_equal(back["a"], array)
    assert isinstance(back["s"], np.float32)
    assert torch.equal(back["t"], torch.ones(2))
    back["a"][...] = 0  # writable, as it was


def test_packed_leaves_can_be_digested() -> None:
    tree.digest(pack({"a": (b"x", {1: np.arange(3)}), "n": None}))


def test_what_needs_pickle_is_refused() -> None:
    with pytest.raises(DataError) as caught:
        pack({"outer": [{"path": Path("x")}]}, "state")
    assert "PosixPath, which a snapshot cannot hold" in str(caught.value)
    assert "state['outer'][0]['path']" in str(caught.value)


def test_neither_side_shares_memory_with_the_loader() -> None:
    own = {"buffer": torch.zeros(2)}
    packed = pack(own)
    own["buffer"][0] = 1
    given = unpack(packed)
    assert given["buffer"].tolist() == [0, 0]
    given["buffer"][1] = 1
    assert unpack(packed)["buffer"].tolist() == [0, 0]
