"""Limits on updates: by value, by the global norm, by the root mean square of a tensor, by the norm of a unit.

No value is read back to the host. Norms are computed in at least float32.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Limit, NonNegative, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import GradientTransformation, Scalar, need_params, same_leaves, transformation
from purestep.optim.kernels import foreach as fx
from purestep.optim.scope import ShardAware


@transformation
class ClipByValue(GradientTransformation):
    scope = "element"
    max_delta: Scalar

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        xs, treedef = tree.flatten(updates)
        return tree.unflatten(treedef, fx.clamp(xs, -self.max_delta, self.max_delta)), state


@checked(OptimError)
def clip_by_value(max_delta: Limit[Scalar]) -> GradientTransformation:
    r"""Limit each element to `[-max_delta, max_delta]`. A NaN stays a NaN.

    Args:
        max_delta: the largest absolute value, greater than 0.

    Raises:
        OptimError: `max_delta` is a number that is not positive.

    Examples:
        >>> clip_by_value(1.0).update({"w": torch.tensor([-3.0, 0.5])}, None)[0]
        {'w': tensor([-1.0000,  0.5000])}

    Reference: `optax.clip`, `torch.nn.utils.clip_grad_value_`.
    """
    return ClipByValue(_positive(max_delta, "max_delta"))


@transformation
class ClipByGlobalNorm(ShardAware, GradientTransformation):
    max_norm: Scalar

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        xs, treedef = tree.flatten(updates)
        if not xs:
            return updates, state
        norm = fx.global_norm(xs, treedef)
        factor = torch.where(norm <= self.max_norm, torch.ones_like(norm), self.max_norm / norm)
        return tree.unflatten(treedef, fx.mul(xs, factor)), state


@checked(OptimError)
def clip_by_global_norm(max_norm: Limit[Scalar]) -> GradientTransformation:
    r"""Scale all updates so that their 2-norm, over all leaves together, is at most `max_norm`.

    $u \leftarrow u \cdot \min(1, c / \lVert u \rVert)$. Updates within the limit keep their bits; a NaN anywhere makes
    every update NaN, which `apply_if_finite` detects.

    Args:
        max_norm: the limit $c$, greater than 0.

    Raises:
        OptimError: `max_norm` is a number that is not positive.

    Examples:
        >>> clip_by_global_norm(1.0).update({"w": torch.tensor([3.0, 4.0])}, None)[0]
        {'w': tensor([0.6000, 0.8000])}

    Reference: Pascanu et al., 2012 <https://arxiv.org/abs/1211.5063>; `optax.clip_by_global_norm`.
    """
    return ClipByGlobalNorm(_positive(max_norm, "max_norm"))


@transformation
class ClipByBlockRms(GradientTransformation):
    scope = "tensor"
    threshold: Scalar

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        xs, treedef = tree.flatten(updates)
        factors = [torch.clamp(_rms(x) / self.threshold, min=1.0) for x in xs]
        return tree.unflatten(treedef, fx.cast(fx.each(torch.div, xs, factors), xs)), state


@checked(OptimError)
def clip_by_block_rms(threshold: Limit[Scalar]) -> GradientTransformation:
    r"""Scale each tensor so that its root mean square is at most `threshold`.

    $u \leftarrow u / \max(1, \mathrm{rms}(u) / d)$ for each leaf by itself.

    Examples:
        >>> clip_by_block_rms(1.0).update({"w": torch.tensor([3.0, 3.0])}, None)[0]
        {'w': tensor([1., 1.])}

    Reference: Shazeer and Stern, 2018 <https://arxiv.org/abs/1804.04235>; `optax.clip_by_block_rms`.
    """
    return ClipByBlockRms(_positive(threshold, "threshold"))


@transformation
class AdaptiveGradClip(GradientTransformation):
    scope = "tensor"
    clipping: Scalar
    eps: float = 1e-3

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        gs, treedef = tree.flatten(updates)
        ps = same_leaves(need_params(params, self.name), treedef, updates, "params")
        norms, sizes = list(map(unitwise_norm, gs)), list(map(unitwise_norm, ps))
        if isinstance(self.clipping, Tensor):  # may be wider than the norms, and widens numbers only
            limits = list(map(self._limit, sizes))
        else:
            limits = fx.elements(self._limit, sizes)
        factors = fx.elements(lambda norm, limit: limit / torch.clamp(norm, min=1e-6), norms, limits)
        inside = fx.elements(torch.lt, norms, limits)
        clipped = [g * factor for g, factor in zip(gs, fx.cast(factors, gs), strict=True)]
        return tree.unflatten(treedef, list(map(torch.where, inside, gs, clipped))), state

    def _limit(self, size: Tensor) -> Tensor:
        return self.clipping * torch.clamp(size, min=self.eps)


@checked(OptimError)
def adaptive_grad_clip(clipping: NonNegative[Scalar], eps: NonNegative[float] = 1e-3) -> GradientTransformation:
    r"""Limit the norm of each unit's gradient to a fraction of the norm of its weights.

    For row $i$ of a matrix: $g_i \leftarrow g_i \cdot \lambda \max(\lVert w_i \rVert, \epsilon) / \lVert g_i \rVert$
    when the gradient is larger than that. A unit is an output: one index of dim 0 of a weight in torch's layout (`[out,
    in, ...]`); a vector or a scalar is one unit.

    Args:
        clipping: the fraction $\lambda$.
        eps: lower bound $\epsilon$ of the norm of weights.

    Examples:
        >>> tx = adaptive_grad_clip(0.1)
        >>> tx.update({"w": torch.tensor([3.0, 4.0])}, None, {"w": torch.tensor([0.0, 1.0])})[0]
        {'w': tensor([0.0600, 0.0800])}

    Reference: Brock et al., 2021 <https://arxiv.org/abs/2102.06171>; `optax.adaptive_grad_clip`, whose matrices are
    `[in, out]`.
    """
    return AdaptiveGradClip(_positive(clipping, "clipping"), eps)


def unitwise_norm(x: Tensor) -> Tensor:
    """Return the norm of each output unit, shaped to broadcast over the tensor."""
    if x.dim() <= 1:
        return torch.linalg.vector_norm(x)
    return torch.linalg.vector_norm(x, dim=tuple(range(1, x.dim())), keepdim=True)


def global_norm(updates: Any) -> Tensor:
    """Return the 2-norm of all tensors of a tree together, as a 0-d tensor of at least float32.

    Examples:
        >>> global_norm({"a": torch.tensor([3.0]), "b": torch.tensor(4.0)})
        tensor(5.)
    """
    return fx.global_norm(*tree.flatten(updates))


def _rms(x: Tensor) -> Tensor:
    return torch.linalg.vector_norm(x, dtype=fx.accumulator(x.dtype)) / max(x.numel(), 1) ** 0.5


def _positive(value: Scalar, name: str) -> Scalar:
    if not isinstance(value, Tensor) and not value > 0:
        raise OptimError(explain(f"{name} must be greater than 0", where=f"{name}={value!r}"))
    return value
