"""Steps divided by a root mean square: rmsprop, adagrad, adadelta, and their directions `scale_by_*`.

Formulas, order of operations and defaults follow `torch.optim`.
"""

from __future__ import annotations

from typing import ClassVar

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Decay, NonNegative, checked
from purestep.errors import OptimError
from purestep.optim.accumulators import trace
from purestep.optim.base import GradientTransformation, Scalar, ScalarOrSchedule, is_zero, transformation
from purestep.optim.chain import chain
from purestep.optim.kernels import foreach as fx
from purestep.optim.rule import Memory, Rule
from purestep.optim.scale import scale_by_learning_rate
from purestep.optim.weight_decay import add_decayed_weights


@transformation
class ScaleByRms(Rule):
    scope = "element"
    memory: ClassVar[tuple[str, ...]] = ("nu",)
    decay: Scalar = 0.99
    eps: Scalar = 1e-8
    eps_in_sqrt: bool = False

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        nu = fx.average_of_squares(memory["nu"], gs, self.decay)
        return fx.div(gs, _root(nu, self.eps, self.eps_in_sqrt)), {"nu": nu}


@checked(OptimError)
def scale_by_rms(
    decay: Decay[Scalar] = 0.99, eps: NonNegative[Scalar] = 1e-8, *, eps_in_sqrt: bool = False
) -> GradientTransformation:
    r"""Divide by the root of the moving average of squares: $g / (\sqrt{v} + \epsilon)$.

    Args:
        decay: decay of the average.
        eps: added to the root, or under it with `eps_in_sqrt` (optax's default).

    Examples:
        >>> tx = scale_by_rms(decay=0.75)
        >>> tx.update({"w": torch.tensor([3.0])}, tx.init({"w": torch.zeros(1)}))[0]
        {'w': tensor([2.])}

    Reference: `optax.scale_by_rms`.
    """
    return ScaleByRms(decay, eps, eps_in_sqrt)


@transformation
class ScaleByStddev(Rule):
    scope = "element"
    memory: ClassVar[tuple[str, ...]] = ("nu", "mu")
    decay: Scalar = 0.99
    eps: Scalar = 1e-8
    eps_in_sqrt: bool = False

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        nu = fx.average_of_squares(memory["nu"], gs, self.decay)
        mu = fx.lerp(memory["mu"], gs, 1 - self.decay)
        spread = fx.addcmul(nu, mu, mu, value=-1)
        return fx.div(gs, _root(spread, self.eps, self.eps_in_sqrt)), {"nu": nu, "mu": mu}


@checked(OptimError)
def scale_by_stddev(
    decay: Decay[Scalar] = 0.99, eps: NonNegative[Scalar] = 1e-8, *, eps_in_sqrt: bool = False
) -> GradientTransformation:
    r"""Divide by the moving standard deviation: $g / (\sqrt{v - m^2} + \epsilon)$.

    Examples:
        >>> tx = scale_by_stddev(decay=0.5)
        >>> tx.update({"w": torch.tensor([3.0])}, tx.init({"w": torch.zeros(1)}))[0]
        {'w': tensor([2.])}

    Reference: `optax.scale_by_stddev`.
    """
    return ScaleByStddev(decay, eps, eps_in_sqrt)


@checked(OptimError)
def rmsprop(
    learning_rate: NonNegative[ScalarOrSchedule],
    decay: Decay[Scalar] = 0.99,
    eps: NonNegative[Scalar] = 1e-8,
    *,
    momentum: NonNegative[Scalar] = 0.0,
    nesterov: bool = False,
    centered: bool = False,
    weight_decay: NonNegative[ScalarOrSchedule] = 0.0,
    mask: tree.Filter | None = None,
) -> GradientTransformation:
    r"""RMSProp: $v \leftarrow \alpha v + (1 - \alpha) g^2$, $u = -\eta \, g / (\sqrt{v} + \epsilon)$.

    Args:
        learning_rate: $\eta$: a number, a 0-d tensor or a schedule of the number of applied updates.
        decay: $\alpha$.
        eps: $\epsilon$, added to the root.
        momentum: momentum of the scaled gradients, before the learning rate.
        nesterov: Nesterov's form of that momentum.
        centered: subtract the square of the moving mean under the root.
        weight_decay: L2 regularisation, added to the gradient.
        mask: which parameters decay.

    Examples:
        >>> tx = rmsprop(0.1)
        >>> grads = {"w": torch.tensor([0.5])}
        >>> tx.update(grads, tx.init(grads))[0]
        {'w': tensor([-1.0000])}

    Reference: Tieleman and Hinton, 2012; `torch.optim.RMSprop`.
    """
    scaling = (scale_by_stddev if centered else scale_by_rms)(decay, eps)
    moving = [] if is_zero(momentum) else [trace(momentum, nesterov=nesterov)]
    l2 = [] if is_zero(weight_decay) else [add_decayed_weights(weight_decay, mask)]
    return chain(*l2, scaling, *moving, scale_by_learning_rate(learning_rate), name="rmsprop")


@transformation
class ScaleByRss(Rule):
    scope = "element"
    memory: ClassVar[tuple[str, ...]] = ("sum_of_squares",)
    initial_accumulator_value: float = 0.0
    eps: Scalar = 1e-10

    def initial(self, name: str, param: Tensor) -> Tensor:
        return torch.full_like(param, self.initial_accumulator_value)

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        total = fx.addcmul(memory["sum_of_squares"], gs, gs)
        return fx.div(gs, _root(total, self.eps, False)), {"sum_of_squares": total}


@checked(OptimError)
def scale_by_rss(
    initial_accumulator_value: NonNegative[float] = 0.0, eps: NonNegative[Scalar] = 1e-10
) -> GradientTransformation:
    r"""Divide by the root of the sum of all squares so far: $g / (\sqrt{\sum g^2} + \epsilon)$.

    Examples:
        >>> tx = scale_by_rss()
        >>> tx.update({"w": torch.tensor([3.0])}, tx.init({"w": torch.zeros(1)}))[0]
        {'w': tensor([1.])}

    Reference: `optax.scale_by_rss`, which has `eps` under the root.
    """
    return ScaleByRss(initial_accumulator_value, eps)


@checked(OptimError)
def adagrad(
    learning_rate: NonNegative[ScalarOrSchedule],
    initial_accumulator_value: NonNegative[float] = 0.0,
    eps: NonNegative[Scalar] = 1e-10,
    *,
    weight_decay: NonNegative[ScalarOrSchedule] = 0.0,
    mask: tree.Filter | None = None,
) -> GradientTransformation:
    r"""Adagrad: $s \leftarrow s + g^2$, $u = -\eta \, g / (\sqrt{s} + \epsilon)$.

    Args:
        learning_rate: $\eta$; torch's `lr_decay` corresponds to a schedule.
        initial_accumulator_value: the initial $s$.
        eps: $\epsilon$, added to the root.
        weight_decay: L2 regularisation, added to the gradient.
        mask: which parameters decay.

    Examples:
        >>> tx = adagrad(0.1)
        >>> grads = {"w": torch.tensor([0.5])}
        >>> tx.update(grads, tx.init(grads))[0]
        {'w': tensor([-0.1000])}

    Reference: Duchi et al., 2011; `torch.optim.Adagrad`.
    """
    l2 = [] if is_zero(weight_decay) else [add_decayed_weights(weight_decay, mask)]
    rule = scale_by_rss(initial_accumulator_value, eps)
    return chain(*l2, rule, scale_by_learning_rate(learning_rate), name="adagrad")


@transformation
class ScaleByAdadelta(Rule):
    scope = "element"
    memory: ClassVar[tuple[str, ...]] = ("square_avg", "acc_delta")
    rho: Scalar = 0.9
    eps: Scalar = 1e-6

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        squares = fx.average_of_squares(memory["square_avg"], gs, self.rho)
        std = fx.sqrt(fx.add(squares, self.eps), reuse=True)
        deltas = fx.sqrt(fx.add(memory["acc_delta"], self.eps), reuse=True)
        deltas = fx.mul(fx.div(deltas, std, reuse=True), gs, reuse=True)
        moved = fx.average_of_squares(memory["acc_delta"], deltas, self.rho)
        return deltas, {"square_avg": squares, "acc_delta": moved}


@checked(OptimError)
def scale_by_adadelta(rho: Decay[Scalar] = 0.9, eps: NonNegative[Scalar] = 1e-6) -> GradientTransformation:
    r"""Adadelta's direction: $g \sqrt{d + \epsilon} / \sqrt{v + \epsilon}$ with $d$ the moving average of squared
    steps.

    Examples:
        >>> tx = scale_by_adadelta(eps=1.0)
        >>> tx.update({"w": torch.tensor([0.0])}, tx.init({"w": torch.zeros(1)}))[0]
        {'w': tensor([0.])}

    Reference: `optax.scale_by_adadelta`.
    """
    return ScaleByAdadelta(rho, eps)


@checked(OptimError)
def adadelta(
    learning_rate: NonNegative[ScalarOrSchedule] = 1.0,
    rho: Decay[Scalar] = 0.9,
    eps: NonNegative[Scalar] = 1e-6,
    weight_decay: NonNegative[ScalarOrSchedule] = 0.0,
    mask: tree.Filter | None = None,
) -> GradientTransformation:
    r"""Adadelta: steps in the unit of the parameters, from averages of squared gradients and of squared steps.

    Args:
        learning_rate: factor of the step; 1 in the paper.
        rho: decay of both averages.
        eps: added under both roots.
        weight_decay: L2 regularisation, added to the gradient.
        mask: which parameters decay.

    Examples:
        >>> tx = adadelta(eps=1.0)
        >>> grads = {"w": torch.tensor([0.0])}
        >>> tx.update(grads, tx.init(grads))[0]
        {'w': tensor([-0.])}

    Reference: Zeiler, 2012 <https://arxiv.org/abs/1212.5701>; `torch.optim.Adadelta`.
    """
    l2 = [] if is_zero(weight_decay) else [add_decayed_weights(weight_decay, mask)]
    return chain(*l2, scale_by_adadelta(rho, eps), scale_by_learning_rate(learning_rate), name="adadelta")


def _root(xs: list[Tensor], eps: Scalar, inside: bool) -> list[Tensor]:
    if inside:
        return fx.sqrt(fx.add(xs, eps), reuse=True)
    return fx.add(fx.sqrt(xs), eps, reuse=True)
