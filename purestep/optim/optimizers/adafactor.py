"""Adafactor: second moments of a matrix kept as its row and column sums."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Finite, NonNegative, Positive, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    StepNumber,
    is_zero,
    need_params,
    new_count,
    same_leaves,
    scalar_like,
    transformation,
    value_at,
    wide,
)
from purestep.optim.kernels import foreach as fx
from purestep.optim.scale import checked_rate
from purestep.optim.weight_decay import add_decay, fixed_filter


@tree.pytree
class AdafactorState:
    """`row`, `column`: averages of squared gradients over the last and the last but one dim; `full`: for vectors and
    tensors without elements.

    Each is a tree like the parameters; a tensor that does not need one has an empty tensor there.
    """

    count: Tensor
    row: Any
    column: Any
    full: Any


@transformation
class Adafactor(GradientTransformation):
    scope = "tensor"
    learning_rate: ScalarOrSchedule = 1e-2
    beta2_decay: float = -0.8
    eps: tuple[float | None, float] = (None, 1e-3)
    d: float = 1.0
    weight_decay: ScalarOrSchedule = 0.0
    mask: tree.Filter | None = None

    def init(self, params: Any) -> AdafactorState:
        empty = lambda p: p.new_zeros(0)  # noqa: E731
        return AdafactorState(
            new_count(params),
            tree.map(lambda p: torch.zeros_like(p[..., :1]) if _is_factored(p) else empty(p), params),
            tree.map(lambda p: torch.zeros_like(p[..., :1, :]) if _is_factored(p) else empty(p), params),
            tree.map(lambda p: empty(p) if _is_factored(p) else torch.zeros_like(p), params),
        )

    def update(
        self, updates: Any, state: Any, params: Any = None, *, step: StepNumber | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        gs, treedef = tree.flatten(updates)
        ps = same_leaves(need_params(params, self.name), treedef, updates, "params")
        memory = [same_leaves(getattr(state, n), treedef, updates, n) for n in ("row", "column", "full")]
        count, rate = state.count + 1, value_at(self.learning_rate, step)
        t = wide(count)
        rho = torch.minimum(scalar_like(rate, t), 1 / t**0.5)
        weight = t**self.beta2_decay
        us, rows, columns, fulls = self._directions(fx.cast(gs, ps), ps, memory, rho, weight)
        if not is_zero(self.weight_decay):
            decay = value_at(self.weight_decay, step, "weight_decay")
            us = add_decay(us, ps, -rate * decay, mask=self.mask, like=updates)
        trees = [tree.unflatten(treedef, xs) for xs in (rows, columns, fulls)]
        return tree.unflatten(treedef, us), AdafactorState(count, *trees)

    def _directions(
        self,
        gs: list[Tensor],
        ps: list[Tensor],
        memory: list[list[Tensor]],
        rho: Tensor,
        weight: Tensor,
    ) -> tuple[list[Tensor], list[Tensor], list[Tensor], list[Tensor]]:
        least = [torch.finfo(p.dtype).eps if self.eps[0] is None else self.eps[0] for p in ps]
        rows, columns, fulls, estimates = *map(list, memory), list(gs)
        at = [i for i, g in enumerate(gs) if _is_factored(g)]
        matrices = [gs[i] for i in at]
        rs = self._moved([rows[i] for i in at], matrices, -1, weight)
        cs = self._moved([columns[i] for i in at], matrices, -2, weight)
        totals = fx.maximum([r.mean(dim=-2, keepdim=True) for r in rs], [least[i] for i in at])
        for i, r, c, total in zip(at, rs, cs, totals, strict=True):
            rows[i], columns[i], estimates[i] = r, c, (r @ c) / total
        at = [i for i, g in enumerate(gs) if not _is_factored(g)]
        vectors = [gs[i] for i in at]
        for i, full in zip(at, fx.lerp([fulls[i] for i in at], fx.mul(vectors, vectors), weight), strict=True):
            fulls[i] = estimates[i] = full
        steps = fx.mul(fx.rsqrt(fx.maximum(estimates, [eps * eps for eps in least])), gs)
        kinds = [rho.dtype] * len(ps)
        rms = fx.convert(fx.norms(steps, widened=False), kinds)
        rms = fx.div(rms, [max(s.numel(), 1) ** 0.5 * self.d for s in steps])
        sizes = fx.div(fx.convert(fx.norms(ps, widened=False), kinds), [max(p.numel(), 1) ** 0.5 for p in ps])
        alphas = fx.div(fx.mul(fx.maximum(sizes, self.eps[1]), rho), fx.maximum(rms, 1.0))
        factors = fx.neg(fx.convert(alphas, [s.dtype for s in steps]))
        return fx.each(torch.mul, steps, factors), rows, columns, fulls

    def _moved(self, old: list[Tensor], gs: list[Tensor], dim: int, weight: Tensor) -> list[Tensor]:
        """Move averages of squares along a dim towards those of gradients."""
        found = [torch.linalg.vector_norm(g, dim=dim, keepdim=True) for g in gs]
        return fx.lerp(old, fx.div(fx.mul(found, found), [float(g.shape[dim]) for g in gs]), weight)

    def hyperparams(self, state: Any, step: StepNumber | None = None) -> dict[str, Scalar]:
        return {"learning_rate": value_at(self.learning_rate, step)}


def _is_factored(p: Tensor) -> bool:
    """Tell whether a tensor has rows and columns, which one without elements has not."""
    return p.dim() > 1 and p.numel() > 0


@checked(OptimError)
def adafactor(
    learning_rate: NonNegative[ScalarOrSchedule] = 1e-2,
    *,
    beta2_decay: Finite[float] = -0.8,
    eps: NonNegative[tuple[float | None, float]] = (None, 1e-3),
    d: Positive[float] = 1.0,
    weight_decay: NonNegative[ScalarOrSchedule] = 0.0,
    mask: tree.Filter | None = None,
) -> GradientTransformation:
    r"""Adafactor: Adam's second moment at the cost of a row and a column for each matrix, and steps relative to the
    weights.

    $u = -\alpha_t \, g / \sqrt{\hat V} / \max(1, \mathrm{rms}(\cdot) / d)$ with $\hat V = r c^\top / \bar r$,
    $\alpha_t = \max(\epsilon_2, \mathrm{rms}(w)) \min(\eta, 1 / \sqrt t)$.

    Args:
        learning_rate: $\eta$, the largest relative step.
        beta2_decay: the averages decay with $1 - t^{\text{beta2\_decay}}$.
        eps: smallest variance (by default the machine epsilon of the dtype) and smallest scale of the weights.
        d: limit of the root mean square of a step.
        weight_decay: decoupled decay.
        mask: which parameters decay.

    Returns:
        A transformation with the state `AdafactorState(count, row, column, full)`. The last two dims are factored.

    Examples:
        >>> tx = adafactor(0.5)
        >>> params = {"w": torch.ones(2, 3)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates["w"][0], tuple(state.row["w"].shape)
        (tensor([-0.5000, -0.5000, -0.5000]), (2, 1))

    Reference: Shazeer and Stern, 2018 <https://arxiv.org/abs/1804.04235>; `torch.optim.Adafactor`.
    """
    if len(eps) != 2 or d < 1.0 or beta2_decay > 0:
        where = f"{eps=}, {d=}, {beta2_decay=}"
        raise OptimError(
            explain("adafactor needs two eps, d >= 1 and beta2_decay <= 0", where=where, instead="adafactor(0.01)")
        )
    return Adafactor(checked_rate(learning_rate), beta2_decay, (eps[0], eps[1]), d, weight_decay, fixed_filter(mask))
