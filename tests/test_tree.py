"""Pytrees: one registration for optree and torch, paths, names, filters, selection."""

from __future__ import annotations

import collections
import dataclasses
from typing import Any, NamedTuple

import pytest
import torch
import torch.utils._pytree as torch_pytree
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from purestep import optim, state, tree
from purestep.errors import TreeError
from purestep.tree import pytree, static


@pytree
class Point:
    x: Any
    y: Any = None
    label: str = static(default="p")


@pytree
class Line(Point):
    z: Any = None


class Pair(NamedTuple):
    a: Any
    b: Any


LEAVES = st.one_of(st.integers(), st.text(max_size=2), st.booleans())
TREES = st.recursive(
    LEAVES,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.tuples(inner, inner),
        st.dictionaries(st.text(max_size=3), inner, max_size=3),
        st.builds(Point, x=inner, y=st.one_of(st.none(), inner), label=st.text(max_size=2)),
        st.builds(Line, x=inner, y=inner, z=inner),
        st.builds(Pair, inner, inner),
    ),
    max_leaves=12,
)


def same(a, b):
    """Equality that sees into nodes, types and static fields."""
    if type(a) is not type(b):
        return False
    if dataclasses.is_dataclass(a):
        return all(same(getattr(a, f.name), getattr(b, f.name)) for f in dataclasses.fields(a))
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(same(x, y) for x, y in zip(a, b, strict=True))
    return a == b


@given(TREES)
def test_unflatten_undoes_flatten_in_optree_and_in_torch(value):
    leaves, structure = tree.flatten(value)
    assert same(tree.unflatten(structure, leaves), value)
    torch_leaves, spec = torch_pytree.tree_flatten(value)
    assert same(torch_pytree.tree_unflatten(torch_leaves, spec), value)
    assert len(tree.paths(value)) == len(tree.names(value)) == len(leaves)


@given(TREES)
def test_both_registrations_see_the_same_leaves_of_nodes(value):
    node = Point(x=value, y=None)
    ours = tree.leaves(node)
    theirs = torch_pytree.tree_leaves(node)
    assert sorted(map(repr, ours)) == sorted(map(repr, theirs))


@given(TREES)
def test_a_printed_path_is_code_that_reads_the_leaf(value):
    for path, leaf in zip(tree.paths(value, "value"), tree.leaves(value), strict=True):
        assert eval(path, {}, {"value": value}) is leaf or eval(path, {}, {"value": value}) == leaf


def test_static_fields_are_structure():
    a, b = Point(1, 2, label="a"), Point(1, 2, label="b")
    assert tree.leaves(a) == [1, 2]
    assert tree.structure(a) != tree.structure(b)
    assert tree.map(lambda v: v + 1, a).label == "a"
    with pytest.raises(TreeError, match="do not have the same structure"):
        tree.map(lambda u, v: u, a, b)


def test_nodes_are_frozen_compare_by_identity_and_replace():
    p = Point(1)
    with pytest.raises(dataclasses.FrozenInstanceError):
        p.x = 2
    assert p.replace(x=5).x == 5
    assert p.x == 1
    assert p != Point(1)
    assert {p: "hashable"}[p] == "hashable"
    line = Line(1, label="l", z=3).replace(y=2)
    assert (type(line), line.x, line.y, line.z, line.label) == (Line, 1, 2, 3, "l")
    with pytest.raises(TypeError, match=r"Point has no field 'w'; it has x, y, label"):
        p.replace(w=1)

    @pytree
    class Checked:
        x: int

        def __post_init__(self) -> None:
            if self.x < 0:
                raise ValueError("negative")

    with pytest.raises(ValueError, match="negative"):
        Checked(1).replace(x=-1)

    @pytree(eq=True)
    class Own:
        x: int

        def replace(self, **changes: Any) -> str:
            return "mine"

    assert Own(1) == Own(1)
    assert Own(1).replace() == "mine"
    assert tree.leaves(Own(1)) == [1]


def test_a_class_defined_again_is_found_under_its_name():
    def define(n):
        namespace = {
            "__module__": "notebook",
            "__qualname__": "Cell",
            "__annotations__": {f"f{i}": Any for i in range(n)},
        }
        return pytree(type("Cell", (), namespace))

    first, second = define(1), define(2)
    assert tree.node_class("notebook.Cell") is second
    assert tree.node_name(second) == "notebook.Cell"
    assert tree.node_name(first) is None
    assert tree.leaves([first(1), second(2, 3)]) == [1, 2, 3]
    assert torch_pytree.tree_leaves([first(1), second(2, 3)]) == [1, 2, 3]


def test_only_classes_are_registered_and_facts_about_them():
    with pytest.raises(TreeError, match="only a class can be made a pytree node"):
        pytree(Point(1))
    assert tree.node_fields(Line) == (("x", "y", "z"), ("label",))
    assert tree.node_name(int) is None
    assert tree.node_class("no.such.Class") is None
    assert same(tree.node_build(Point, {"x": 1, "y": 2, "label": "l"}), Point(1, 2, "l"))


def make_state(**options):
    return state.init(lambda: nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2)), optim.adam(0.1), **options)


def test_paths_of_a_train_state_read_as_code():
    paths = tree.paths(make_state(), "state")
    assert "state.params['0.weight']" in paths
    assert "state.step" in paths
    assert "state.buffers['1.running_mean']" in paths
    assert any(p.startswith("state.opt_state") and p.endswith("['0.weight']") for p in paths)
    assert not any("loss_scale" in p or "model" in p for p in paths)
    assert "params.0.weight" in tree.names(make_state())


def test_vmap_runs_over_states_with_empty_fields():
    many = [make_state(seed=i) for i in range(3)]
    stacked = tree.map(lambda *xs: torch.stack(xs), *many)
    assert stacked.loss_scale is None
    total = torch.func.vmap(lambda s: s.params["0.weight"].sum() + s.step)(stacked)
    for i, one in enumerate(many):
        torch.testing.assert_close(total[i], one.params["0.weight"].sum())
    out = torch.func.vmap(lambda s: s.replace(step=s.step + 1))(stacked)
    assert isinstance(out, state.TrainState)
    assert out.step.tolist() == [1, 1, 1]
    assert out.model is not None


def test_map_names_the_first_path_that_differs():
    with pytest.raises(TreeError, match=r"tree 1 and tree 2(.|\n)*\['b'\] is only in the first"):
        tree.map(lambda a, b: a, {"a": 1, "b": 2}, {"a": 1})
    with pytest.raises(TreeError, match=r"tree 1 and tree 3(.|\n)*\['c'\] is only in the second"):
        tree.map(lambda a, b, c: a, {"a": 1}, {"a": 1}, {"a": 1, "c": 2})
    with pytest.raises(TreeError, match="same structure"):
        tree.map(lambda a, b: a, [1, 2], (1, 2))
    with pytest.raises(ValueError, match="of mine"):
        tree.map(lambda a: (_ for _ in ()).throw(ValueError("of mine")), [1])


def test_dicts_are_sorted_and_none_is_empty():
    assert tree.leaves({"b": 1, "a": 2}) == [2, 1]
    assert tree.leaves([None, 1, {"x": None}]) == [1]
    assert tree.map(lambda v: v + 1, collections.OrderedDict(b=1, a=2)) == {"b": 2, "a": 3}
    assert list(tree.map(lambda v: v, {"b": 1, "a": 2})) == ["b", "a"]


def test_names_filters_and_sizes():
    value = {"a": {"w": torch.zeros(2, 3), "b": torch.zeros(2, dtype=torch.int64)}, "n": 3}
    assert tree.names(value) == ["a.b", "a.w", "n"]
    assert tree.names(Point(1, [2, 3])) == ["x", "y.0", "y.1"]
    assert tree.map_with_name(lambda name, v: name, value) == {"a": {"b": "a.b", "w": "a.w"}, "n": "n"}
    assert tree.map_with_name(lambda name, u, v: (name, u + v), [1, 2], [3, 4]) == [("0", 4), ("1", 6)]
    assert tree.count(value) == 8
    assert tree.nbytes(value) == 40
    assert tree.matches(lambda name: name.endswith("w"), "a.w")
    assert tree.matches(["x", "a.?"], "a.w")
    assert not tree.matches((), "a.w")
    assert not tree.matches("A.*", "a.w")


def test_find_returns_the_outermost_nodes_of_a_kind_with_their_paths():
    inner, line = Point(1), Line(Point(2), z=[Point(3)])
    value = {"b": [line, None], "a": (inner, 4), "c": collections.OrderedDict(x="text")}
    found = tree.find(value, Point, "state")
    assert [path for path, _ in found] == ["state['a'][0]", "state['b'][0]"]
    assert [node for _, node in found] == [inner, line]  # a subclass counts; what is inside of a found node does not
    assert found[1][1] is line
    assert tree.find(value, Line) == [("['b'][0]", line)]
    assert tree.find(inner, Point, "state") == [("state", inner)]
    assert tree.find(value, str) == [("['c']['x']", "text")]  # leaves, too
    assert tree.find(value, float) == []
    assert tree.find(None, Point) == []


@given(TREES)
def test_find_of_leaves_agrees_with_paths(value):
    found = tree.find(value, object, "x")
    assert found == [("x", value)] or (value is None and not found)
    ints = [(p, v) for p, v in zip(tree.paths(value, "x"), tree.leaves(value), strict=True) if isinstance(v, int)]
    assert tree.find(value, int, "x") == ints


@pytest.mark.parametrize("flag", [True, False])
def test_select_chooses_bits(flag):
    a = {"x": torch.tensor([float("nan"), -0.0]), "n": torch.tensor(1)}
    b = {"x": torch.tensor([1.0, float("inf")]), "n": a["n"]}
    chosen = tree.select(torch.tensor(flag), a, b)
    assert tree.equal(chosen, a if flag else b)
    assert chosen["n"] is a["n"]
