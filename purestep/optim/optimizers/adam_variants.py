"""Variants of Adam with other formulas: nadam, nadamw, radam, adamax."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Decay, NonNegative, checked
from purestep.errors import OptimError
from purestep.optim.base import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    is_zero,
    new_count,
    same_leaves,
    transformation,
    wide,
    zeros_like,
)
from purestep.optim.chain import chain
from purestep.optim.kernels import foreach as fx
from purestep.optim.optimizers.adam import check_betas
from purestep.optim.rule import Memory, Rule
from purestep.optim.scale import scale_by_learning_rate
from purestep.optim.weight_decay import add_decayed_weights

MOMENTS = ("mu", "nu")


@tree.pytree
class NAdamState:
    """`mu`, `nu`: moving averages; `mu_product`: product of the momentum schedule so far; `count`: updates so far."""

    count: Tensor
    mu_product: Tensor
    mu: Any
    nu: Any


@transformation
class ScaleByNadam(GradientTransformation):
    scope = "element"
    b1: Scalar = 0.9
    b2: Scalar = 0.999
    eps: Scalar = 1e-8
    momentum_decay: float = 4e-3

    def init(self, params: Any) -> NAdamState:
        count = new_count(params)
        return NAdamState(count, torch.ones_like(wide(count)), zeros_like(params), zeros_like(params))

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        gs, treedef = tree.flatten(updates)
        mu, nu = (same_leaves(getattr(state, name), treedef, updates, name) for name in MOMENTS)
        gs, count = fx.cast(gs, mu), state.count + 1
        t = wide(count)
        mu, nu = fx.lerp(mu, gs, 1 - self.b1), fx.average_of_squares(nu, gs, self.b2)
        weight, following = self._momentum(t), self._momentum(t + 1)
        product = state.mu_product * weight
        denom = fx.div(fx.sqrt(nu), torch.sqrt(1 - self.b2**t), reuse=True)
        denom = fx.add(denom, self.eps, reuse=True)
        us = fx.div(fx.mul(gs, (1 - weight) / (1 - product)), denom, reuse=True)
        us = fx.add(us, fx.div(fx.mul(mu, following / (1 - product * following)), denom, reuse=True), reuse=True)
        new = NAdamState(count, product, tree.unflatten(treedef, mu), tree.unflatten(treedef, nu))
        return tree.unflatten(treedef, us), new

    def _momentum(self, t: Tensor) -> Tensor:
        return self.b1 * (1.0 - 0.5 * torch.pow(0.96, t * self.momentum_decay))


@checked(OptimError)
def scale_by_nadam(
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    *,
    eps: NonNegative[Scalar] = 1e-8,
    momentum_decay: NonNegative[float] = 4e-3,
) -> GradientTransformation:
    """NAdam's direction, uphill; see `nadam`.

    Examples:
        >>> tx = scale_by_nadam()
        >>> tx.init({"w": torch.zeros(1)}).mu_product
        tensor(1., dtype=torch.float64)
    """
    check_betas("scale_by_nadam", b1=b1, b2=b2)
    return ScaleByNadam(b1, b2, eps, momentum_decay)


@checked(OptimError)
def nadam(
    learning_rate: NonNegative[ScalarOrSchedule],
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-8,
    *,
    momentum_decay: NonNegative[float] = 4e-3,
) -> GradientTransformation:
    r"""Adam with Nesterov's momentum on a schedule $\mu_t = \beta_1 (1 - \tfrac12 0.96^{t \psi})$.

    $u = -\eta \left(\frac{(1 - \mu_t) g}{1 - \prod_i^t \mu_i} + \frac{\mu_{t+1} m}{1 - \prod_i^{t+1} \mu_i}\right) /
    (\sqrt{\hat v} + \epsilon)$

    Args:
        learning_rate: $\eta$: a number, a 0-d tensor or a schedule of the number of applied updates.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.
        momentum_decay: $\psi$. `adam(nesterov=True)` is the form without this schedule (`optax.nadam`).

    Examples:
        >>> tx = nadam(0.1)
        >>> grads = {"w": torch.tensor([0.5, -2.0])}
        >>> tx.update(grads, tx.init(grads))[0]["w"].sign()
        tensor([-1.,  1.])

    Reference: Dozat, 2016; `torch.optim.NAdam`.
    """
    rule = scale_by_nadam(b1, b2, eps=eps, momentum_decay=momentum_decay)
    return chain(rule, scale_by_learning_rate(learning_rate), name="nadam")


@checked(OptimError)
def nadamw(
    learning_rate: NonNegative[ScalarOrSchedule],
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-8,
    *,
    momentum_decay: NonNegative[float] = 4e-3,
    weight_decay: NonNegative[ScalarOrSchedule] = 1e-2,
    mask: tree.Filter | None = None,
) -> GradientTransformation:
    """NAdam with decoupled weight decay; see `nadam` and `adamw`.

    Examples:
        >>> tx = nadamw(0.1)
        >>> grads = {"w": torch.tensor([0.5])}
        >>> tx.update(grads, tx.init(grads), grads)[0]["w"] < 0
        tensor([True])

    Reference: `torch.optim.NAdam(decoupled_weight_decay=True)`.
    """
    rule = scale_by_nadam(b1, b2, eps=eps, momentum_decay=momentum_decay)
    decay = add_decayed_weights(weight_decay, mask)
    return chain(rule, decay, scale_by_learning_rate(learning_rate), name="nadamw")


@transformation
class ScaleByRadam(Rule):
    scope = "element"
    memory: ClassVar[tuple[str, ...]] = MOMENTS
    b1: Scalar = 0.9
    b2: Scalar = 0.999
    eps: Scalar = 1e-8
    threshold: float = 5.0

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        mu = fx.lerp(memory["mu"], gs, 1 - self.b1)
        nu = fx.average_of_squares(memory["nu"], gs, self.b2)
        correction1, correction2 = 1 - self.b1**t, 1 - self.b2**t
        rho_inf = 2 / (1 - self.b2) - 1
        rho = rho_inf - 2 * t * self.b2**t / correction2
        known = rho > self.threshold
        # The rectification is undefined until the variance is known: 1 replaces it, and is not used.
        steady = torch.where(known, rho, torch.full_like(rho, 6.0))
        rect = torch.sqrt((steady - 4) * (steady - 2) * rho_inf / ((rho_inf - 4) * (rho_inf - 2) * steady))
        adaptive = torch.sqrt(correction2) * (rect / correction1)
        root = fx.add(fx.sqrt(nu), self.eps, reuse=True)
        factor = fx.reciprocal(fx.div(root, adaptive, reuse=True), reuse=True)
        factor = fx.mul(factor, known.to(t.dtype), reuse=True)
        plain = torch.where(known, torch.zeros_like(t), 1 / correction1)
        return fx.mul(fx.add(factor, plain), mu, reuse=True), {"mu": mu, "nu": nu}


@checked(OptimError)
def scale_by_radam(
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-8,
    *,
    threshold: NonNegative[float] = 5.0,
) -> GradientTransformation:
    """RAdam's direction, uphill; see `radam`.

    Examples:
        >>> tx = scale_by_radam()
        >>> tx.update({"w": torch.tensor([4.0])}, tx.init({"w": torch.zeros(1)}))[0]
        {'w': tensor([4.])}

    Reference: `optax.scale_by_radam`.
    """
    check_betas("scale_by_radam", b1=b1, b2=b2)
    return ScaleByRadam(b1, b2, eps, threshold)


@checked(OptimError)
def radam(
    learning_rate: NonNegative[ScalarOrSchedule],
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-8,
    *,
    threshold: NonNegative[float] = 5.0,
    weight_decay: NonNegative[ScalarOrSchedule] = 0.0,
    mask: tree.Filter | None = None,
) -> GradientTransformation:
    r"""Rectified Adam: plain momentum until the variance of the second moment can be estimated, then Adam with a
    rectified step.

    Args:
        learning_rate: $\eta$: a number, a 0-d tensor or a schedule of the number of applied updates.
        b1: decay of the first moment.
        b2: decay of the second moment.
        eps: added to the root.
        threshold: length of the approximated average above which the adaptive step is used.
        weight_decay: decoupled decay.
        mask: which parameters decay.

    Examples:
        >>> tx = radam(0.1)
        >>> grads = {"w": torch.tensor([0.5])}
        >>> tx.update(grads, tx.init(grads))[0]
        {'w': tensor([-0.0500])}

    Reference: Liu et al., 2020 <https://arxiv.org/abs/1908.03265>; `torch.optim.RAdam`.
    """
    decay = [] if is_zero(weight_decay) else [add_decayed_weights(weight_decay, mask)]
    rule = scale_by_radam(b1, b2, eps=eps, threshold=threshold)
    return chain(rule, *decay, scale_by_learning_rate(learning_rate), name="radam")


@transformation
class ScaleByAdamax(Rule):
    scope = "element"
    memory: ClassVar[tuple[str, ...]] = MOMENTS
    b1: Scalar = 0.9
    b2: Scalar = 0.999
    eps: Scalar = 1e-8

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        mu = fx.lerp(memory["mu"], gs, 1 - self.b1)
        largest = fx.maximum(fx.mul(memory["nu"], self.b2), fx.add(fx.abs(gs), self.eps, reuse=True), reuse=True)
        return fx.div(fx.mul(mu, 1 / (1 - self.b1**t)), largest, reuse=True), {"mu": mu, "nu": largest}


@checked(OptimError)
def scale_by_adamax(
    b1: Decay[Scalar] = 0.9, b2: Decay[Scalar] = 0.999, eps: NonNegative[Scalar] = 1e-8
) -> GradientTransformation:
    """Adamax's direction, uphill; see `adamax`.

    Examples:
        >>> tx = scale_by_adamax()
        >>> tx.update({"w": torch.tensor([4.0])}, tx.init({"w": torch.zeros(1)}))[0]
        {'w': tensor([1.])}

    Reference: `optax.scale_by_adamax`.
    """
    check_betas("scale_by_adamax", b1=b1, b2=b2)
    return ScaleByAdamax(b1, b2, eps)


@checked(OptimError)
def adamax(
    learning_rate: NonNegative[ScalarOrSchedule],
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-8,
    *,
    weight_decay: NonNegative[ScalarOrSchedule] = 0.0,
    mask: tree.Filter | None = None,
) -> GradientTransformation:
    r"""Adam with the largest recent gradient in place of the root mean square: $n \leftarrow \max(\beta_2 n, |g| +
    \epsilon)$.

    Args:
        learning_rate: $\eta$: a number, a 0-d tensor or a schedule of the number of applied updates.
        b1: decay of the first moment.
        b2: decay of the largest gradient.
        eps: added to the absolute gradient.
        weight_decay: decoupled decay (`optax.adamaxw`).
        mask: which parameters decay.

    Examples:
        >>> tx = adamax(0.1)
        >>> grads = {"w": torch.tensor([0.5])}
        >>> tx.update(grads, tx.init(grads))[0]
        {'w': tensor([-0.1000])}

    Reference: Kingma and Ba, 2015 <https://arxiv.org/abs/1412.6980>; `torch.optim.Adamax`.
    """
    decay = [] if is_zero(weight_decay) else [add_decayed_weights(weight_decay, mask)]
    rule = scale_by_adamax(b1, b2, eps=eps)
    return chain(rule, *decay, scale_by_learning_rate(learning_rate), name="adamax")
