"""Several trainings in one step: `stack` makes one state of many, `ensemble` a step of it, `unstack` parts it again.

The step is mapped over the states by `torch.vmap`; `tune` runs sweeps by the same step. Metrics of each member have
names of their own, so that the loop, the loggers and callbacks treat them like any others.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import checked
from purestep.errors import ConfigError, TreeError, explain
from purestep.metrics import Metric
from purestep.sharding.plan import Plan
from purestep.step_protocol import AnyStep, StepFacts, StepFn, bare, facts_of, name_of, resliced


@checked(TreeError)
def stack(states: Sequence[Any]) -> Any:
    """Stack states, or any trees of tensors, along a new first dim: the state of an ensemble.

    Args:
        states: of one structure, with equal shapes and dtypes: the same model and optimizer, with other values.

    Raises:
        TreeError: there is none, or one has another structure, shape or dtype.

    Examples:
        >>> stack([{"w": torch.zeros(3)}, {"w": torch.ones(3)}])["w"].shape
        torch.Size([2, 3])
    """
    if not states:
        raise TreeError(explain("an ensemble has at least one member", where="states=[]"))

    names = iter(tree.names(states[0]))

    def stacked(*leaves: Any) -> Tensor:
        path, first = next(names), leaves[0]
        for number, leaf in enumerate(leaves):
            if not isinstance(leaf, Tensor) or tree.describe(leaf) != tree.describe(first):
                raise TreeError(
                    explain(
                        "the states of an ensemble have other shapes or dtypes",
                        where=f"{path}: {tree.describe(first)} in states[0], {tree.describe(leaf)} in states[{number}]",
                        why="they become one tensor with a new first dim",
                    )
                )
        return torch.stack(leaves)

    return tree.map(stacked, states[0], *states[1:])


@checked(TreeError, failed=True)
def unstack(stacked: Any) -> list[Any]:
    """Return the members of a stacked state, as views of it.

    Raises:
        TreeError: a leaf has no dim, or they differ in the length of the first one.

    Examples:
        >>> [int(one["w"]) for one in unstack({"w": torch.arange(3)})]
        [0, 1, 2]
    """
    leaves = tree.leaves(stacked)
    sizes = {leaf.shape[0] if isinstance(leaf, Tensor) and leaf.ndim else None for leaf in leaves}
    if len(sizes) != 1 or None in sizes:
        named = zip(tree.names(stacked), leaves, strict=True)
        raise TreeError(
            explain(
                "this is no stacked state",
                where=", ".join(f"{name}: {tree.describe(leaf)}" for name, leaf in named)[:300],
                why="each tensor of it has the members as its first dim",
                instead="ps.stack([ps.init(make_model, tx, seed=seed) for seed in range(4)])",
            )
        )
    structure = tree.structure(stacked)
    parts = [leaf.unbind(0) for leaf in leaves]
    return [tree.unflatten(structure, member) for member in zip(*parts, strict=True)]


@dataclasses.dataclass(frozen=True)
class Ensemble(AnyStep):
    """A step over stacked states. Made by `ensemble`.

    Attributes:
        step: that of one member.
        own_batches: whether each member has a batch of its own, stacked like the states.
    """

    step: StepFn
    own_batches: bool = False

    def __call__(self, states: Any, batch: Any) -> Any:
        if facts_of(self.step).evaluates:
            return by_member(self.mapped(states, batch))
        states, values = self.mapped(states, batch)
        return states, by_member(values)

    def mapped(self, states: Any, batch: Any) -> Any:
        """Return what the step returns, with the members as the first dim of every tensor, metrics included."""
        return torch.vmap(self.step, in_dims=(0, 0 if self.own_batches else None))(states, batch)

    @property
    def facts(self) -> StepFacts:
        """Those of the step, which is not compiled inside of the map; its tx and gradients are those of one member."""
        return dataclasses.replace(facts_of(self.step), tx=None, gradients=None, backend=None, warmup=0, ready=None)

    def bare(self, microbatches: int | None = None) -> StepFn:
        return Ensemble(bare(self.step, microbatches), self.own_batches)

    def with_microbatches(self, count: int) -> AnyStep:
        return Ensemble(resliced(self.step, count), self.own_batches)

    def under(self, plan: Plan) -> StepFn:
        raise _planned(self.step)

    @property
    def __name__(self) -> str:
        return f"ensemble of {name_of(self.step)}"

    def identity(self) -> dict[str, Any]:
        """Return what a snapshot of a run records of it."""
        return {"ensemble_of": self.step, "own_batches": self.own_batches}


def by_member(values: Mapping[str, Any]) -> dict[str, Any]:
    """Name the metrics of each member: `loss/0`, `loss/1`, ...; and `loss` for all of them together.

    Args:
        values: metrics with the members as the first dim of their tensors.
    """
    found: dict[str, Any] = {}
    for name, value in values.items():
        members = unstack(value)
        if isinstance(value, Metric):
            found[name] = functools.reduce(lambda one, other: one.merge(other), members)
        found |= {f"{name}/{number}": member for number, member in enumerate(members)}
    return found


@checked(ConfigError)
def ensemble(step: Callable[..., Any], *, own_batches: bool = False) -> Ensemble:
    """Make a step that trains several states at once, by `torch.vmap`: an ensemble, or a sweep.

    `fit` takes it like any step: the stacked state is saved, resumed and logged as one run. The metrics of the members
    are `loss/0`, `loss/1`, ..., and `loss` is that of all of them together. Each member draws from its own key, and has
    the numbers of its training alone up to rounding, not its bits: batched kernels add up in another order.

    Args:
        step: of `make_step`, or any pure function `(state, batch) -> (state, metrics)` that `torch.vmap` takes; a step
            of `make_eval` evaluates all members. To compile it: `ps.jit(ps.ensemble(step))`.
        own_batches: whether the batch is stacked, too, with one for each member. By default all see the same one.

    Raises:
        ConfigError: the step has a plan, or consumes its state.

    Examples:
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        >>> states = ps.stack([ps.init(lambda: torch.nn.Linear(2, 1), tx, seed=seed) for seed in range(3)])
        >>> data = ps.data.batches({"x": torch.ones(8, 2)}, 4)
        >>> result = ps.fit(ps.ensemble(step), states, data, until=ps.steps(2))
        >>> sorted(result.metrics)
        ['train/loss/0_epoch', 'train/loss/1_epoch', 'train/loss/2_epoch', 'train/loss_epoch']
        >>> len(ps.unstack(result.state))
        3

    Reference: `torch.vmap`, and "Model ensembling" of torch.func.
    """
    facts = facts_of(step)
    if facts.plan is not None:
        raise _planned(step)
    if facts.donate:
        raise ConfigError(
            explain(
                "a step that consumes its state is not mapped over several",
                where=name_of(step),
                instead="ps.jit(ps.ensemble(step), donate=True)   # of the step as it was before",
            )
        )
    return Ensemble(step, own_batches)


def _planned(step: StepFn) -> ConfigError:
    return ConfigError(
        explain(
            "a step of a plan is not mapped over several states",
            where=name_of(step),
            why="torch.func does not transform exchanges between processes",
            instead="ps.ensemble(ps.make_step(loss_fn, tx))   # without plan=",
        )
    )
