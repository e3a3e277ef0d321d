"""Regularization besides weight decay: `add_noise`, `centralize`, `keep_params_nonnegative`, unit norms."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep import random, tree
from purestep.arguments import NonNegative, Positive, Seed, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import (
    GradientTransformation,
    Scalar,
    StepNumber,
    need_params,
    need_step,
    new_count,
    same_leaves,
    transformation,
    wide,
)
from purestep.optim.kernels import foreach as fx
from purestep.optim.scope import ShardAware


@tree.pytree
class AddNoiseState:
    """`rng`: the key from which the key of each step is folded; it never changes."""

    rng: Tensor


@transformation
class AddNoise(GradientTransformation):
    scope = "tensor"
    eta: Scalar
    gamma: Scalar
    seed: int = 0

    def init(self, params: Any) -> AddNoiseState:
        return AddNoiseState(random.key(self.seed, device=new_count(params).device))

    def update(
        self, updates: Any, state: Any, params: Any = None, *, step: StepNumber | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        t = torch.as_tensor(need_step(step, self.name))
        scale = torch.sqrt(self.eta / (1 + wide(t)) ** self.gamma)
        rng = random.fold_in(state.rng, t)
        us, treedef = tree.flatten(updates)
        # By name, not by position: the noise of a parameter stays the same when others are added, masked or frozen.
        keys = [random.fold_in(rng, name) for name in tree.names(updates)]
        noise = [_normal(key, u) for key, u in zip(keys, us, strict=True)]
        return tree.unflatten(treedef, fx.add(us, fx.mul(noise, scale, reuse=True))), state


@checked(OptimError)
def add_noise(eta: NonNegative[Scalar], gamma: NonNegative[Scalar], *, seed: Seed = 0) -> GradientTransformation:
    r"""Add annealed Gaussian noise of variance $\eta / (1 + t)^\gamma$.

    The noise is a function of (seed, step, name of the parameter): the same after a resume, on any device, under any
    sharding.

    Args:
        eta: variance at step 0.
        gamma: rate at which the variance falls; the paper uses 0.55.
        seed: integer in [0, 2**64).

    Returns:
        A transformation with the state `AddNoiseState(rng)`; `update` needs `step=`.

    Examples:
        >>> tx = add_noise(0.1, 0.55, seed=1)
        >>> state = tx.init({"w": torch.zeros(3)})
        >>> a, _ = tx.update({"w": torch.zeros(3)}, state, step=torch.tensor(0))
        >>> b, _ = tx.update({"w": torch.zeros(3)}, state, step=torch.tensor(0))
        >>> torch.equal(a["w"], b["w"])
        True

    Reference: Neelakantan et al., 2015 <https://arxiv.org/abs/1511.06807>; `optax.add_noise`.
    """
    return AddNoise(eta, gamma, seed)


@transformation
class Centralize(GradientTransformation):
    scope = "tensor"

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        return tree.map(_centered, updates), state


@checked(OptimError)
def centralize() -> GradientTransformation:
    """Subtract from each output unit's gradient its mean: dim 0 of a weight is the unit, as in torch's layout.

    Tensors of fewer than two dims pass unchanged.

    Examples:
        >>> centralize().update({"w": torch.tensor([[1.0, 3.0], [0.0, 0.0]])}, None)[0]
        {'w': tensor([[-1.,  1.],
                [ 0.,  0.]])}

    Reference: Yong et al., 2020 <https://arxiv.org/abs/2004.01461>; `optax.centralize`.
    """
    return Centralize()


@transformation
class KeepParamsNonnegative(GradientTransformation):
    scope = "element"

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        us, treedef = tree.flatten(updates)
        ps = same_leaves(need_params(params, self.name), treedef, updates, "params")
        return tree.unflatten(treedef, [torch.where(p + u < 0, -p, u) for u, p in zip(us, ps, strict=True)]), state


@checked(OptimError)
def keep_params_nonnegative() -> GradientTransformation:
    """Shorten updates so that parameters stay at 0 or above. Put it last.

    Examples:
        >>> tx = keep_params_nonnegative()
        >>> tx.update({"w": torch.tensor([-3.0, -0.5])}, None, {"w": torch.tensor([1.0, 1.0])})[0]
        {'w': tensor([-1.0000, -0.5000])}

    Reference: `optax.keep_params_nonnegative`.
    """
    return KeepParamsNonnegative()


@transformation
class NormalizeByUpdateNorm(ShardAware, GradientTransformation):
    scale_factor: Scalar = 1.0
    eps: float = 1e-6

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        us, treedef = tree.flatten(updates)
        if not us:
            return updates, state
        return tree.unflatten(treedef, fx.mul(us, self.scale_factor / (fx.global_norm(us, treedef) + self.eps))), state


@checked(OptimError)
def normalize_by_update_norm(
    scale_factor: Positive[Scalar] = 1.0, eps: NonNegative[float] = 1e-6
) -> GradientTransformation:
    """Give all updates together the 2-norm `scale_factor`.

    Examples:
        >>> normalize_by_update_norm(eps=0.0).update({"w": torch.tensor([3.0, 4.0])}, None)[0]
        {'w': tensor([0.6000, 0.8000])}

    Raises:
        OptimError: `eps` is negative.

    Reference: `optax.normalize_by_update_norm`.
    """
    if eps < 0:
        raise OptimError(explain("eps must not be negative", where=f"{eps=}"))
    return NormalizeByUpdateNorm(scale_factor, eps)


def _normal(key: Tensor, like: Tensor) -> Tensor:
    return random.normal(key, like.shape, dtype=fx.accumulator(like.dtype), device=like.device).to(like.dtype)


def _centered(x: Tensor) -> Tensor:
    return x if x.dim() < 2 else x - x.mean(dim=tuple(range(1, x.dim())), keepdim=True)
