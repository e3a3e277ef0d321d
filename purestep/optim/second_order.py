"""Losses as functions of the parameters: values, gradients and Hessian-vector products for rules that need them.

`lbfgs`, `sam` and `sophia` get `value_fn=` from a hand-written step. Plain autograd outside of transforms, `torch.func`
inside them, as everywhere in the project.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purestep import transforms, tree
from purestep.errors import OptimError, explain

ValueFn = Callable[[Any], Any]


def need_value_fn(value_fn: ValueFn | None, name: str) -> ValueFn:
    """Return the loss function, or raise the error that says how to pass it."""
    if value_fn is None:
        raise OptimError(
            explain(
                f"{name} needs the loss as a function of the parameters",
                why="it evaluates the loss at other parameters than those of the given gradient",
                instead="tx.update(grads, opt_state, params, value_fn=lambda params: loss_of(params, batch))\n"
                "state.apply_gradients(tx, grads, value_fn=...)   # in a hand-written step",
            )
        )
    return value_fn


def value_and_grad(value_fn: ValueFn, params: Any) -> tuple[Tensor, Any]:
    """Return the loss and its gradient at given parameters, with an autograd graph only if the parameters have one."""
    if transforms.active():
        grads, value = torch.func.grad_and_value(lambda p: _scalar(value_fn(p)))(params)
        return value, grads
    xs, treedef = tree.flatten(params)
    nested = torch.is_grad_enabled() and any(x.requires_grad for x in xs)
    with torch.enable_grad():
        # The caller differentiates through this update, so the gradient must keep its graph.
        points = [x if nested and x.requires_grad else x.detach().requires_grad_() for x in xs]
        value = _scalar(value_fn(tree.unflatten(treedef, points)))
        grads = torch.autograd.grad(value, points, create_graph=nested, allow_unused=True, materialize_grads=True)
    return value if nested else value.detach(), tree.unflatten(treedef, list(grads))


def hessian_vector(value_fn: ValueFn, params: Any, vectors: list[Tensor]) -> list[Tensor]:
    """Return the product of the Hessian of the loss with a vector, given as a list of leaves."""
    if transforms.active():
        return tree.leaves(torch.func.grad(lambda p: _dot(torch.func.grad(value_fn)(p), vectors))(params))
    xs, treedef = tree.flatten(params)
    with torch.enable_grad():
        points = [x.detach().requires_grad_() for x in xs]
        value = _scalar(value_fn(tree.unflatten(treedef, points)))
        slopes = torch.autograd.grad(value, points, create_graph=True, allow_unused=True, materialize_grads=True)
        along = _dot(list(slopes), vectors)
        if not along.requires_grad:
            return [torch.zeros_like(x) for x in xs]
        return list(torch.autograd.grad(along, points, allow_unused=True, materialize_grads=True))


def _scalar(value: Any) -> Tensor:
    loss = value[0] if isinstance(value, tuple) else value
    if not isinstance(loss, Tensor) or loss.dim() != 0:
        raise OptimError(
            explain(
                "value_fn did not return a scalar loss",
                where=f"it returned {tree.describe(loss)}",
                instead="loss.mean()",
            )
        )
    return loss


def _dot(xs: Any, ys: list[Tensor]) -> Tensor:
    return torch.stack([(x * y).sum() for x, y in zip(tree.leaves(xs), ys, strict=True)]).sum()
