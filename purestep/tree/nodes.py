"""Classes as nodes: `pytree` and `static`, their one registration in optree and in torch, and their names."""

from __future__ import annotations

import dataclasses
import functools
import itertools
import operator
from collections.abc import Callable, Iterable, Mapping
from typing import Any, TypeVar, dataclass_transform, overload

import optree

from purestep._torch import pytree as torch_pytree
from purestep.errors import TreeError, explain
from purestep.views import Printed

T = TypeVar("T")
NAMESPACE = optree.registry.__GLOBAL_NAMESPACE
_NODES: dict[str, type] = {}
_OWN = __name__.partition(".")[0]


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
        >>> import torch
        >>> from purestep import tree
        >>> @pytree
        ... class Point:
        ...     x: torch.Tensor
        ...     y: torch.Tensor
        >>> p = Point(torch.tensor(1.0), torch.tensor(2.0))
        >>> tree.map(lambda t: t * 2, p).y
        tensor(4.)
        >>> tree.paths(p, "p")
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

    children_of, fixed_of = _getter(data), _getter(fixed)

    def flatten(node: object) -> tuple[tuple[Any, ...], tuple[Any, ...], tuple[str, ...]]:
        values = node.__dict__
        return children_of(values), fixed_of(values), data

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
    optree.register_pytree_node(cls, flatten, unflatten, path_entry_type=optree.GetAttrEntry, namespace=NAMESPACE)
    torch_pytree.register_pytree_node(
        cls,
        torch_flatten,
        torch_unflatten,
        serialized_type_name=name,
        flatten_with_keys_fn=torch_keys,
    )
    _NODES[name] = cls


def _getter(names: tuple[str, ...]) -> Callable[[dict[str, Any]], tuple[Any, ...]]:
    """Return what looks names up in a dict and returns the values as a tuple."""
    if len(names) > 1:
        return operator.itemgetter(*names)
    return lambda values: tuple([values[name] for name in names])


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
        >>> from purestep.tree import Differences
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
    made = object.__new__(type(node))
    values = made.__dict__
    values.update(node.__dict__)
    known = len(values)
    values.update(changes)
    if len(values) != known:
        unknown = ", ".join(repr(name) for name in changes if name not in node.__dict__)
        raise TypeError(f"{type(node).__name__} has no field {unknown}; it has {', '.join(node.__dict__)}")
    return made
