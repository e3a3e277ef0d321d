"""Specs: parts tile the tensor, cuts are torch's, placements are torch's, and what is refused."""

from __future__ import annotations

import itertools
import math
import pickle

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.distributed.tensor._utils import _compute_local_shape_and_global_offset

from purestep.errors import ConfigError
from purestep.sharding.spec import Spec, box, placements, resolve, spec_of

SIZES = {"a": 2, "b": 3, "c": 2}


@st.composite
def wishes(draw):
    """A spec over some axes of SIZES, in any order, and a shape it may or may not divide."""
    axes = draw(st.permutations(list(SIZES)))[: draw(st.integers(0, 3))]
    shape = tuple(draw(st.lists(st.integers(0, 13), min_size=1, max_size=3)))
    dims: list[list[str]] = [[] for _ in shape]
    auto: list[str] = []
    for axis in axes:
        target = draw(st.integers(-1, len(shape) - 1))
        (auto if target < 0 else dims[target]).append(axis)
    return Spec(*dims, auto=auto), shape


def coordinates():
    return [dict(zip(SIZES, c, strict=True)) for c in itertools.product(*(range(n) for n in SIZES.values()))]


@settings(max_examples=60)
@given(wishes(), st.sampled_from(["replicate", "pad"]))
def test_parts_tile_the_tensor(wish, fallback):
    spec, shape = wish
    found = resolve(spec, SIZES, shape, fallback=fallback)
    assert not found.auto
    assert set(found.axes) <= set(spec.axes)
    count = torch.zeros(shape, dtype=torch.int64)
    for coordinate in coordinates():
        offset, extent = box(found, SIZES, shape, coordinate)
        window = count
        for dim, (start, length) in enumerate(zip(offset, extent, strict=True)):
            window = window.narrow(dim, start, length)
        window += 1
        if fallback == "replicate":
            # Even parts: what is split is split by all its axes.
            assert math.prod(extent) * math.prod(SIZES[a] for a in found.axes) == math.prod(shape)
    whole = math.prod(SIZES[a] for a in SIZES if a not in found.axes)
    assert bool((count == whole).all())


@settings(max_examples=60)
@given(wishes(), st.sampled_from(["replicate", "pad"]))
def test_torch_means_the_same_by_our_placements(wish, fallback):
    spec, shape = wish
    found = resolve(spec, SIZES, shape, fallback=fallback)
    torchs = placements(found, SIZES)
    assert spec_of(torchs, SIZES) == found
    for coordinate in coordinates():
        extent, offset = _compute_local_shape_and_global_offset(
            shape, tuple(SIZES.values()), list(coordinate.values()), torchs
        )
        ours = box(found, SIZES, shape, coordinate)
        assert tuple(extent) == ours[1]
        if math.prod(extent):
            assert tuple(offset) == ours[0]


@settings(max_examples=60)
@given(st.integers(1, 17), st.integers(2, 6))
def test_uneven_parts_are_those_of_torch_chunk(n, ranks):
    spec = resolve(Spec("a"), {"a": ranks}, (n,), fallback="pad")
    chunks = [c.tolist() for c in torch.arange(n).chunk(ranks)]
    chunks += [[]] * (ranks - len(chunks))
    for rank, chunk in enumerate(chunks):
        (start,), (length,) = box(spec, {"a": ranks}, (n,), {"a": rank})
        assert list(range(start, start + length)) == chunk


@pytest.mark.parametrize(
    ("spec", "shape", "fallback", "expected"),
    [
        (Spec(auto="a"), (5, 4), "replicate", Spec(None, "a")),
        (Spec(auto="a"), (5, 3), "replicate", Spec()),
        (Spec(auto="a"), (3, 5), "pad", Spec(None, "a")),
        (Spec(auto="a"), (), "pad", Spec()),
        (Spec(auto="a"), (0, 4), "pad", Spec()),
        (Spec("b", auto="a"), (6, 4), "replicate", Spec(("b", "a"))),
        (Spec("b", auto="a"), (3, 4), "replicate", Spec("b", "a")),
        (Spec("b", auto="a"), (3, 5), "replicate", Spec("b")),
        (Spec(auto=("a", "b")), (4, 12), "replicate", Spec(None, ("a", "b"))),
        (Spec("gone"), (4,), "replicate", Spec()),
        (Spec(("a", "gone")), (4,), "pad", Spec("a")),
        (Spec("one"), (4,), "error", Spec()),
        # An uneven split is the finest: another axis cannot split parts of different sizes alike.
        (Spec(("b", "a")), (7,), "pad", Spec("b")),
        (Spec(("a", "b")), (8,), "pad", Spec(("a", "b"))),
        (Spec(("a", "b")), (8,), "replicate", Spec("a")),
    ],
)
def test_what_a_wish_becomes(spec, shape, fallback, expected):
    assert resolve(spec, {"a": 2, "b": 3, "one": 1}, shape, fallback=fallback) == expected


def test_small_tensors_stay_whole_under_automatic_axes_only():
    assert resolve(Spec(auto="a"), SIZES, (8,), fallback="replicate", min_size=9) == Spec()
    assert resolve(Spec(auto="a"), SIZES, (8,), fallback="replicate", min_size=8) == Spec("a")
    assert resolve(Spec("a"), SIZES, (8,), fallback="replicate", min_size=9) == Spec("a")


@pytest.mark.parametrize(
    ("make", "parts"),
    [
        (lambda: Spec("a", "a"), ["the mesh axis 'a' is used twice", "Spec('a', 'a')", "an axis splits a tensor once"]),
        (lambda: Spec(("a", "b"), auto="b"), ["'b' is used twice"]),
        (lambda: Spec(1), ["an entry of a spec is a mesh axis, a tuple of axes, or None", "Spec(..., 1, ...)"]),
        (
            lambda: resolve(Spec(None, "a"), SIZES, (4,), fallback="replicate", where="0.bias"),
            ["a spec names 2 dims of a tensor that has 1", "0.bias: [4] under Spec(None, 'a')"],
        ),
        (
            lambda: resolve(Spec("tensr"), SIZES, (4,), fallback="error", where="w"),
            ["the mesh has no axis 'tensr'", "w: [4] under Spec('tensr')", "its axes are a, b, c", "fallback='repl"],
        ),
        (
            lambda: resolve(Spec("b"), SIZES, (4,), fallback="error", where="w"),
            ["4 elements along a dim are not divisible by b (3)", "w: [4]", "fallback='pad' splits them unevenly"],
        ),
        (
            lambda: resolve(Spec(auto=("a", "b")), SIZES, (4, 9), fallback="error", where="w"),
            ["no dim is divisible by a (2) x b (3)", "w: [4, 9]"],
        ),
    ],
)
def test_errors_say_where_and_what_instead(make, parts):
    with pytest.raises(ConfigError) as caught:
        make()
    for part in parts:
        assert part in str(caught.value)


def test_partial_tensors_are_no_state():
    from torch.distributed.tensor import Partial

    with pytest.raises(ConfigError, match="whole or split, not"):
        spec_of((Partial(), Partial(), Partial()), SIZES)


def test_a_spec_is_a_value():
    spec = Spec(None, ("a", "b"), auto="c")
    assert spec == Spec(None, ["a", "b"], None, auto=("c",)) != Spec(None, ("b", "a"), auto="c")
    assert hash(spec) == hash(Spec(None, ("a", "b"), auto="c"))
    assert pickle.loads(pickle.dumps(spec)) == spec
    assert eval(repr(spec)) == spec
