"""Optimizers that follow signs: lion, rprop, sign_sgd."""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Decay, Fraction, NonNegative, Positive, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import GradientTransformation, Scalar, ScalarOrSchedule, scalar_like, transformation
from purestep.optim.chain import chain
from purestep.optim.kernels import foreach as fx
from purestep.optim.optimizers.adam import check_betas
from purestep.optim.rule import Memory, Rule
from purestep.optim.scale import scale, scale_by_learning_rate
from purestep.optim.weight_decay import add_decayed_weights


@transformation
class ScaleBySign(GradientTransformation):
    scope = "element"

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        xs, treedef = tree.flatten(updates)
        return tree.unflatten(treedef, fx.sign(xs)), state


@checked(OptimError)
def scale_by_sign() -> GradientTransformation:
    """Replace each element by its sign; elements that are not finite become NaN.

    Examples:
        >>> scale_by_sign().update({"w": torch.tensor([-3.0, 0.0])}, None)[0]
        {'w': tensor([-1.,  0.])}

    Reference: `optax.scale_by_sign`.
    """
    return ScaleBySign()


@checked(OptimError)
def sign_sgd(learning_rate: NonNegative[ScalarOrSchedule]) -> GradientTransformation:
    r"""Signs of gradients: $u = -\eta \, \mathrm{sign}(g)$.

    Examples:
        >>> tx = sign_sgd(0.1)
        >>> tx.update({"w": torch.tensor([-3.0, 2.0])}, tx.init({"w": torch.zeros(2)}))[0]
        {'w': tensor([ 0.1000, -0.1000])}

    Reference: Bernstein et al., 2018 <https://arxiv.org/abs/1802.04434>; `optax.sign_sgd`.
    """
    return chain(scale_by_sign(), scale_by_learning_rate(learning_rate), name="sign_sgd")


@transformation
class ScaleByLion(Rule):
    scope = "element"
    memory: ClassVar[tuple[str, ...]] = ("mu",)
    b1: Scalar = 0.9
    b2: Scalar = 0.99

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        us = fx.sign(fx.lerp(memory["mu"], gs, 1 - self.b1))
        return us, {"mu": fx.lerp(memory["mu"], gs, 1 - self.b2)}


@checked(OptimError)
def scale_by_lion(b1: Decay[Scalar] = 0.9, b2: Decay[Scalar] = 0.99) -> GradientTransformation:
    r"""Lion's direction $\mathrm{sign}(\beta_1 m + (1 - \beta_1) g)$.

    Examples:
        >>> tx = scale_by_lion()
        >>> tx.update({"w": torch.tensor([-3.0, 0.5])}, tx.init({"w": torch.zeros(2)}))[0]
        {'w': tensor([-1.,  1.])}

    Reference: `optax.scale_by_lion`.
    """
    check_betas("scale_by_lion", b1=b1, b2=b2)
    return ScaleByLion(b1, b2)


@checked(OptimError)
def lion(
    learning_rate: NonNegative[ScalarOrSchedule],
    b1: Decay[Scalar] = 0.9,
    b2: Decay[Scalar] = 0.99,
    *,
    weight_decay: NonNegative[ScalarOrSchedule] = 1e-3,
    mask: tree.Filter | None = None,
) -> GradientTransformation:
    r"""Lion: signs of an interpolated momentum, with decoupled weight decay.

    $u = -\eta (\mathrm{sign}(\beta_1 m + (1 - \beta_1) g) + \lambda w)$, $m \leftarrow \beta_2 m + (1 - \beta_2) g$.

    Args:
        learning_rate: $\eta$, usually 3 to 10 times smaller than AdamW's.
        b1: weight of the momentum in the step.
        b2: decay of the momentum.
        weight_decay: $\lambda$, multiplied by the learning rate.
        mask: which parameters decay.

    Examples:
        >>> tx = lion(0.1, weight_decay=0.0)
        >>> grads = {"w": torch.tensor([-3.0, 0.5])}
        >>> tx.update(grads, tx.init(grads), grads)[0]
        {'w': tensor([ 0.1000, -0.1000])}

    Reference: Chen et al., 2023 <https://arxiv.org/abs/2302.06675>; `optax.lion`.
    """
    return chain(
        scale_by_lion(b1, b2),
        add_decayed_weights(weight_decay, mask),
        scale_by_learning_rate(learning_rate),
        name="lion",
    )


@transformation
class ScaleByRprop(Rule):
    scope = "element"
    memory: ClassVar[tuple[str, ...]] = ("prev", "step_size")
    learning_rate: Scalar
    eta_minus: float = 0.5
    eta_plus: float = 1.2
    min_step_size: float = 1e-6
    max_step_size: float = 50.0

    def initial(self, name: str, param: Tensor) -> Tensor:
        start = torch.zeros_like(param)
        return start if name == "prev" else start + scalar_like(self.learning_rate, param)

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        agreement = fx.mul(gs, memory["prev"])
        sizes = fx.elements(self._size, agreement, memory["step_size"])
        kept = fx.elements(lambda a, g: torch.where(a < 0, torch.zeros_like(g), g), agreement, gs)
        return fx.mul(fx.sign(kept), sizes, reuse=True), {"prev": kept, "step_size": sizes}

    def _size(self, agreement: Tensor, size: Tensor) -> Tensor:
        shrunk = torch.where(agreement < 0, size * self.eta_minus, size)
        chosen = torch.where(agreement > 0, size * self.eta_plus, shrunk)
        return chosen.clamp(self.min_step_size, self.max_step_size)


@checked(OptimError)
def scale_by_rprop(
    learning_rate: NonNegative[Scalar],
    eta_minus: Fraction[float] = 0.5,
    eta_plus: Positive[float] = 1.2,
    min_step_size: NonNegative[float] = 1e-6,
    max_step_size: NonNegative[float] = 50.0,
) -> GradientTransformation:
    """Rprop's direction, uphill; see `rprop`.

    Examples:
        >>> tx = scale_by_rprop(0.1)
        >>> tx.update({"w": torch.tensor([-3.0, 0.5])}, tx.init({"w": torch.zeros(2)}))[0]
        {'w': tensor([-0.1000,  0.1000])}

    Reference: `optax.scale_by_rprop`.
    """
    if callable(learning_rate):
        raise OptimError(
            explain(
                "rprop takes no schedule as its learning rate",
                where=f"learning_rate={learning_rate!r}",
                why="it is only the initial step size of each weight, which then depends on the signs of gradients",
                instead="rprop(0.01)",
            )
        )
    return ScaleByRprop(learning_rate, eta_minus, eta_plus, min_step_size, max_step_size)


@checked(OptimError)
def rprop(
    learning_rate: NonNegative[Scalar],
    eta_minus: Fraction[float] = 0.5,
    eta_plus: Positive[float] = 1.2,
    min_step_size: NonNegative[float] = 1e-6,
    max_step_size: NonNegative[float] = 50.0,
) -> GradientTransformation:
    """Resilient backpropagation: each weight has its own step, which grows while the sign of its gradient stays the
    same.

    For full batches, because it uses the signs of gradients only.

    Args:
        learning_rate: the first step size of every weight.
        eta_minus: factor of the step when the sign changes; that update is skipped.
        eta_plus: factor of the step when the sign stays.
        min_step_size: smallest step.
        max_step_size: largest step.

    Raises:
        OptimError: the learning rate is a schedule.

    Examples:
        >>> tx = rprop(0.1)
        >>> grads = {"w": torch.tensor([-3.0, 0.5])}
        >>> tx.update(grads, tx.init(grads))[0]
        {'w': tensor([ 0.1000, -0.1000])}

    Reference: Riedmiller and Braun, 1993; `torch.optim.Rprop`.
    """
    rule = scale_by_rprop(
        learning_rate, eta_minus, eta_plus=eta_plus, min_step_size=min_step_size, max_step_size=max_step_size
    )
    return chain(rule, scale(-1.0), name="rprop")
