"""Reading and changing an optimizer state by name (`get`, `set`), and measuring updates as they pass (`monitor`)."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch

from purestep import tree
from purestep.arguments import checked
from purestep.errors import OptimError, explain
from purestep.optim.base import GradientTransformation, Scalar, StepNumber, scalar_like, transformation

Path = tuple[str, ...]


def get(opt_state: Any, name: str) -> Any:
    """Return the value with a unique name in an optimizer state: a hyperparameter, a count, a tree of moments.

    Args:
        opt_state: state returned by `tx.init` or `tx.update`.
        name: the end of the path: its last parts, joined by dots: `learning_rate`, `head.adamw.mu`.

    Raises:
        OptimError: no value has that name, or several have; the message lists the names.

    Examples:
        >>> from purestep import optim
        >>> tx = optim.inject_hyperparams(optim.adam)(learning_rate=0.5)
        >>> get(tx.init({"w": torch.zeros(2)}), "learning_rate")
        tensor(0.5000, dtype=torch.float64)

    Reference: `optax.tree_utils.tree_get`.
    """
    return _unique_match(opt_state, name)[1]


def set(opt_state: Any, changes: Mapping[str, Any] | None = None, /, **named: Any) -> Any:
    """Return the optimizer state with some values changed by name; shapes and dtypes do not change.

    Args:
        opt_state: state returned by `tx.init` or `tx.update`.
        changes: `{name: value}`, for names with dots; see `get`.
        **named: the same for plain names. A number becomes a tensor of the old value's dtype, shape and device; a
            tensor or a tree must fit the old one.

    Raises:
        OptimError: a name is unknown or ambiguous, or a value does not fit.

    Examples:
        >>> from purestep import optim
        >>> tx = optim.inject_hyperparams(optim.adam)(learning_rate=0.5)
        >>> state = set(tx.init({"w": torch.zeros(2)}), learning_rate=0.25)
        >>> get(state, "learning_rate")
        tensor(0.2500, dtype=torch.float64)

    Reference: `optax.tree_utils.tree_set`.
    """
    for name, value in {**(changes or {}), **named}.items():
        path, old = _unique_match(opt_state, name)
        opt_state = replaced(opt_state, path, _fitted(name, old, value))
    return opt_state


def nodes(state: Any, path: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Yield each node and leaf of a state with the names that lead to it."""
    yield path, state
    for name, child in _children(state):
        yield from nodes(child, (*path, name))


def _children(node: Any) -> list[tuple[str, Any]]:
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return [(f.name, getattr(node, f.name)) for f in dataclasses.fields(node) if not f.metadata.get("static")]
    if isinstance(node, Mapping):
        return [(str(key), value) for key, value in node.items()]
    if isinstance(node, (list, tuple)):
        return [(str(i), value) for i, value in enumerate(node)]
    return []


def _unique_match(opt_state: Any, name: str) -> tuple[Path, Any]:
    found = [(path, value) for path, value in nodes(opt_state) if path and ("." + ".".join(path)).endswith("." + name)]
    if len(found) == 1:
        return found[0]
    if not found:
        there = sorted({path[-1] for path, value in nodes(opt_state) if path})
        raise OptimError(
            explain(
                f"the optimizer state has nothing named {name!r}",
                where=f"names: {', '.join(there[:30])}",
                why="a plain number given to an optimizer is part of the transformation, not of its state"
                if name in ("learning_rate", "weight_decay", "b1", "b2", "eps")
                else None,
                instead=f"tx = optim.inject_hyperparams(optim.adamw)({name}=...)   # keeps it in the state",
            )
        )
    listed = ", ".join(".".join(path) for path, _ in found[:8])
    raise OptimError(
        explain(
            f"{name!r} names {len(found)} things", where=listed, instead=f"get(opt_state, {'.'.join(found[0][0])!r})"
        )
    )


def _fitted(name: str, old: Any, new: Any) -> Any:
    if isinstance(old, torch.Tensor) and isinstance(new, (bool, int, float, torch.Tensor)):
        value = scalar_like(new, old)
        if value.dim() and value.shape != old.shape:
            _refuse(name, old, new)
        return value.expand(old.shape).clone()
    if tree.structure(old) != tree.structure(new):
        _refuse(name, old, new)
    for a, b in zip(tree.leaves(old), tree.leaves(new), strict=True):
        if tree.describe(a) != tree.describe(b):
            _refuse(name, a, b)
    return new


def _refuse(name: str, old: Any, new: Any) -> None:
    left, right = (tree.describe(x) if isinstance(x, torch.Tensor) else str(tree.structure(x)) for x in (old, new))
    raise OptimError(explain(f"the new {name!r} does not fit the old", where=f"{left} != {right}"))


def replaced(node: Any, path: Path, value: Any) -> Any:
    if not path:
        return value
    head, rest = path[0], path[1:]
    if dataclasses.is_dataclass(node) and not isinstance(node, type):
        return dataclasses.replace(node, **{head: replaced(getattr(node, head), rest, value)})
    if isinstance(node, Mapping):
        return {key: replaced(child, rest, value) if str(key) == head else child for key, child in node.items()}
    items = [replaced(child, rest, value) if str(i) == head else child for i, child in enumerate(node)]
    return type(node)(*items) if hasattr(node, "_fields") else type(node)(items)


@tree.pytree
class MonitorState:
    """`measurements`: the latest values, by name."""

    measurements: dict[str, Any]


@transformation
class Monitor(GradientTransformation):
    measures: tuple[tuple[str, Callable[[Any], Any]], ...]

    def init(self, params: Any) -> MonitorState:
        nothing = tree.map(torch.zeros_like, params)
        return MonitorState({name: tree.map(torch.zeros_like, measure(nothing)) for name, measure in self.measures})

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return updates, MonitorState({name: measure(updates) for name, measure in self.measures})

    def hyperparams(self, state: Any, step: StepNumber | None = None) -> dict[str, Scalar]:
        return {name: value for name, value in state.measurements.items() if isinstance(value, torch.Tensor)}


@checked(OptimError)
def monitor(measures: Mapping[str, Callable[[Any], Any]]) -> GradientTransformation:
    """Measure updates without changing them.

    At the beginning of a chain it measures gradients, at the end the updates of the parameters. `get(opt_state, name)`
    reads the latest values, and `tx.hyperparams` lists them next to the learning rate.

    Args:
        measures: `{name: function of the updates}`; a function returns a tensor, or a tree of them, always of the same
            shapes.

    Examples:
        >>> from purestep import optim
        >>> tx = optim.chain(monitor({"grad_norm": optim.global_norm}), optim.sgd(0.1))
        >>> grads = {"w": torch.tensor([3.0, 4.0])}
        >>> updates, state = tx.update(grads, tx.init(grads))
        >>> get(state, "grad_norm")
        tensor(5.)

    Reference: `optax.monitor`.
    """
    return Monitor(tuple(measures.items()))
