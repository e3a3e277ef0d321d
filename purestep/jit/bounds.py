"""Comparisons whose result is the same for every draw: `torch.rand(()) < 0.0`, as of a model with LayerDrop at rate 0.

The bounds of a node follow from the bits that Philox returns and the few operators that make a uniform number of them.
`reads` asks before it makes a guard, which every later call would have to compute.
"""

from __future__ import annotations

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from purestep import _torch
from purestep.jit._torch import TO_COPY
from purestep.random.philox import philox

aten = torch.ops.aten
Bounds = tuple[Tensor, Tensor]  # the least and the largest value, both possible or further out

_WORD = (1 << 32) - 1
# These return elements of their inputs.
_PLACED = {aten.select.int, aten.slice.Tensor, aten.view.default, aten.reshape.default, aten.stack.default,
           aten.unsqueeze.default, aten.squeeze.default, aten.expand.default, aten.clone.default,
           aten.alias.default, aten.detach.default}  # fmt: skip
# With a second argument that is a number, which for products is not negative, these never decrease.
_GROWING = {TO_COPY, aten.__rshift__.Scalar, aten.add.Tensor, aten.sub.Tensor}
_PRODUCTS = {aten.mul.Tensor, aten.mul.Scalar, aten.div.Tensor}
# Comparisons of a tensor with a number.
COMPARED: dict[Any, Callable[[Any, Any], Any]] = {
    aten.lt.Scalar: operator.lt,
    aten.le.Scalar: operator.le,
    aten.gt.Scalar: operator.gt,
    aten.ge.Scalar: operator.ge,
}


def known(node: fx.Node) -> bool | None:
    """Return the truth value of a comparison with a number if it is the same whatever is drawn; else None."""
    compare = COMPARED.get(node.target)
    if compare is None:
        return None
    drawn, number = node.args
    if not isinstance(drawn, fx.Node) or not isinstance(number, (int, float)):
        return None
    with _torch.disable_current_modes(), _torch.no_torch_function(), torch.no_grad():
        found = bounds(drawn)
        if found is None:
            return None
        low, high = (bool(compare(x, number)) for x in found)
    return low if low == high else None


def bounds(node: fx.Node) -> Bounds | None:
    """Return the bounds of a node that is computed from Philox's words alone; None of any other."""
    target, inputs = node.target, node.all_input_nodes
    if target is operator.getitem and inputs and inputs[0].target is philox:
        return torch.tensor(0), torch.tensor(_WORD)
    if target in _PLACED:
        found = [bounds(x) for x in inputs]
        if not found or any(x is None for x in found):
            return None
        pairs = [x for x in found if x is not None]
        return min(low for low, _ in pairs), max(high for _, high in pairs)
    numbers: list[Any] = [x for x in node.args if not isinstance(x, fx.Node)]
    if len(inputs) != 1 or node.args[:1] != tuple(inputs) or not all(isinstance(x, (int, float)) for x in numbers):
        return None
    if target in _GROWING or (target in _PRODUCTS and all(x > 0 for x in numbers)):
        inner = bounds(inputs[0])
        return None if inner is None else (_called(node, inner[0]), _called(node, inner[1]))
    return None


def _called(node: fx.Node, value: Tensor) -> Tensor:
    target: Any = node.target
    kwargs = {name: x for name, x in node.kwargs.items() if name != "device"}
    found: Tensor = target(value, *node.args[1:], **kwargs)
    return found
