"""Averages of the parameters along the training: moving (EMA) or equal (SWA), kept in the optimizer state.

Owns `average_params` and `averaged`. The average is part of the state, so it is saved, resumed, jitted, donated and
compared like the rest of it, and training never sees it.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Count, Fraction, Whole, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import (
    ElementWrapper,
    GradientTransformation,
    ScalarOrSchedule,
    StepNumber,
    need_params,
    new_count,
    same_leaves,
    transformation,
    value_at,
)
from purestep.optim.kernels import foreach as fx
from purestep.optim.state_access import nodes


@tree.pytree
class AverageState:
    """`count`: number of updates; `average`: averages of the parameters, in float32 or wider; `inner`: inner state."""

    count: Tensor
    average: Any
    inner: Any


@transformation
class AverageParams(ElementWrapper):
    inner: GradientTransformation
    decay: ScalarOrSchedule | None = 0.999
    start: int = 0
    every: int = 1

    def init(self, params: Any) -> AverageState:
        return AverageState(new_count(params), _own(params), self.inner.init(params))

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        before = need_params(params, self.name, "it averages what they become")
        proposed, inner = self.inner.update(updates, state.inner, before, **extra)
        after = self.inner.apply(before, proposed, inner)
        return proposed, self._following(state, after, inner, extra.get("step"))

    def advance(self, updates: Any, state: Any, params: Any, *, reuse: bool = False, **extra: Any) -> tuple[Any, Any]:
        after, inner = self.inner.advance(updates, state.inner, params, reuse=reuse, **extra)
        return after, self._following(state, after, inner, extra.get("step"))

    def _following(self, state: Any, params: Any, inner: Any, step: StepNumber | None) -> AverageState:
        values, treedef = tree.flatten(params)
        old = same_leaves(state.average, treedef, params, "averaged parameters")
        new, applied = fx.cast(values, old), self.inner.applied(inner)
        count = state.count + 1
        since = torch.clamp_min(count - self.start, 0)
        moved = self._towards(old, new, since, step)
        # Until `start` the average equals the parameters.
        average = fx.select(since == 0, new, fx.select(since % self.every == 0, moved, old))
        if applied is not None:  # a skipped update leaves the parameters and the average unchanged
            count, average = torch.where(applied, count, state.count), fx.select(applied, average, old)
        return AverageState(count, tree.unflatten(treedef, average), inner)

    def _towards(self, old: list[Tensor], new: list[Tensor], since: Tensor, step: StepNumber | None) -> list[Tensor]:
        if self.decay is None:
            return fx.lerp(old, new, 1 / (torch.div(since, self.every, rounding_mode="floor") + 1))
        return fx.lerp(old, new, 1 - value_at(self.decay, step, "decay"))

    def apply(self, params: Any, updates: Any, state: Any) -> Any:
        return self.inner.apply(params, updates, state.inner)

    def _one_pass(self) -> bool:
        return self.inner._one_pass()


@checked(OptimError)
def average_params(
    inner: GradientTransformation,
    decay: Fraction[ScalarOrSchedule] | None = 0.999,
    *,
    start: Whole = 0,
    every: Count = 1,
) -> GradientTransformation:
    r"""Keep an average of the parameters beside the training: $a \leftarrow d a + (1 - d) p$ after each update.

    The training itself is that of `inner`, to the bit. `averaged(state)` gives the state with the averages as its
    parameters: to evaluate, to export, to publish.

    Args:
        inner: the transformation that trains. Wrap the whole chain, clipping included, because the average is taken of
            the parameters after `inner`.
        decay: $d$ of the moving average: a number, or a schedule of the step. None weighs all averaged parameters
            equally (stochastic weight averaging).
        start: number of updates before averaging begins; until then the average equals the parameters.
        every: number of updates between two averaged ones.

    Returns:
        A transformation with the state `AverageState(count, average, inner)`. Averages are kept in float32 or wider.
        A skipped update changes no average. Buffers, such as the statistics of BatchNorm, are not averaged.

    Raises:
        OptimError: `inner` is no transformation, or `start` or `every` is out of range.

    Examples:
        >>> from purestep import optim
        >>> tx = average_params(optim.sgd(1.0), decay=0.5)
        >>> params = {"w": torch.zeros(1)}
        >>> updates, state = tx.update({"w": torch.tensor([-4.0])}, tx.init(params), params)
        >>> tx.apply(params, updates, state), state.average
        ({'w': tensor([4.])}, {'w': tensor([2.])})

    Reference: Polyak and Juditsky, 1992; Izmailov et al., Averaging Weights Leads to Wider Optima, 2018;
    `torch.optim.swa_utils.AveragedModel`, whose first average is a copy of the parameters too.
    """
    return AverageParams(inner, decay, start, every)


def averaged(state: Any) -> Any:
    """Return a train state whose parameters are the averages that `average_params` keeps.

    Args:
        state: a train state. Its other fields stay, so it can be evaluated, exported, or trained on.

    Returns:
        The state with the averages, in the dtypes of its parameters.

    Raises:
        OptimError: the optimizer state keeps no average of these parameters, or several.

    Examples:
        >>> import purestep as ps
        >>> state = ps.init(torch.nn.Linear(2, 1), average_params(ps.optim.sgd(0.1)))
        >>> ps.tree.equal(averaged(state).params, state.params)
        True
    """
    found = [node.average for _, node in nodes(state.opt_state) if isinstance(node, AverageState)]
    fitting = [a for a in found if tree.structure(a) == tree.structure(state.params)]
    if len(fitting) != 1:
        raise OptimError(
            explain(
                f"the state keeps {len(fitting) or 'no'} averages of its parameters",
                where=f"opt_state: {type(state.opt_state).__qualname__}, with {len(found)} averages",
                why="an average is of all parameters, and there must be one" if found else None,
                instead="tx = ps.optim.average_params(tx, decay=0.999)   # around the whole transformation",
            )
        )
    return state.replace(params=tree.map(lambda a, p: a.to(p.dtype, copy=True), fitting[0], state.params))


def _own(params: Any) -> Any:
    """Return copies of the parameters, because a donated state must hold each tensor only once."""
    return tree.map(lambda p: p.detach().to(fx.accumulator(p.dtype), copy=True), params)
