"""Flattening, mapping, and the paths of leaves.

A flat dict of tensors, as parameters, gradients and moments are, is flattened by what is remembered of its keys: a step
does that a dozen times.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Iterable, Sequence
from typing import Any, TypeVar, cast

import numpy as np
import optree
import torch

from purestep.arguments import checked
from purestep.errors import TreeError, explain
from purestep.tree.flat import flat_of, flat_with

T = TypeVar("T")
Structure = optree.PyTreeSpec
Filter = str | Sequence[str] | Callable[[str], bool]


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
    if type(tree) is dict and (flat := flat_of(tree)) is not None:
        return list(flat.leaves(tree)), flat.structure
    return _flatten(tree)


@checked(TreeError, failed=True)
def unflatten(structure: optree.PyTreeSpec, leaves: Iterable[Any]) -> Any:
    """Rebuild a tree from its structure and leaves: `unflatten(*reversed(flatten(x)))` equals `x`."""
    if (flat := flat_with(structure)) is not None:
        return flat.tree(leaves)
    return optree.tree_unflatten(structure, leaves)


def rebuild(structure: Any, lists: Any) -> list[Any]:
    """Return the tree of each of several lists of leaves; `unflatten` for all of them at once."""
    if (flat := flat_with(structure)) is not None:
        return [flat.tree(leaves) for leaves in lists]
    return [unflatten(structure, leaves) for leaves in lists]


def leaves(tree: object) -> list[Any]:
    """Return the leaves of a tree, in order."""
    if type(tree) is dict and (flat := flat_of(tree)) is not None:
        return list(flat.leaves(tree))
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
