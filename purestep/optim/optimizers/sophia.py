"""Sophia: a light second-order optimizer, clipped steps preconditioned by an estimate of the Hessian's diagonal."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from purestep import random, tree
from purestep.arguments import Count, Decay, NonNegative, Positive, Seed, checked
from purestep.errors import OptimError
from purestep.optim.base import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    need_params,
    new_count,
    same_leaves,
    transformation,
    wide,
    zeros_like,
)
from purestep.optim.chain import chain
from purestep.optim.kernels import foreach as fx
from purestep.optim.optimizers.adam import check_betas
from purestep.optim.scale import scale_by_learning_rate
from purestep.optim.second_order import ValueFn, hessian_vector
from purestep.optim.weight_decay import add_decayed_weights


@tree.pytree
class SophiaState:
    """`mu`: average gradient; `hessian`: average of the estimated diagonal; `rng`: key of the estimates; `count`:
    updates.
    """

    count: Tensor
    rng: Tensor
    mu: Any
    hessian: Any


@transformation
class ScaleBySophia(GradientTransformation):
    b1: Scalar = 0.965
    b2: Scalar = 0.99
    eps: float = 1e-8
    gamma: Scalar = 0.01
    clip_threshold: float = 1.0
    update_interval: int = 10
    seed: int = 0

    def init(self, params: Any) -> SophiaState:
        count = new_count(params)
        key = random.key(self.seed, device=count.device)
        return SophiaState(count, key, zeros_like(params), zeros_like(params))

    def update(
        self, updates: Any, state: Any, params: Any = None, *, value_fn: ValueFn | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        gs, treedef = tree.flatten(updates)
        mu = same_leaves(state.mu, treedef, updates, "first moments")
        diagonal = same_leaves(state.hessian, treedef, updates, "curvatures")
        count = state.count + 1
        mu = fx.lerp(mu, fx.cast(gs, mu), 1 - self.b1)
        us = fx.mul(mu, 1 / (1 - self.b1 ** wide(count)))
        us = fx.div(us, fx.maximum(fx.mul(diagonal, self.gamma), self.eps, reuse=True), reuse=True)
        us = fx.clamp(us, -self.clip_threshold, self.clip_threshold)
        if value_fn is not None:
            due = state.count % self.update_interval == 0
            refreshed = self._refreshed(diagonal, need_params(params, self.name), value_fn, state)
            diagonal = fx.select(due, refreshed, diagonal)
        new = SophiaState(count, state.rng, tree.unflatten(treedef, mu), tree.unflatten(treedef, diagonal))
        return tree.unflatten(treedef, us), new

    def _refreshed(self, diagonal: list[Tensor], params: Any, value_fn: ValueFn, state: Any) -> list[Tensor]:
        """Hutchinson's estimate: for random signs r, the mean of r * (H r) is the diagonal of H."""
        rng = random.fold_in(state.rng, state.count)
        signs = [
            (2 * random.bernoulli(random.fold_in(rng, name), 0.5, p.shape, device=p.device).to(p.dtype) - 1)
            for name, p in zip(tree.names(params), tree.leaves(params), strict=True)
        ]
        estimate = fx.mul(hessian_vector(value_fn, params, signs), signs)
        return fx.lerp(diagonal, fx.cast(estimate, diagonal), 1 - self.b2)


@checked(OptimError)
def scale_by_sophia(
    b1: Decay[Scalar] = 0.965,
    b2: Decay[Scalar] = 0.99,
    *,
    eps: NonNegative[float] = 1e-8,
    gamma: NonNegative[Scalar] = 0.01,
    clip_threshold: Positive[float] = 1.0,
    update_interval: Count = 10,
    seed: Seed = 0,
) -> GradientTransformation:
    """Sophia's direction, uphill; see `sophia`.

    Examples:
        >>> import torch
        >>> tx = scale_by_sophia()
        >>> tx.update({"w": torch.tensor([4.0])}, tx.init({"w": torch.zeros(1)}))[0]
        {'w': tensor([1.])}

    Reference: `optax.contrib.scale_by_sophia`.
    """
    check_betas("scale_by_sophia", b1=b1, b2=b2)
    return ScaleBySophia(b1, b2, eps, gamma, clip_threshold, update_interval, seed)


@checked(OptimError)
def sophia(
    learning_rate: NonNegative[ScalarOrSchedule],
    b1: Decay[Scalar] = 0.965,
    b2: Decay[Scalar] = 0.99,
    eps: NonNegative[float] = 1e-8,
    weight_decay: NonNegative[ScalarOrSchedule] = 1e-4,
    mask: tree.Filter | None = None,
    gamma: NonNegative[Scalar] = 0.01,
    clip_threshold: Positive[float] = 1.0,
    update_interval: Count = 10,
    *,
    seed: Seed = 0,
) -> GradientTransformation:
    r"""Sophia-H: $u = -\eta \, \mathrm{clip}(\hat m / \max(\gamma h, \epsilon), \rho)$, with $h$ the average Hessian
    diagonal.

    Every `update_interval` updates Hutchinson's estimate $r \odot (H r)$ enters the average $h$. The estimate needs
    `value_fn=` in `update`: the loss as a function of the parameters. It costs a second backward pass; to pay only on
    the steps that use it, pass `value_fn=` only if `step % update_interval == 0`. Without it $h$ does not change.

    Args:
        learning_rate: $\eta$: a number, a 0-d tensor or a schedule of the number of applied updates.
        b1, b2: decays of the averages of gradient and curvature.
        eps: smallest curvature.
        gamma: $\gamma$.
        clip_threshold: $\rho$.
        update_interval: updates between two estimates.
        weight_decay: decoupled decay.
        mask: which parameters decay.
        seed: seed of the random signs.

    Examples:
        >>> import torch
        >>> tx = sophia(0.1, weight_decay=0.0)
        >>> params = {"w": torch.tensor([2.0])}
        >>> loss = lambda p: (p["w"] ** 2).sum()
        >>> updates, state = tx.update({"w": torch.tensor([4.0])}, tx.init(params), params, value_fn=loss)
        >>> state.scale_by_sophia.hessian
        {'w': tensor([0.0200])}

    Reference: Liu et al., 2023 <https://arxiv.org/abs/2305.14342>; `optax.contrib.sophia`.
    """
    rule = scale_by_sophia(
        b1, b2, eps=eps, gamma=gamma, clip_threshold=clip_threshold, update_interval=update_interval, seed=seed
    )
    return chain(rule, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate), name="sophia")
