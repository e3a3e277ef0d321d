"""Master weights: full-precision parameters in the optimizer state, of which low-precision parameters are copies.

Owns `master_weights`, a wrapper of the algebra. `Policy.apply` puts its state into a train state, and a step under such
a policy wraps its transformation with it; a hand-written step does the same.
"""

from __future__ import annotations

from typing import Any

import torch

from purestep import tree
from purestep.arguments import checked
from purestep.errors import OptimError, explain
from purestep.optim.base import (
    ElementWrapper,
    GradientTransformation,
    apply_updates,
    need_params,
    same_leaves,
    transformation,
)
from purestep.optim.kernels import foreach as fx


@tree.pytree
class MasterWeightsState:
    """`master`: the parameters in full precision; `inner`: the state of the transformation that updates them."""

    master: Any
    inner: Any


@transformation
class MasterWeights(ElementWrapper):
    inner: GradientTransformation
    dtype: torch.dtype = torch.float32

    def init(self, params: Any) -> MasterWeightsState:
        master = masters(params, self.dtype)
        return MasterWeightsState(master, self.inner.init(master))

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        if not isinstance(state, MasterWeightsState):
            raise OptimError(
                explain(
                    "the optimizer state holds no master weights",
                    where=f"opt_state: {type(state).__qualname__}",
                    instead='state = ps.precision.policy("bf16-master").apply(state)',
                )
            )
        ps, treedef = tree.flatten(need_params(params, self.name, "its updates lead from them to the master weights"))
        old = same_leaves(state.master, treedef, params, "master weights")
        gs = same_leaves(updates, treedef, params, "updates")
        proposed, inner = self.inner.update(
            tree.unflatten(treedef, fx.cast(gs, old)), state.inner, state.master, **extra
        )
        master = apply_updates(state.master, proposed)
        change = fx.sub(tree.leaves(master), fx.cast(ps, old))
        return tree.unflatten(treedef, change), MasterWeightsState(master, inner)

    def apply(self, params: Any, updates: Any, state: Any) -> Any:
        """Return the rounded master weights, bitwise; adding the updates to the parameters would round twice."""
        values, treedef = tree.flatten(params)
        master = tree.leaves(state.master)
        rounded = fx.convert(master, [p.dtype for p in values])
        # A parameter in full precision must not be the master weight itself: a donated state holds each tensor once.
        return tree.unflatten(treedef, [r.clone() if r is m else r for r, m in zip(rounded, master, strict=True)])


@checked(OptimError)
def master_weights(inner: GradientTransformation, dtype: torch.dtype = torch.float32) -> GradientTransformation:
    """Let a transformation update full-precision master weights, of which the parameters are rounded copies.

    A bfloat16 parameter rounds away each update below about 1/256 of its value; master weights accumulate them.

    Args:
        inner: the transformation; it sees gradients and parameters in `dtype`.
        dtype: of the master weights.

    Returns:
        A transformation with the state `MasterWeightsState(master, inner)`. If it is outermost in
        `state.apply_gradients`, the parameters are bitwise the rounded master weights; inside of another
        transformation, up to rounding.

    Examples:
        >>> from purestep.optim import sgd
        >>> tx = master_weights(sgd(1.0))
        >>> params = {"w": torch.ones(1, dtype=torch.bfloat16)}
        >>> state = tx.init(params)
        >>> for _ in range(4):
        ...     updates, state = tx.update({"w": torch.full((1,), -0.001)}, state, params)
        ...     params = tx.apply(params, updates, state)
        >>> state.master["w"], params["w"]
        (tensor([1.0040]), tensor([1.0078], dtype=torch.bfloat16))

    Reference: Micikevicius et al., Mixed Precision Training, 2018.
    """
    return MasterWeights(inner, dtype)


def masters(params: Any, dtype: torch.dtype) -> Any:
    """Return master weights of parameters: always new tensors, so that a state holds each once and can be donated."""
    return tree.map(lambda p: p.detach().clone() if p.dtype == dtype else p.detach().to(dtype), params)
