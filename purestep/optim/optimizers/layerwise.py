"""Steps scaled by the norm of each layer: lamb and lars, with `scale_by_trust_ratio` between them."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Decay, NonNegative, checked
from purestep.errors import OptimError
from purestep.optim.accumulators import trace
from purestep.optim.base import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    is_zero,
    need_params,
    same_leaves,
    transformation,
)
from purestep.optim.chain import chain
from purestep.optim.kernels import foreach as fx
from purestep.optim.masks import masked
from purestep.optim.optimizers.adam import scale_by_adam
from purestep.optim.scale import scale_by_learning_rate
from purestep.optim.weight_decay import add_decayed_weights


@transformation
class ScaleByTrustRatio(GradientTransformation):
    scope = "tensor"
    min_norm: float = 0.0
    trust_coefficient: Scalar = 1.0
    eps: float = 0.0

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        us, treedef = tree.flatten(updates)
        ps = same_leaves(need_params(params, self.name), treedef, updates, "params")
        sizes = fx.norms(ps), fx.norms(us)
        if isinstance(self.trust_coefficient, Tensor):  # may be wider than the norms, and widens numbers only
            ratios = [self._ratio(p, u) for p, u in zip(*sizes, strict=True)]
        else:
            ratios = fx.on_scalars(self._ratio, *sizes)
        return tree.unflatten(treedef, fx.cast(fx.each(torch.mul, us, ratios), us)), state

    def _ratio(self, param: Tensor, update: Tensor) -> Tensor:
        param, update = param.clamp(min=self.min_norm), update.clamp(min=self.min_norm)
        unknown = (param == 0.0) | (update == 0.0)
        safe = torch.where(unknown, torch.ones_like(update), update + self.eps)
        return torch.where(unknown, torch.ones_like(safe), self.trust_coefficient * param / safe)


@checked(OptimError)
def scale_by_trust_ratio(
    min_norm: NonNegative[float] = 0.0, trust_coefficient: NonNegative[Scalar] = 1.0, eps: NonNegative[float] = 0.0
) -> GradientTransformation:
    r"""Scale each tensor's update to the norm of the tensor: $u \leftarrow u \, c \lVert w \rVert / (\lVert u \rVert +
    \epsilon)$.

    Args:
        min_norm: lower bound of both norms.
        trust_coefficient: $c$.
        eps: $\epsilon$. If a norm is 0 the update is not changed.

    Examples:
        >>> tx = scale_by_trust_ratio()
        >>> tx.update({"w": torch.tensor([3.0, 4.0])}, None, {"w": torch.tensor([0.0, 1.0])})[0]
        {'w': tensor([0.6000, 0.8000])}

    Reference: You et al., 2020 <https://arxiv.org/abs/1904.00962>; `optax.scale_by_trust_ratio`.
    """
    return ScaleByTrustRatio(min_norm, trust_coefficient, eps)


@checked(OptimError)
def lamb(
    learning_rate: NonNegative[ScalarOrSchedule],
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-6,
    eps_root: NonNegative[Scalar] = 0.0,
    weight_decay: NonNegative[ScalarOrSchedule] = 0.0,
    mask: tree.Filter | None = None,
) -> GradientTransformation:
    """LAMB: Adam with decoupled decay, each layer's step scaled to the norm of its weights; for very large batches.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule of the number of applied updates.
        b1, b2, eps, eps_root: as in `adam`.
        weight_decay: added before the trust ratio.
        mask: which parameters decay.

    Examples:
        >>> tx = lamb(0.1)
        >>> grads, params = {"w": torch.tensor([0.5, 0.5])}, {"w": torch.tensor([3.0, 4.0])}
        >>> tx.update(grads, tx.init(params), params)[0]
        {'w': tensor([-0.3536, -0.3536])}

    Reference: You et al., 2020 <https://arxiv.org/abs/1904.00962>; `optax.lamb`.
    """
    return chain(
        scale_by_adam(b1, b2, eps=eps, eps_root=eps_root),
        add_decayed_weights(weight_decay, mask),
        scale_by_trust_ratio(),
        scale_by_learning_rate(learning_rate),
        name="lamb",
    )


@checked(OptimError)
def lars(
    learning_rate: NonNegative[ScalarOrSchedule],
    weight_decay: NonNegative[ScalarOrSchedule] = 0.0,
    mask: tree.Filter | None = None,
    trust_coefficient: NonNegative[Scalar] = 0.001,
    eps: NonNegative[float] = 0.0,
    trust_mask: tree.Filter | None = None,
    momentum: NonNegative[Scalar] = 0.9,
    nesterov: bool = False,
) -> GradientTransformation:
    """LARS: momentum SGD, each layer's step scaled to the norm of its weights.

    Args:
        learning_rate: a number, a 0-d tensor or a schedule of the number of applied updates.
        momentum: momentum of the scaled steps; with 0 there is no state.
        nesterov: Nesterov's form of the momentum.
        weight_decay: L2 regularisation, added to the gradient.
        mask: which parameters decay.
        trust_coefficient: how far a layer may move, as a fraction of its norm.
        trust_mask: which parameters are scaled by the trust ratio; biases and norms usually are not.
        eps: added to the norm of the update.

    Examples:
        >>> tx = lars(1.0)
        >>> grads, params = {"w": torch.tensor([0.5, 0.0])}, {"w": torch.tensor([3.0, 4.0])}
        >>> tx.update(grads, tx.init(params), params)[0]
        {'w': tensor([-0.0050,  0.0000])}

    Reference: You et al., 2017 <https://arxiv.org/abs/1708.03888>; `optax.lars`.
    """
    ratio = scale_by_trust_ratio(trust_coefficient=trust_coefficient, eps=eps)
    return chain(
        add_decayed_weights(weight_decay, mask),
        ratio if trust_mask is None else masked(ratio, trust_mask),
        scale_by_learning_rate(learning_rate),
        *([] if is_zero(momentum) else [trace(momentum, nesterov=nesterov)]),
        name="lars",
    )
