"""Any pytree as a tree that folds, for notebooks, and as a line for each leaf elsewhere.

Owns what is said of a leaf. It reads the values of small tensors only, and changes none. `TrainState` and users in
notebooks call it.
"""

from __future__ import annotations

import dataclasses
import math
from collections import deque
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import numpy as np
import torch
from torch import Tensor

from purestep import tree
from purestep.errors import MetricError
from purestep.metrics import Metric
from purestep.views import Block, Printed, leaf_line, shortened, unfolding

STATS_ELEMENTS = 100_000  # statistics are computed of tensors with at most so many elements
MAX_LEAVES = 2_000  # leaves in one output; a notebook with more becomes slow
OPEN_LEVELS = 2  # levels of nodes that start open, if they have few children
FEW = 24  # children


@dataclasses.dataclass(frozen=True, repr=False)
class Shown(Printed):
    """The result of `show`: HTML in a notebook, one line a leaf elsewhere."""

    value: Any
    root: str = "tree"
    max_leaves: int = MAX_LEAVES

    def view(self) -> Iterable[Block]:
        if isinstance(self.value, tree.Differences):
            return self.value.view()
        return (Leaves(self.value, self.root, self.max_leaves),)


@dataclasses.dataclass(frozen=True)
class Leaves:
    """A block: the leaves of a pytree, each with its path."""

    value: Any
    root: str
    most: int = MAX_LEAVES

    def html(self) -> str:
        return "".join(_node(self.root, self.root, self.value, 0, _Budget(self.most)))

    def text(self) -> str:
        lines = [f"{path}: {text}" for path, text in _lines(self.root, self.value)]
        hidden = len(lines) - self.most
        return "\n".join(lines[: self.most] + ([f"... and {hidden} more"] if hidden > 0 else []))


def show(value: object, *, root: str = "tree", max_leaves: int = MAX_LEAVES) -> Shown:
    """Show a state, or the result of `tree.diff`, as a collapsible tree in a notebook.

    A leaf shows path, dtype, shape and bytes; a tensor of up to 100,000 elements also mean, standard deviation,
    smallest and largest value, and the number of elements that are not finite.

    Args:
        value: any pytree, or `tree.Differences`.
        root: the first part of each path.
        max_leaves: the most leaves that are shown.

    Returns:
        A value that a notebook displays as HTML and a terminal prints as text.

    Examples:
        >>> show({"w": torch.ones(2, 3), "step": 7}, root="state")
        state['step']: int 7
        state['w']: float32[2, 3]
    """
    return Shown(value, root, max_leaves)


# --- walking ----------------------------------------------------------------------------------------------------------


def _children(value: Any) -> Iterable[tuple[str, Any]] | None:
    """The children of a node, each with the suffix of its path; None for a leaf."""
    if tree.node_name(type(value)) is not None:
        return [(f".{f.name}", getattr(value, f.name)) for f in dataclasses.fields(value) if _is_data(f)]
    if isinstance(value, Mapping):
        return [(f"[{key!r}]", child) for key, child in _sorted_items(value)]
    if isinstance(value, tuple) and hasattr(value, "_fields"):
        return [(f".{name}", child) for name, child in zip(value._fields, value, strict=True)]
    if isinstance(value, (list, tuple, deque)):
        return [(f"[{i}]", child) for i, child in enumerate(value)]
    return None


def _is_data(field: dataclasses.Field[Any]) -> bool:
    return not field.metadata.get("static")


def _sorted_items(value: Mapping[Any, Any]) -> Sequence[tuple[Any, Any]]:
    try:
        return sorted(value.items(), key=lambda item: item[0])
    except TypeError:  # keys of several types: in the order of the mapping
        return list(value.items())


def _static(value: Any) -> str:
    """The static fields of a node, abbreviated: they are no leaves, so no other line shows them."""
    if tree.node_name(type(value)) is None:
        return ""
    fields = [f for f in dataclasses.fields(value) if not _is_data(f)]
    return ", ".join(f"{f.name}={_short(getattr(value, f.name))}" for f in fields)


def _short(value: object) -> str:
    return shortened(repr(value), 60)


def _lines(path: str, value: object) -> Iterator[tuple[str, str]]:
    children = _children(value)
    if children is None:
        if value is not None:
            yield path, tree.describe(value) if not isinstance(value, str) else f"str {_short(value)}"
        return
    for suffix, child in children:
        yield from _lines(path + suffix, child)


# --- markup -----------------------------------------------------------------------------------------------------------


class _Budget:
    """The number of leaves that may still be shown, and whether the output says that some are not."""

    def __init__(self, leaves: int) -> None:
        self.leaves = leaves
        self.reported = False


def _node(label: str, path: str, value: object, level: int, budget: _Budget) -> Iterator[str]:
    children = _children(value)
    if children is None:
        yield _leaf(label, path, value, budget)
        return
    items = list(children)
    inside: list[str] = []
    for suffix, child in items:
        if budget.leaves <= 0:
            if not budget.reported:  # once, and not again for each node around this one
                budget.reported = True
                inside.append(leaf_line("", note="… more leaves than are shown"))
            break
        inside += _node(suffix.removeprefix("."), path + suffix, child, level + 1, budget)
    notes = [type(value).__name__, *_computed(value), _size(value), _static(value)]
    note = " · ".join(item for item in notes if item)
    unfolded = level < OPEN_LEVELS and len(items) <= FEW and not isinstance(value, Metric)
    yield unfolding(label, note, "".join(inside), title=path, unfolded=unfolded)


def _leaf(label: str, path: str, value: object, budget: _Budget) -> str:
    budget.leaves -= 1
    if value is None:
        text = "None"
    else:
        text = tree.describe(value) if _has_shape(value) else f"{type(value).__name__} {_short(value)}"
    notes = " · ".join(item for item in (_placement(value), _statistics(value)) if item)
    return leaf_line(label, text, notes, title=path)


def _computed(value: object) -> list[str]:
    """The value of a metric, which is what one wants to see of it, where it is one number."""
    if not isinstance(value, Metric):
        return []
    try:
        number = value.compute()
        return [] if isinstance(number, Mapping) else [f"= {float(number):.6g}"]
    except (MetricError, RuntimeError, TypeError, ValueError):  # a meta, fake or traced tensor has no value
        return []


def _has_shape(value: object) -> TypeGuard[Tensor | np.ndarray | np.generic]:
    return isinstance(value, (Tensor, np.ndarray, np.generic))


def _size(value: object) -> str:
    leaves = tree.leaves(value)
    nbytes = sum(leaf.nbytes for leaf in leaves if _has_shape(leaf))
    return f"{len(leaves):,} {'leaf' if len(leaves) == 1 else 'leaves'}, {nbytes:,} bytes"


def _placement(value: object) -> str:
    if not _has_shape(value):
        return ""
    device = f", {value.device}" if isinstance(value, Tensor) and value.device.type != "cpu" else ""
    return f"{value.nbytes:,} bytes{device}"


def _statistics(value: object) -> str:
    """Mean, deviation and range of a small tensor; its value if it has one element; "" for one without storage."""
    if isinstance(value, (np.ndarray, np.generic)):
        if value.dtype.kind not in "biufc":
            return ""
        value = torch.as_tensor(np.array(value))
    # A large tensor on a device would be copied to the host, for each display of a state.
    if not isinstance(value, Tensor) or not 0 < value.numel() <= STATS_ELEMENTS:
        return ""
    try:
        return _numbers(value.detach())
    except (RuntimeError, TypeError):  # a meta, fake, traced or sharded tensor has no values in this process
        return ""


def _numbers(value: Tensor) -> str:
    if value.is_complex():
        return f"magnitude {_numbers(value.to(torch.complex128).abs())}"
    if value.numel() == 1:
        return f"= {value.item():.6g}" if value.is_floating_point() else f"= {value.item()}"
    if value.dtype is torch.bool:
        return f"{int(value.sum()):,} true"
    wide = value.cpu().to(torch.float64)
    finite = wide[wide.isfinite()]
    texts = [f"{len(wide.flatten()) - len(finite):,} not finite"] if len(finite) < wide.numel() else []
    if len(finite):
        deviation = math.sqrt(float(finite.var(correction=0)))
        texts.append(
            f"{float(finite.mean()):.3g} ± {deviation:.3g}, in [{float(finite.min()):.3g}, {float(finite.max()):.3g}]"
        )
    return ", ".join(texts)
