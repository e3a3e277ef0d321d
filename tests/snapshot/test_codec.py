from __future__ import annotations

import json
from collections import defaultdict
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from purestep import tree
from purestep.errors import TreeError
from purestep.snapshot import decode
from purestep.snapshot.codec import encode, from_text
from purestep.snapshot.packing import Piece, checksums, pack, unpack, with_checksums
from purestep.snapshot.processes import Ranks
from purestep.snapshot.reader import _LeafValues
from purestep.snapshot.shards import owned
from purestep.snapshot.staging import Staging
from purestep.snapshot.template import build, check


class Pair(NamedTuple):
    left: Any
    right: Any


@tree.pytree
class Inner:
    params: Any
    name: str = tree.static(default="inner")
    shape: tuple[int, ...] = tree.static(default=(1, 2))


@tree.pytree
class Outer:
    inner: Inner
    extra: Any
    function: Any = tree.static(default=None)


def round_trip(value, like=...):
    """Through JSON text and flat arrays, as a snapshot does, without the disk."""
    encoded = encode(value)
    parts = owned(encoded, Ranks())
    contents = Staging().copy([part.value for part in parts])()
    packed = pack(parts, contents)
    leaves = decode.leaves(decode.Field(json.loads(json.dumps([leaf.to_json() for leaf in encoded.leaves])), "x"))
    structure = json.loads(json.dumps(encoded.structure))
    rows = json.loads(json.dumps([list(piece) for piece in with_checksums(packed.pieces, checksums(contents))]))
    pieces = [Piece.from_json(row) for row in rows]
    check(structure, leaves, like)
    values = _LeafValues(leaves)
    contents = unpack(leaves, pieces, packed.arrays, verify=True)
    values.contents = {(piece.leaf, piece.box): content for piece, content in zip(pieces, contents, strict=True)}
    return build(structure, like, values)


python_leaves = st.one_of(
    st.booleans(), st.integers(), st.floats(), st.text(), st.binary(), st.complex_numbers(), st.none()
)
dtypes = [torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float8_e5m2, torch.complex64]
tensors = st.tuples(st.lists(st.integers(0, 3), max_size=3), st.sampled_from(dtypes)).map(
    lambda drawn: torch.randint(0, 2, drawn[0]).to(drawn[1])
)
trees = st.recursive(
    python_leaves | tensors | tensors.map(lambda t: np.asarray(t.bool())),
    lambda child: st.one_of(
        st.lists(child, max_size=4),
        st.lists(child, max_size=3).map(tuple),
        st.dictionaries(st.text(max_size=5) | st.integers(), child, max_size=4),
        st.tuples(child, st.text(max_size=3)).map(lambda drawn: Inner(drawn[0], name=drawn[1])),
    ),
    max_leaves=15,
)


@given(trees)
def test_any_tree_comes_back(value):
    for like in (..., value):
        back = round_trip(value, like)
        assert tree.digest(back) == tree.digest(value)
        assert tree.structure(back) == tree.structure(value)
        assert [type(leaf) for leaf in tree.leaves(back)] == [type(leaf) for leaf in tree.leaves(value)]


@given(trees)
def test_paths_are_those_of_tree_paths(value):
    assert sorted(leaf.path for leaf in encode(value).leaves) == sorted(tree.paths(value))


def test_every_kind_of_leaf_and_node(example):
    value = example
    back = round_trip(value)
    assert tree.diff(value, back) == ()
    assert list(back) == list(value)  # the order of keys is kept
    assert {type(key) for key in back["a"]} == {str, int}
    assert [type(x) for x in back["python"]] == [type(x) for x in value["python"]]
    assert [type(x) for x in back["nodes"]] == [type(x) for x in value["nodes"]]
    assert back["nodes"][4].maxlen == 3
    assert back["numpy"][4].dtype == np.dtype(">f8")
    assert back["tied"] is back["weight"] is back["view"]
    assert back["large"] is not back["large_bf16"]
    assert all(not leaf.requires_grad for leaf in tree.leaves(back) if isinstance(leaf, torch.Tensor))


def test_restored_tensors_are_their_own_memory(seed):
    value = {str(i): torch.randn(5) for i in range(7)}
    back = round_trip(value)
    for name, tensor in back.items():
        assert tensor.untyped_storage().nbytes() == tensor.nbytes, name
        tensor.zero_()
        assert all(torch.equal(back[other], value[other]) for other in value if other > name)


def test_parameters_are_stored_as_tensors(seed):
    weight = torch.nn.Parameter(torch.randn(3))
    back = round_trip({"w": weight}, {"w": weight})["w"]
    assert type(back) is torch.Tensor
    assert torch.equal(back, weight.detach())
    assert not back.requires_grad


def test_nodes_of_classes(seed):
    value = Outer(Inner({"w": torch.randn(2)}, "n", (3, "x")), Pair(1, defaultdict(list, {"a": torch.ones(2)})), print)
    back = round_trip(value, value)
    assert tree.diff(value, back) == ()
    assert (type(back), type(back.extra), back.inner.shape, back.function) == (Outer, Pair, (3, "x"), print)
    assert back.extra.right["new"] == []  # the factory comes from the template


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (object, r"a leaf of type builtins\.type cannot be stored\n  where:   params\['x'\] = <class 'object'>"),
        (torch.float32, r"a leaf of type torch\.dtype cannot be stored"),
        (torch.device("cpu"), r"a leaf of type torch\.device cannot be stored"),
        (torch.ones(2, 2).to_sparse(), r"layout torch\.sparse_coo cannot be stored\n(.|\n)*x\.to_dense\(\)"),
        (torch.empty(2, device="meta"), r"meta device has no bytes to store\n  where:   params\['x'\]: float32\[2\]"),
        (np.array(["a"]), r"numpy array of dtype <U1 cannot be stored\n  where:   params\['x'\]"),
        (np.array([None]), r"numpy array of dtype object cannot be stored"),
        (np.datetime64("2020-01-01"), r"numpy scalar of dtype datetime64\[D\] cannot be stored"),
        ({1.5: 0}, r"a key of type float, which a snapshot cannot store\n  where:   params\['x'\]\[1.5\]"),
        ({True: 0}, r"a key of type bool"),
        (torch.Size([1]), r"a leaf of type torch\.Size cannot be stored"),
    ],
)
def test_what_cannot_be_stored_is_named(value, text):
    with pytest.raises(TreeError, match=text):
        encode(Inner({"x": value}))


@given(python_leaves.filter(lambda leaf: leaf is not None))
def test_text_of_python_leaves_is_exact(leaf):
    row = encode(leaf).leaves[0]
    back = from_text(row.kind, row.text)
    assert type(back) is type(leaf)
    assert tree.digest(back) == tree.digest(leaf)


def test_integers_of_any_size_are_leaves_and_static_fields_but_not_keys():
    large = -(10**5000) - 7
    value = Outer(Inner({"n": large}, "n", (1, large)), [large])
    for like in (..., value):
        back = round_trip(value, like)
        assert (back.inner.params["n"], back.inner.shape, back.extra) == (large, (1, large), [large])
        assert tree.digest(back) == tree.digest(value)
    with pytest.raises(TreeError, match="an integer of 16610 bits as a key, which JSON cannot hold"):
        encode({10**5000: 1})
