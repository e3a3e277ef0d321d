"""Variants of Adam with another second moment: adan (differences of gradients), adabelief (deviation from the mean),
yogi (bounded change).
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Decay, NonNegative, checked
from purestep.errors import OptimError
from purestep.optim.base import GradientTransformation, Scalar, ScalarOrSchedule, transformation
from purestep.optim.chain import chain
from purestep.optim.kernels import foreach as fx
from purestep.optim.optimizers.adam import check_betas
from purestep.optim.rule import Memory, Rule
from purestep.optim.scale import scale_by_learning_rate
from purestep.optim.weight_decay import add_decayed_weights


@transformation
class ScaleByAdan(Rule):
    scope = "element"
    memory: ClassVar[tuple[str, ...]] = ("mu", "delta", "nu", "grad")
    b1: Scalar = 0.98
    b2: Scalar = 0.92
    b3: Scalar = 0.99
    eps: Scalar = 1e-8
    eps_root: Scalar = 1e-8

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        # At the first update there is no previous gradient, so the difference is 0.
        change = fx.mul(fx.sub(gs, memory["grad"]), (t > 1).to(t.dtype), reuse=True)
        mu = fx.lerp(memory["mu"], gs, 1 - self.b1)
        delta = fx.lerp(memory["delta"], change, 1 - self.b2)
        nu = fx.average_of_squares(memory["nu"], fx.add(gs, change, alpha=1 - self.b2), self.b3)
        denom = fx.add(fx.mul(nu, 1 / (1 - self.b3**t)), self.eps_root, reuse=True)
        denom = fx.add(fx.sqrt(denom, reuse=True), self.eps, reuse=True)
        us = fx.mul(mu, 1 / (1 - self.b1**t))
        us = fx.add(us, fx.mul(delta, (1 - self.b2) / (1 - self.b2**t)), reuse=True)
        return fx.div(us, denom, reuse=True), {"mu": mu, "delta": delta, "nu": nu, "grad": list(gs)}


@checked(OptimError)
def scale_by_adan(
    b1: Decay[Scalar] = 0.98,
    b2: Decay[Scalar] = 0.92,
    b3: Decay[Scalar] = 0.99,
    eps: NonNegative[Scalar] = 1e-8,
    eps_root: NonNegative[Scalar] = 1e-8,
) -> GradientTransformation:
    """Adan's direction, uphill; see `adan`.

    Examples:
        >>> tx = scale_by_adan()
        >>> tx.update({"w": torch.tensor([4.0])}, tx.init({"w": torch.zeros(1)}))[0]
        {'w': tensor([1.])}

    Reference: `optax.scale_by_adan`.
    """
    check_betas("scale_by_adan", b1=b1, b2=b2, b3=b3)
    return ScaleByAdan(b1, b2, b3, eps, eps_root)


@checked(OptimError)
def adan(
    learning_rate: NonNegative[ScalarOrSchedule],
    b1: Decay[Scalar] = 0.98,
    b2: Decay[Scalar] = 0.92,
    b3: Decay[Scalar] = 0.99,
    eps: NonNegative[Scalar] = 1e-8,
    eps_root: NonNegative[Scalar] = 1e-8,
    weight_decay: NonNegative[ScalarOrSchedule] = 0.0,
    mask: tree.Filter | None = None,
) -> GradientTransformation:
    r"""Adan: Nesterov's momentum from the differences of gradients.

    $u = -\eta \left(\hat m + (1 - \beta_2) \hat d\right) / (\sqrt{\hat n + \bar\epsilon} + \epsilon)$ with $m$, $d$,
    $n$ the averages of $g$, of $g - g_{t-1}$ and of $(g + (1 - \beta_2)(g - g_{t-1}))^2$.

    Args:
        learning_rate: $\eta$: a number, a 0-d tensor or a schedule of the number of applied updates.
        b1, b2, b3: decays of $m$, $d$ and $n$.
        eps: added to the root.
        eps_root: added under the root.
        weight_decay: decoupled decay.
        mask: which parameters decay.

    Examples:
        >>> tx = adan(0.1)
        >>> grads = {"w": torch.tensor([0.5])}
        >>> tx.update(grads, tx.init(grads), grads)[0]
        {'w': tensor([-0.1000])}

    Reference: Xie et al., 2022 <https://arxiv.org/abs/2208.06677>; `optax.adan`.
    """
    rule = scale_by_adan(b1, b2, b3=b3, eps=eps, eps_root=eps_root)
    return chain(rule, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(learning_rate), name="adan")


@transformation
class ScaleByBelief(Rule):
    scope = "element"
    memory: ClassVar[tuple[str, ...]] = ("mu", "nu")
    b1: Scalar = 0.9
    b2: Scalar = 0.999
    eps: Scalar = 1e-16
    eps_root: Scalar = 1e-16

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        mu = fx.lerp(memory["mu"], gs, 1 - self.b1)
        nu = fx.add(fx.average_of_squares(memory["nu"], fx.sub(gs, mu), self.b2), self.eps_root, reuse=True)
        root = fx.sqrt(fx.mul(nu, 1 / (1 - self.b2**t)), reuse=True)
        us = fx.mul(mu, 1 / (1 - self.b1**t))
        return fx.div(us, fx.add(root, self.eps, reuse=True), reuse=True), {"mu": mu, "nu": nu}


@checked(OptimError)
def scale_by_belief(
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-16,
    eps_root: NonNegative[Scalar] = 1e-16,
) -> GradientTransformation:
    """AdaBelief's direction, uphill; see `adabelief`.

    Examples:
        >>> tx = scale_by_belief(b1=0.0, eps=1.0, eps_root=0.0)
        >>> tx.update({"w": torch.tensor([4.0])}, tx.init({"w": torch.zeros(1)}))[0]
        {'w': tensor([4.])}

    Reference: `optax.scale_by_belief`.
    """
    check_betas("scale_by_belief", b1=b1, b2=b2)
    return ScaleByBelief(b1, b2, eps, eps_root)


@checked(OptimError)
def adabelief(
    learning_rate: NonNegative[ScalarOrSchedule],
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-16,
    eps_root: NonNegative[Scalar] = 1e-16,
) -> GradientTransformation:
    r"""Adam that divides by the deviation of the gradient from its average: $v$ is the average of $(g - m)^2$.

    Args:
        learning_rate: $\eta$: a number, a 0-d tensor or a schedule of the number of applied updates.
        b1, b2: decays of the two averages.
        eps: added to the root.
        eps_root: added to the second moment at each update.

    Examples:
        >>> tx = adabelief(0.1)
        >>> grads = {"w": torch.tensor([0.5])}
        >>> tx.update(grads, tx.init(grads))[0]["w"] < 0
        tensor([True])

    Reference: Zhuang et al., 2020 <https://arxiv.org/abs/2010.07468>; `optax.adabelief`.
    """
    rule = scale_by_belief(b1, b2, eps=eps, eps_root=eps_root)
    return chain(rule, scale_by_learning_rate(learning_rate), name="adabelief")


@transformation
class ScaleByYogi(Rule):
    scope = "element"
    memory: ClassVar[tuple[str, ...]] = ("mu", "nu")
    b1: Scalar = 0.9
    b2: Scalar = 0.999
    eps: Scalar = 1e-3
    initial_accumulator_value: float = 1e-6

    def initial(self, name: str, param: Tensor) -> Tensor:
        return torch.full_like(param, self.initial_accumulator_value)

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        mu = fx.lerp(memory["mu"], gs, 1 - self.b1)
        squares = fx.mul(gs, gs)
        above = fx.sign(fx.sub(memory["nu"], squares))
        nu = fx.addcmul(memory["nu"], above, squares, value=-(1 - self.b2))
        root = fx.sqrt(fx.mul(nu, 1 / (1 - self.b2**t)), reuse=True)
        us = fx.mul(mu, 1 / (1 - self.b1**t))
        return fx.div(us, fx.add(root, self.eps, reuse=True), reuse=True), {"mu": mu, "nu": nu}


@checked(OptimError)
def scale_by_yogi(
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-3,
    *,
    initial_accumulator_value: NonNegative[float] = 1e-6,
) -> GradientTransformation:
    """Yogi's direction, uphill; see `yogi`.

    Examples:
        >>> tx = scale_by_yogi()
        >>> tx.update({"w": torch.tensor([4.0])}, tx.init({"w": torch.zeros(1)}))[0]
        {'w': tensor([0.9997])}

    Reference: `optax.scale_by_yogi`.
    """
    check_betas("scale_by_yogi", b1=b1, b2=b2)
    return ScaleByYogi(b1, b2, eps, initial_accumulator_value)


@checked(OptimError)
def yogi(
    learning_rate: NonNegative[ScalarOrSchedule],
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-3,
) -> GradientTransformation:
    r"""Adam whose second moment changes by at most $(1 - \beta_2) g^2$, up or down.

    Args:
        learning_rate: $\eta$: a number, a 0-d tensor or a schedule of the number of applied updates.
        b1, b2: decays of the two averages.
        eps: added to the root.

    Examples:
        >>> tx = yogi(0.1)
        >>> grads = {"w": torch.tensor([0.5])}
        >>> tx.update(grads, tx.init(grads))[0]["w"] < 0
        tensor([True])

    Reference: Zaheer et al., 2018; `optax.yogi`.
    """
    return chain(scale_by_yogi(b1, b2, eps=eps), scale_by_learning_rate(learning_rate), name="yogi")
