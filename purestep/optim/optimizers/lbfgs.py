"""L-BFGS for full batches, with a line search that satisfies the weak Wolfe conditions.

The history is kept in flat buffers of fixed size, so the state keeps its shapes. The line search is branch-free: traced
or mapped, it runs its full number of trials; in plain eager mode it stops early, by reading one flag after each trial.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Count, Fraction, NonNegative, Whole, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    StepNumber,
    need_params,
    new_count,
    same_leaves,
    scalar_like,
    transformation,
    value_at,
)
from purestep.optim.kernels import foreach as fx
from purestep.optim.scale import checked_rate
from purestep.optim.second_order import ValueFn, need_value_fn, value_and_grad
from purestep.tree import Structure


@tree.pytree
class LbfgsState:
    """`steps`, `changes`: the latest moves of parameters and gradients, newest last; `pairs`: how many of them are
    valid.

    `params` and `grads` belong to the previous update. All tensors are flat, over every parameter in order of path.
    """

    count: Tensor
    pairs: Tensor
    params: Tensor
    grads: Tensor
    steps: Tensor
    changes: Tensor
    step_length: Tensor


@transformation
class Lbfgs(GradientTransformation):
    learning_rate: ScalarOrSchedule = 1.0
    memory_size: int = 10
    max_linesearch_steps: int = 20
    c1: float = 1e-4
    c2: float = 0.9

    def init(self, params: Any) -> LbfgsState:
        flat = _flat(tree.leaves(params))
        empty, count = flat.new_zeros(self.memory_size, flat.numel()), new_count(params)
        zero = torch.zeros_like(flat)
        return LbfgsState(count, count.clone(), zero, zero.clone(), empty, empty.clone(), flat.new_zeros(()))

    def update(
        self,
        updates: Any,
        state: Any,
        params: Any = None,
        *,
        step: StepNumber | None = None,
        value: Any = None,
        value_fn: ValueFn | None = None,
        **extra: Any,
    ) -> tuple[Any, Any]:
        gs, treedef = tree.flatten(updates)
        ps = same_leaves(need_params(params, self.name), treedef, updates, "params")
        x, g = _flat(ps), _flat(gs)
        pairs, steps, changes = self._remember(state, x, g)
        direction = -two_loop(g, steps, changes, pairs)
        # As in torch: the length of the first step is at most 1, because there is no curvature to scale it yet.
        first = torch.clamp(1.0 / g.abs().sum().clamp(min=torch.finfo(g.dtype).tiny), max=1.0)
        start = torch.where(pairs == 0, first, torch.ones_like(first)) * value_at(self.learning_rate, step)
        if self.max_linesearch_steps > 0:
            function = need_value_fn(value_fn, f"{self.name} with a line search")
            length = self._search(lambda v: self._at(function, v, ps, treedef), value, x, g, direction, start)
        else:
            length = start
        us = _split(direction * length, ps)
        return tree.unflatten(treedef, us), LbfgsState(state.count + 1, pairs, x, g, steps, changes, length)

    def _remember(self, state: Any, x: Tensor, g: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Append the last move to the history, unless it shows no positive curvature."""
        s, y = x - state.params, g - state.grads
        good = (state.count > 0) & (torch.dot(s, y) > 1e-10 * torch.dot(y, y))
        steps = torch.where(good, torch.cat([state.steps[1:], s[None]]), state.steps)
        changes = torch.where(good, torch.cat([state.changes[1:], y[None]]), state.changes)
        pairs = torch.where(good, (state.pairs + 1).clamp(max=self.memory_size), state.pairs)
        return pairs, steps, changes

    def _at(self, value_fn: ValueFn, flat: Tensor, ps: list[Tensor], treedef: Structure) -> tuple[Tensor, Tensor]:
        loss, grads = value_and_grad(value_fn, tree.unflatten(treedef, _split(flat, ps)))
        return loss.to(flat.dtype), _flat(tree.leaves(grads))

    def _search(self, at: Any, value: Any, x: Tensor, g: Tensor, direction: Tensor, start: Tensor) -> Tensor:
        """Bisect for a step that lowers the loss enough (c1) and flattens the slope enough (c2), both relative to the
        start.
        """
        before = scalar_like(at(x)[0] if value is None else value, x).detach()
        slope = torch.dot(g, direction)
        low, high, trial = torch.zeros_like(start), torch.full_like(start, torch.inf), start
        done = torch.zeros_like(start, dtype=torch.bool)
        eager = fx.plain((x, g, before))
        for _ in range(self.max_linesearch_steps):
            loss, grads = at(x + trial * direction)
            enough = loss <= before + self.c1 * trial * slope
            flat = torch.dot(grads, direction) >= self.c2 * slope
            done_now = done | (enough & flat)
            high = torch.where(done | enough, high, trial)
            low = torch.where(~done & enough, trial, low)
            following = torch.where(
                torch.isinf(high), 2 * trial, 0.5 * (low + torch.where(torch.isinf(high), low, high))
            )
            trial, done = torch.where(done_now, trial, following), done_now
            if eager and bool(done):
                break
        # If no trial satisfies both, the longest one that lowers the loss enough; if none does, no step.
        return torch.where(done, trial, low)

    def hyperparams(self, state: Any, step: StepNumber | None = None) -> dict[str, Scalar]:
        return {"step_length": state.step_length}


@checked(OptimError)
def lbfgs(
    learning_rate: NonNegative[ScalarOrSchedule] = 1.0,
    memory_size: Count = 10,
    *,
    max_linesearch_steps: Whole = 20,
    c1: Fraction[float] = 1e-4,
    c2: Fraction[float] = 0.9,
) -> GradientTransformation:
    r"""Limited-memory BFGS with a line search, for full batches.

    $u = -\alpha H g$ with $H$ from the last `memory_size` moves and $\alpha$ such that $L(w + u) \le L(w) + c_1 g^\top
    u$ and $\nabla L(w + u)^\top u \ge c_2 \, g^\top u$ (weak Wolfe conditions), found by bisection and doubling.

    Args:
        learning_rate: the first $\alpha$ of the line search; without a line search $\alpha$ itself.
        memory_size: number of remembered moves.
        max_linesearch_steps: most evaluations of the loss per update; 0 for no line search.
        c1, c2: $0 < c_1 < c_2 < 1$.

    Returns:
        A transformation whose `update` needs `params` and `value_fn=` (the loss of the full batch as a function of the
        parameters; not without a line search), and takes `value=`, the loss at `params`, to save one evaluation.

    Raises:
        OptimError: an argument is out of range, or `value_fn=` is missing.

    Examples:
        >>> tx = lbfgs()
        >>> params = {"w": torch.tensor([3.0, -2.0])}
        >>> loss = lambda p: ((p["w"] - 1.0) ** 2 * torch.tensor([1.0, 10.0])).sum()
        >>> state = tx.init(params)
        >>> for _ in range(8):
        ...     grads = torch.func.grad(loss)(params)
        ...     updates, state = tx.update(grads, state, params, value_fn=loss)
        ...     params = {"w": params["w"] + updates["w"]}
        >>> bool(loss(params) < 1e-6)
        True

    Reference: Nocedal and Wright, Numerical Optimization, ch. 7; Lewis and Overton, 2013, for the line search;
    `optax.lbfgs`.
    """
    if memory_size < 1 or max_linesearch_steps < 0 or not 0.0 < c1 < c2 < 1.0:
        where = f"{memory_size=}, {max_linesearch_steps=}, {c1=}, {c2=}"
        raise OptimError(explain("lbfgs needs memory_size >= 1 and 0 < c1 < c2 < 1", where=where, instead="lbfgs()"))
    return Lbfgs(checked_rate(learning_rate), memory_size, max_linesearch_steps, c1, c2)


def two_loop(g: Tensor, steps: Tensor, changes: Tensor, pairs: Tensor) -> Tensor:
    """Return the product of the inverse Hessian's approximation with a gradient, from the last `pairs` rows."""
    size = steps.shape[0]
    valid = torch.arange(size, device=g.device) >= size - pairs
    products = (steps * changes).sum(dim=1)
    rho = torch.where(valid, 1.0 / torch.where(valid, products, torch.ones_like(products)), torch.zeros_like(products))
    q, alphas = g, []
    for i in reversed(range(size)):
        alpha = rho[i] * torch.dot(steps[i], q)
        q = q - alpha * changes[i]
        alphas.append(alpha)
    curvature = torch.dot(changes[-1], changes[-1])
    known = (pairs > 0) & (curvature > 0)
    q = q * torch.where(known, products[-1] / torch.where(known, curvature, torch.ones_like(curvature)), 1.0).to(
        q.dtype
    )
    for i, alpha in zip(range(size), reversed(alphas), strict=True):
        q = q + steps[i] * (alpha - rho[i] * torch.dot(changes[i], q))
    return q


def _flat(xs: list[Tensor]) -> Tensor:
    if not xs:
        return torch.zeros(0)
    widest = torch.float64 if any(x.dtype == torch.float64 for x in xs) else torch.float32
    return torch.cat([x.reshape(-1).to(widest) for x in xs])


def _split(flat: Tensor, like: list[Tensor]) -> list[Tensor]:
    pieces = flat.split([x.numel() for x in like])
    return [piece.reshape(x.shape).to(x.dtype) for piece, x in zip(pieces, like, strict=True)]
