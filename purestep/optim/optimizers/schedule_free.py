"""Schedule-free training: an average of the iterates replaces a falling learning rate."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Decay, NonNegative, Whole, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import (
    ElementWrapper,
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
    wide,
)
from purestep.optim.chain import chain
from purestep.optim.kernels import foreach as fx
from purestep.optim.optimizers.adam import scale_by_adam
from purestep.optim.scale import checked_rate, scale_by_learning_rate
from purestep.optim.schedules.warmup import warmup_constant_schedule
from purestep.optim.state_access import nodes
from purestep.optim.weight_decay import add_decayed_weights


@tree.pytree
class ScheduleFreeState:
    """`z`: the iterate of the inner optimizer; `weight_sum`, `max_lr`: for the weights of the average; `b1`: the
    interpolation between both.
    """

    b1: Tensor
    weight_sum: Tensor
    max_lr: Tensor
    z: Any
    inner: Any


@transformation
class ScheduleFree(ElementWrapper):
    inner: GradientTransformation
    learning_rate: ScalarOrSchedule
    b1: float = 0.9
    weight_lr_power: float = 2.0

    def init(self, params: Any) -> ScheduleFreeState:
        zero = torch.zeros_like(wide(new_count(params)))
        z = tree.map(torch.clone, params)
        return ScheduleFreeState(zero + self.b1, zero, zero.clone(), z, self.inner.init(params))

    def update(
        self, updates: Any, state: Any, params: Any = None, *, step: StepNumber | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        ys, treedef = tree.flatten(need_params(params, self.name))
        before = same_leaves(state.z, treedef, params, "iterates z")
        rate = value_at(self.learning_rate, step)
        highest = torch.maximum(state.max_lr, scalar_like(rate, state.max_lr))
        weight = highest**self.weight_lr_power
        total = state.weight_sum + weight
        # At the start of a warm-up from 0 the sum of weights is 0: the weight is then 0, not 0/0.
        share = torch.where(
            total > 0, weight / torch.where(total > 0, total, torch.ones_like(total)), torch.zeros_like(total)
        )
        proposed, inner = self.inner.update(updates, state.inner, params, step=step, **extra)
        after = fx.add(before, same_leaves(proposed, treedef, params, "updates"))
        average = fx.div(fx.sub(ys, fx.mul(before, 1.0 - self.b1)), self.b1, reuse=True)
        average = fx.add(fx.mul(average, 1 - share, reuse=True), fx.mul(after, share), reuse=True)
        target = fx.add(fx.mul(average, self.b1), fx.mul(after, 1.0 - self.b1), reuse=True)
        following = ScheduleFreeState(state.b1, total, highest, tree.unflatten(treedef, after), inner)
        return tree.unflatten(treedef, fx.sub(target, ys, reuse=True)), following


@checked(OptimError)
def schedule_free(
    inner: GradientTransformation,
    learning_rate: NonNegative[ScalarOrSchedule],
    b1: Decay[float] = 0.9,
    weight_lr_power: NonNegative[float] = 2.0,
) -> GradientTransformation:
    r"""Turn an optimizer without momentum into a schedule-free one.

    Gradients are taken at $y = \beta_1 x + (1 - \beta_1) z$, the inner optimizer moves $z$, and $x$ is the weighted
    average of the $z$. The parameters of the train state are $y$; to evaluate and to publish use $x = $
    `schedule_free_eval_params(opt_state, params)`.

    Args:
        inner: the optimizer of $z$; it must not have momentum.
        learning_rate: the learning rate of `inner`, constant or with a warm-up: iterates are weighted by a power of it.
        b1: $\beta_1$, which replaces momentum; in (0, 1].
        weight_lr_power: the power of the learning rate in the weights.

    Returns:
        A transformation with the state `ScheduleFreeState(b1, weight_sum, max_lr, z, inner)`.

    Raises:
        OptimError: `b1` is not in (0, 1].

    Examples:
        >>> from purestep.optim import sgd
        >>> tx = schedule_free(sgd(0.5), 0.5)
        >>> params = {"w": torch.ones(1)}
        >>> updates, state = tx.update({"w": torch.ones(1)}, tx.init(params), params)
        >>> updates, state.z
        ({'w': tensor([-0.5000])}, {'w': tensor([0.5000])})

    Reference: Defazio et al., 2024 <https://arxiv.org/abs/2405.15682>; `optax.contrib.schedule_free`.
    """
    if not 0.0 < b1 <= 1.0:
        raise OptimError(explain("b1 of a schedule-free optimizer must be in (0, 1]", where=f"{b1=}", instead="b1=0.9"))
    return ScheduleFree(inner, checked_rate(learning_rate), b1, weight_lr_power)


@checked(OptimError)
def schedule_free_adamw(
    learning_rate: NonNegative[float] = 2.5e-3,
    warmup_steps: Whole = 0,
    b1: Decay[float] = 0.9,
    b2: Decay[Scalar] = 0.999,
    eps: NonNegative[Scalar] = 1e-8,
    weight_decay: NonNegative[ScalarOrSchedule] = 0.0,
    weight_lr_power: NonNegative[float] = 2.0,
    *,
    mask: tree.Filter | None = None,
) -> GradientTransformation:
    """AdamW with a warm-up, and an average of the iterates in place of a decaying schedule; see `schedule_free`.

    Args:
        learning_rate: usually 1 to 10 times that of AdamW with a schedule.
        warmup_steps: length of a straight line from 0.
        b1: see `schedule_free`.
        b2, eps, weight_decay, mask: as in `adamw`.
        weight_lr_power: see `schedule_free`.

    Examples:
        >>> tx = schedule_free_adamw(0.1)
        >>> params = {"w": torch.ones(1)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> schedule_free_eval_params(state, {"w": params["w"] + updates["w"]})
        {'w': tensor([0.9000])}

    Reference: `optax.contrib.schedule_free_adamw`.
    """
    rate: ScalarOrSchedule = learning_rate
    if warmup_steps > 0:
        rate = warmup_constant_schedule(0.0, learning_rate, warmup_steps=warmup_steps)
    scaling = scale_by_adam(0.0, b2, eps=eps)
    inner = chain(scaling, add_decayed_weights(weight_decay, mask), scale_by_learning_rate(rate), name="adamw")
    return schedule_free(inner, rate, b1=b1, weight_lr_power=weight_lr_power)


def schedule_free_eval_params(opt_state: Any, params: Any) -> Any:
    r"""Return the averaged parameters $x = (y - (1 - \beta_1) z) / \beta_1$, to evaluate and to publish.

    Args:
        opt_state: a state that holds a `ScheduleFreeState`, at any depth.
        params: the parameters of the train state.

    Raises:
        OptimError: there is not exactly one such state.
    """
    found = [node for _, node in nodes(opt_state) if isinstance(node, ScheduleFreeState)]
    if len(found) != 1:
        raise OptimError(
            explain(
                f"{len(found)} schedule-free states in the optimizer state, where one was expected",
                instead="schedule_free_eval_params(state.opt_state, state.params)   # tx = schedule_free_adamw(...)",
            )
        )
    state = found[0]
    ys, treedef = tree.flatten(params)
    zs = same_leaves(state.z, treedef, params, "iterates z")
    return tree.unflatten(treedef, fx.mul(fx.sub(ys, fx.mul(zs, 1 - state.b1)), 1 / state.b1, reuse=True))
