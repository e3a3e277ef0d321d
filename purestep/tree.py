"""Pytrees: what a state is made of.

Owns the one registration of our nodes (in optree and in `torch.utils._pytree`), mapping, paths, and `digest` and
`diff` of whole trees (`bits` does those of a leaf). It is the only module that imports optree. Nothing here knows
about training.
"""

from __future__ import annotations

import dataclasses
import fnmatch
import functools
import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, TypeVar, cast, dataclass_transform, overload

import numpy as np
import optree
import torch

from purestep import _cells
from purestep._torch import pytree as torch_pytree
from purestep.arguments import checked
from purestep.bits import Difference as Difference
from purestep.bits import Differences as Differences
from purestep.bits import describe as describe
from purestep.bits import diff_leaves
from purestep.bits import digest_leaves as digest_leaves
from purestep.bits import tensor_bytes as tensor_bytes
from purestep.errors import DonatedStateError, TreeError, explain
from purestep.views import Printed

T = TypeVar("T")
Structure = optree.PyTreeSpec
Filter = str | Sequence[str] | Callable[[str], bool]
_NAMESPACE = optree.registry.__GLOBAL_NAMESPACE
_NODES: dict[str, type] = {}
_OWN = __name__.partition(".")[0]


# --- registration -----------------------------------------------------------------------------------------------------


def static(**kwargs: Any) -> Any:
    """Declare a field of a `pytree` class as static: part of the structure, not a leaf.

    Static values are compared with `==`; keep them small and hashable. Keyword arguments are those of
    `dataclasses.field`.
    """
    return dataclasses.field(metadata={"static": True}, **kwargs)


@overload
def pytree(cls: type[T]) -> type[T]: ...
@overload
def pytree(cls: None = None, *, eq: bool = ...) -> Callable[[type[T]], type[T]]: ...
@dataclass_transform(frozen_default=True, field_specifiers=(dataclasses.field, static))
def pytree(cls: type | None = None, *, eq: bool = False) -> Any:
    """Make a class a frozen dataclass and a pytree node, in optree and in torch.

    Args:
        cls: the class; its annotated fields become children, in order. Fields made with `static()` belong to the
            structure.
        eq: whether to generate `__eq__` and `__hash__`. Off by default, because comparing tensors gives tensors.

    Returns:
        The class. Instances gain `replace(**changes)`, unless the class defines it. A class that is defined again
        under the same name (a notebook cell that is run twice) is the one that `node_class` finds from then on.

    Raises:
        TreeError: what is decorated is not a class.

    Examples:
        >>> @pytree
        ... class Point:
        ...     x: torch.Tensor
        ...     y: torch.Tensor
        >>> p = Point(torch.tensor(1.0), torch.tensor(2.0))
        >>> map(lambda t: t * 2, p).y
        tensor(4.)
        >>> paths(p, "p")
        ['p.x', 'p.y']
    """
    if cls is None:
        return functools.partial(_pytree, eq=eq)
    return _pytree(cls, eq)


def _pytree(cls: Any, eq: bool) -> Any:
    if not isinstance(cls, type):
        raise TreeError(
            explain(
                "only a class can be made a pytree node",
                where=f"@pytree on {cls!r}",
                instead="@ps.pytree\nclass State: ...",
            )
        )
    made: Any = dataclasses.dataclass(frozen=True, eq=eq, repr=not issubclass(cls, Printed))(cls)
    if not hasattr(made, "replace"):
        made.replace = dataclasses.replace if hasattr(made, "__post_init__") else replaced
    _register(made)
    return made


def _register(cls: Any) -> None:
    fields = dataclasses.fields(cls)
    data = tuple(f.name for f in fields if not f.metadata.get("static"))
    fixed = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten(node: object) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[str, ...]]:
        values = node.__dict__
        return tuple([values[n] for n in data]), tuple([values[n] for n in fixed]), data

    def unflatten(aux: Any, children: Iterable[Any]) -> Any:
        node = object.__new__(cls)
        values = node.__dict__
        values.update(zip(data, children, strict=True))
        values.update(zip(fixed, aux, strict=True))
        return node

    # torch takes None for a leaf, optree for an empty node. So that transforms like vmap see the same leaves as we do,
    # a field that is None belongs to the structure there.
    def torch_keys(node: object) -> tuple[list[Any], tuple[Any, ...]]:
        children, aux, _ = flatten(node)
        present = tuple(n for n, c in zip(data, children, strict=True) if c is not None)
        return [(torch_pytree.GetAttrKey(n), node.__dict__[n]) for n in present], (present, aux)

    def torch_flatten(node: object) -> tuple[list[Any], tuple[Any, ...]]:
        children, aux = torch_keys(node)
        return [c for _, c in children], aux

    def torch_unflatten(children: Iterable[Any], aux: tuple[Any, ...]) -> Any:
        given = dict(zip(aux[0], children, strict=True))
        return unflatten(aux[1], [given.get(n) for n in data])

    name = stable_name(cls)
    optree.register_pytree_node(cls, flatten, unflatten, path_entry_type=optree.GetAttrEntry, namespace=_NAMESPACE)
    torch_pytree.register_pytree_node(
        cls,
        torch_flatten,
        torch_unflatten,
        serialized_type_name=name,
        flatten_with_keys_fn=torch_keys,
    )
    _NODES[name] = cls


def node_name(cls: type) -> str | None:
    """Return the registered name of a `pytree` class (its `stable_name`), or None when it is not one."""
    name = stable_name(cls)
    return name if _NODES.get(name) is cls else None


def node_class(name: str) -> type | None:
    """Return the `pytree` class registered under a name, or None. It never imports anything."""
    return _NODES.get(name) or _NODES.get(_without_module(name))


def stable_name(kind: type | Callable[..., Any]) -> str:
    """Return the name under which snapshots and the identity of a run know a class or a function.

    It is the qualified name. What purestep itself defines goes without its module, so that a file of purestep can be
    moved or renamed and old snapshots still know what they hold.

    Examples:
        >>> import collections
        >>> stable_name(collections.Counter), stable_name(Differences)
        ('collections.Counter', 'purestep.Differences')
    """
    module = getattr(kind, "__module__", None)
    name = getattr(kind, "__qualname__", None) or getattr(kind, "__name__", None) or type(kind).__qualname__
    if not isinstance(module, str):
        return str(name)
    return f"{_OWN if module.startswith(f'{_OWN}.') else module}.{name}"


def _without_module(name: str) -> str:
    """Return the stable name of a class from one that a snapshot of an earlier version has, with its module."""
    own, *parts = name.split(".")
    return ".".join([own, *itertools.dropwhile(str.islower, parts)]) if own == _OWN else name


def node_fields(cls: type) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the names of the child fields and of the static fields of a `pytree` class, each in order."""
    fields = dataclasses.fields(cls)
    fixed = tuple(f.name for f in fields if f.metadata.get("static"))
    return tuple(f.name for f in fields if f.name not in fixed), fixed


def node_build(cls: type[T], values: Mapping[str, Any]) -> T:
    """Build a `pytree` node from the values of all its fields, without running `__init__`: what unflattening does."""
    node = object.__new__(cls)
    node.__dict__.update(values)
    return node


def replaced(node: T, **changes: object) -> T:
    """Return a `pytree` node with some fields changed: `dataclasses.replace` without a call of `__init__`.

    Raises:
        TypeError: the node has no such field.
    """
    values = {**node.__dict__, **changes}
    if len(values) != len(node.__dict__):
        unknown = ", ".join(repr(name) for name in changes if name not in node.__dict__)
        raise TypeError(f"{type(node).__name__} has no field {unknown}; it has {', '.join(node.__dict__)}")
    return node_build(type(node), values)


# --- consumed nodes ---------------------------------------------------------------------------------------------------


class Consumed:
    """What a node becomes when its tensors were donated: it prints; any other use raises DonatedStateError."""

    def __getattribute__(self, name: str) -> Any:
        if name == "__class__":
            return Consumed
        raise DonatedStateError(_consumed_message(self, f".{name}"))

    def __repr__(self) -> str:
        values = object.__getattribute__(self, "__dict__")
        return f"<{values['was']}, consumed by {_consumer(values)}>"


def _consumed_message(node: object, use: str) -> str:
    values = object.__getattribute__(node, "__dict__")
    return explain(
        f"this {values['was']} was consumed by {_consumer(values)}",
        where=f"{values['was']}{use}" + ("" if values["place"] is None else f"; donated {values['place'].told()}"),
        why="a donating step writes the new state over the memory of the one it was given",
        instead="state, metrics = step(state, batch)   # go on with the state that was returned\n"
        "or the same step without donation, which keeps the old state and needs its memory",
    )


def _consumer(values: Mapping[str, Any]) -> str:
    """Name the step, and the cell: a notebook has its cells in view."""
    place: _cells.Place | None = values["place"]
    return f"{values['by']}{'' if place is None or not place.cell else f' in cell {place.cell}'}"


def consume(node: object, by: str, place: _cells.Place | None = None) -> None:
    """Make a `pytree` node unusable, because its tensors now belong to another; `by` names who took them, and where."""
    values = node.__dict__
    was = type(node).__name__
    values.clear()
    values.update(was=was, by=by, place=place)
    object.__setattr__(node, "__class__", Consumed)


def _flatten_consumed(node: Any, *rest: Any) -> Any:
    raise DonatedStateError(_consumed_message(node, ""))


optree.register_pytree_node(Consumed, _flatten_consumed, _flatten_consumed, namespace=_NAMESPACE)
torch_pytree.register_pytree_node(
    Consumed, _flatten_consumed, _flatten_consumed, serialized_type_name="purestep.tree.Consumed"
)


# --- flattening and mapping -------------------------------------------------------------------------------------------


# optree types a tree by its leaves; ours are any, so its functions are declared once more.
_flatten = cast(Callable[[object], tuple[list[Any], optree.PyTreeSpec]], optree.tree_flatten)
_leaves = cast(Callable[[object], list[Any]], optree.tree_leaves)
_structure = cast(Callable[[object], optree.PyTreeSpec], optree.tree_structure)
_map = cast(Callable[..., Any], optree.tree_map)
_paths = cast(Callable[[object], list[tuple[Any, ...]]], optree.tree_paths)
_accessors = cast(Callable[[object], list[optree.PyTreeAccessor]], optree.tree_accessors)
_flatten_with_accessors = cast(
    Callable[..., tuple[list[optree.PyTreeAccessor], list[Any], optree.PyTreeSpec]], optree.tree_flatten_with_accessor
)


def flatten(tree: object) -> tuple[list[Any], optree.PyTreeSpec]:
    """Return the leaves in order and the structure. `None` is an empty node, dict keys are sorted."""
    return _flatten(tree)


@checked(TreeError, failed=True)
def unflatten(structure: optree.PyTreeSpec, leaves: Iterable[Any]) -> Any:
    """Rebuild a tree from its structure and leaves: `unflatten(*reversed(flatten(x)))` equals `x`."""
    return optree.tree_unflatten(structure, leaves)


def leaves(tree: object) -> list[Any]:
    """Return the leaves of a tree, in order."""
    return _leaves(tree)


def structure(tree: object) -> optree.PyTreeSpec:
    """Return the structure of a tree: comparable, hashable, printable."""
    return _structure(tree)


@checked(TreeError, failed=True)
def map(function: Callable[..., Any], tree: object, *rest: object) -> Any:
    """Apply a function to each leaf of one or several trees of the same structure.

    Raises:
        TreeError: the trees differ in structure; the message names the first path that does.

    Examples:
        >>> map(lambda a, b: a + b, {"x": 1, "y": (2, 3)}, {"x": 10, "y": (20, 30)})
        {'x': 11, 'y': (22, 33)}
    """
    try:
        return _map(function, tree, *rest)
    except ValueError as error:
        expected = structure(tree)
        for position, other in enumerate(rest, start=2):
            if structure(other) != expected:
                raise TreeError(
                    explain(
                        f"tree 1 and tree {position} do not have the same structure",
                        where=_first_difference(tree, other),
                        why="a function is mapped over leaves that sit at the same path",
                    )
                ) from error
        raise


def _first_difference(a: object, b: object) -> str:
    left, right = paths(a), paths(b)
    only_left, only_right = set(left) - set(right), set(right) - set(left)
    for path in left + right:
        if path in only_left:
            return f"{path or 'the root'} is only in the first"
        if path in only_right:
            return f"{path or 'the root'} is only in the second"
    return f"{structure(a)} and {structure(b)}"


def paths(tree: object, root: str = "") -> list[str]:
    """Return the printed path of each leaf, in order, as code that reads the leaf.

    Examples:
        >>> paths({"0.weight": 1, "layers": [2, 3]}, "params")
        ["params['0.weight']", "params['layers'][0]", "params['layers'][1]"]
    """
    return [accessor.codify(root) for accessor in _accessors(tree)]


def names(tree: object) -> list[str]:
    """Return the dotted name of each leaf, in order: what path filters and rules match against.

    Examples:
        >>> names({"0.weight": 1, "layers": [2, 3]})
        ['0.weight', 'layers.0', 'layers.1']
    """
    return [".".join(str(part) for part in path) for path in _paths(tree)]


def parts(tree: object) -> list[tuple[Any, ...]]:
    """Return the path of each leaf, in order, as the tuple of its keys, indices and field names.

    Examples:
        >>> parts({"0.weight": 1, "layers": [2, 3]})
        [('0.weight',), ('layers', 0), ('layers', 1)]
    """
    return [tuple(path) for path in _paths(tree)]


@checked(TreeError, failed=True)
def find(tree: object, kind: type[T], root: str = "") -> list[tuple[str, T]]:
    """Return the nodes and leaves of one kind with their printed paths, in order; none inside of another.

    Args:
        tree: any pytree; one that is itself of the kind is found at `root`.
        kind: a class; instances of its subclasses are found, too.
        root: what the paths begin with, as in `paths`.

    Examples:
        >>> find({"b": [torch.Size([3])], "a": 1}, torch.Size, "shapes")
        [("shapes['b'][0]", torch.Size([3]))]
    """

    def is_kind(node: object) -> bool:
        return isinstance(node, kind)

    accessors, nodes, _ = _flatten_with_accessors(tree, is_leaf=is_kind)
    return [(at.codify(root), node) for at, node in zip(accessors, nodes, strict=True) if is_kind(node)]


@checked(TreeError, failed=True)
def map_with_name(function: Callable[..., Any], tree: object, *rest: object) -> Any:
    """Like `map`, but the function gets the dotted name of the leaf (see `names`) as its first argument."""
    values, treedef = flatten(tree)
    others: list[list[Any]] = [treedef.flatten_up_to(cast(Any, other)) for other in rest]
    return unflatten(treedef, [function(*args) for args in zip(names(tree), values, *others, strict=True)])


@checked(TreeError, failed=True)
def matches(filter: Filter, name: str) -> bool:
    """Tell whether a dotted name matches a filter: a glob, a sequence of globs, or a function of the name.

    Examples:
        >>> matches("backbone.*", "backbone.0.weight"), matches(["*.bias", "*norm*"], "head.weight")
        (True, False)
    """
    if callable(filter):
        return bool(filter(name))
    globs = (filter,) if isinstance(filter, str) else filter
    return any(fnmatch.fnmatchcase(name, glob) for glob in globs)


@checked(TreeError, failed=True)
def select(condition: torch.Tensor, on_true: T, on_false: T) -> T:
    """Choose between two trees by a 0-d bool tensor, leaf by leaf, without reading it on the host."""
    return map(lambda a, b: a if a is b else torch.where(condition, a, b), on_true, on_false)


def count(tree: object) -> int:
    """Return the number of elements in all tensors and arrays of a tree."""
    return sum(int(np.prod(x.shape)) for x in leaves(tree) if hasattr(x, "shape"))


def nbytes(tree: object) -> int:
    """Return the bytes of all tensors and arrays of a tree."""
    return sum(x.nbytes for x in leaves(tree) if hasattr(x, "nbytes"))


# --- digest and diff --------------------------------------------------------------------------------------------------


def digest(tree: object) -> str:
    """Return the sha256, in hex, over (path, dtype, shape, bytes) of every leaf, in order of path.

    It does not depend on strides, storage sharing, device or the order of dict keys; it does depend on every bit of
    every leaf, -0.0 and NaN payloads included. Nor does it depend on how leaves are split over processes: those are
    gathered one at a time, and every process calls it.

    Raises:
        TreeError: a leaf is not a tensor, numpy array, number, string or bytes.

    Examples:
        >>> digest({"a": torch.ones(2), "b": 1}) == digest({"b": 1, "a": torch.ones(4)[::2]})
        True
        >>> digest(torch.tensor(0.0)) == digest(torch.tensor(-0.0))
        False
    """
    return digest_leaves(zip(paths(tree), leaves(tree), strict=True))


def diff(a: object, b: object, root: str = "") -> Differences:
    """List each path at which two trees differ, with shape, dtype, largest absolute, relative and ulp difference.

    Equality is of bits: NaNs of the same payload are equal, 0.0 and -0.0 are not. Leaves that are split over processes
    are gathered, so every process calls it.

    Examples:
        >>> diff({"w": torch.tensor([1.0, 2.0])}, {"w": torch.tensor([1.0, 2.0000002])}, root="params")
        path         leaf        differ    max abs    max rel  max ulp
        params['w']  float32[2]       1  2.384e-07  1.192e-07        1
        >>> bool(diff([1, 2], [1, 2]))
        False
    """
    left = dict(zip(paths(a, root), leaves(a), strict=True))
    right = dict(zip(paths(b, root), leaves(b), strict=True))
    return diff_leaves(left, right)


def equal(a: object, b: object) -> bool:
    """Tell whether two trees have the same paths and the same bits."""
    return not diff(a, b)
