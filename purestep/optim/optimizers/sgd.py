"""Stochastic gradient descent: plain, with momentum, with Nesterov's momentum.

Follows `torch.optim.SGD` to the bit of its momentum buffers; the update is returned, not applied.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import NonNegative, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import (
    EmptyState,
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    StepNumber,
    is_zero,
    new_count,
    same_leaves,
    transformation,
    value_at,
    wide,
    zeros_like,
)
from purestep.optim.kernels import foreach as fx
from purestep.optim.kernels.fused import fitted, fused_sgd
from purestep.optim.scale import checked_rate
from purestep.optim.scope import Kernel
from purestep.tree import Structure

_HALF = (torch.float16, torch.bfloat16)


@tree.pytree
class SgdState:
    """`momentum`: the running direction, like the parameters; `count`: updates so far."""

    count: Tensor
    momentum: Any


@transformation
class Sgd(Kernel, GradientTransformation):
    scope = "element"
    learning_rate: ScalarOrSchedule
    momentum: Scalar = 0.0
    nesterov: bool = False
    dampening: Scalar = 0.0
    fused: bool = False

    def init(self, params: Any) -> Any:
        return EmptyState() if is_zero(self.momentum) else SgdState(new_count(params), zeros_like(params))

    def update(
        self, updates: Any, state: Any, params: Any = None, *, step: StepNumber | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        gs, treedef = tree.flatten(updates)
        trace = self._trace(state, treedef, updates)
        rate = value_at(self.learning_rate, step)
        gs = gs if trace is None else fx.cast(gs, trace)
        ready = self._ready(gs, trace)
        if ready is not None:
            descent = [torch.zeros_like(g) for g in ready]
            trace = self._fused(descent, ready, trace, rate, reuse=False)
        elif trace is None:
            descent = fx.mul(gs, -rate)
        else:
            trace = fx.add(fx.mul(trace, self.momentum), gs, alpha=self._fresh_weight(state.count), reuse=True)
            direction = fx.add(gs, trace, alpha=self.momentum) if self.nesterov else trace
            descent = fx.mul(direction, -rate)
        return tree.unflatten(treedef, descent), self._following(state, treedef, trace)

    def advance(
        self,
        updates: Any,
        state: Any,
        params: Any,
        *,
        reuse: bool = False,
        step: StepNumber | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        """Update the parameters by the fused kernel, with the bits of `torch.optim`'s fused SGD."""
        if not self.fused:
            return super().advance(updates, state, params, reuse=reuse, step=step, **extra)
        gs, treedef = tree.flatten(updates)
        trace, ps = self._trace(state, treedef, updates), same_leaves(params, treedef, updates, "params")
        ready = self._ready(gs if trace is None else fx.cast(gs, trace), trace, ps)
        if ready is None:
            return super().advance(updates, state, params, reuse=reuse, step=step, **extra)
        ps = ps if reuse else fx.copies(ps)
        trace = self._fused(ps, ready, trace, value_at(self.learning_rate, step), reuse=reuse)
        return tree.unflatten(treedef, ps), self._following(state, treedef, trace)

    def _trace(self, state: Any, treedef: Structure, updates: Any) -> list[Tensor] | None:
        return None if is_zero(self.momentum) else same_leaves(state.momentum, treedef, updates, "momentum buffers")

    def _following(self, state: Any, treedef: Structure, trace: list[Tensor] | None) -> Any:
        return state if trace is None else SgdState(state.count + 1, tree.unflatten(treedef, trace))

    def _ready(self, gs: list[Tensor], *lists: list[Tensor] | None) -> list[Tensor] | None:
        """Return the gradients in the layout of the kernel; None if no kernel can run."""
        given = [xs for xs in lists if xs is not None]
        # The CPU kernel of torch 2.13 skips most elements of half precision, and reads their momentum as float32
        # (pytorch issue 191763).
        if not self.fused or not fx.plain(gs, *given) or any(g.is_cpu and g.dtype in _HALF for g in gs):
            return None
        return fitted(gs, *given)

    def _fused(
        self, into: list[Tensor], gs: list[Tensor], trace: list[Tensor] | None, rate: Scalar, *, reuse: bool
    ) -> list[Tensor] | None:
        trace = trace if trace is None or reuse else fx.copies(trace)
        momentum = 0.0 if trace is None else float(self.momentum)
        fused_sgd(into, gs, trace, rate=rate, momentum=momentum, nesterov=self.nesterov)
        return trace

    def _fresh_weight(self, count: Tensor) -> Scalar:
        """Return the weight of the new gradient; the first gradient is not dampened, as in torch."""
        if is_zero(self.dampening):
            return 1
        return torch.where(count == 0, 1.0, 1.0 - self.dampening * torch.ones_like(wide(count)))

    def hyperparams(self, state: Any, step: StepNumber | None = None) -> dict[str, Scalar]:
        return {"learning_rate": value_at(self.learning_rate, step)}


@checked(OptimError)
def sgd(
    learning_rate: NonNegative[ScalarOrSchedule],
    momentum: NonNegative[Scalar] = 0.0,
    nesterov: bool = False,
    *,
    dampening: NonNegative[Scalar] = 0.0,
    fused: bool = False,
) -> GradientTransformation:
    r"""Stochastic gradient descent.

    $m \leftarrow \mu m + (1 - d) g$, $u = -\eta m$; with Nesterov $u = -\eta (g + \mu m)$; without momentum $u = -\eta
    g$.

    Args:
        learning_rate: $\eta$: a number, a 0-d tensor or a schedule of the number of applied updates.
        momentum: $\mu$; with 0 there is no state.
        nesterov: look ahead along the momentum.
        dampening: $d$; the first gradient is not dampened.
        fused: use torch's fused kernel in eager mode: faster, equal to a few units in the last place, and a shard does
            not get the bits of the full tensor.

    Returns:
        A transformation with the state `SgdState(count, momentum)`, or an empty one without momentum.

    Raises:
        OptimError: Nesterov without momentum or with dampening; fused with dampening or tensors as momentum.

    Examples:
        >>> tx = sgd(0.1, momentum=0.9)
        >>> grads = {"w": torch.ones(2)}
        >>> state = tx.init(grads)
        >>> updates, state = tx.update(grads, state)
        >>> updates, state = tx.update(grads, state)
        >>> updates
        {'w': tensor([-0.1900, -0.1900])}

    Reference: `torch.optim.SGD`; Sutskever et al., 2013.
    """
    if nesterov and (is_zero(momentum) or not is_zero(dampening)):
        raise OptimError(
            explain(
                "Nesterov's momentum needs a momentum and no dampening",
                where=f"momentum={momentum!r}, dampening={dampening!r}",
                instead="sgd(0.1, momentum=0.9, nesterov=True)",
            )
        )
    if fused and (isinstance(momentum, Tensor) or not is_zero(dampening)):
        raise OptimError(
            explain(
                "the fused kernel takes momentum as a number, and no dampening",
                where=f"momentum={momentum!r}, dampening={dampening!r}",
                instead="sgd(0.1, momentum=0.9)   # without fused=True",
            )
        )
    return Sgd(checked_rate(learning_rate), momentum, nesterov, dampening, fused)
