"""Donation without compilation: an eager step that consumes the state it is called with.

Owns `donate`. The step marks its last use of the state (`last_use=` of `apply_gradients`); nothing is written before
that, so a call that fails earlier leaves the state as it was.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable
from typing import Any

import torch

from purestep import _torch, transforms, tree
from purestep.arguments import checked
from purestep.donation import consume, donating, lies_in, memory_of, nodes, unaliased
from purestep.errors import ConfigError, StepError, explain
from purestep.optim.kernels.sliced import owned, worth_reusing
from purestep.sharding import placement
from purestep.sharding.plan import Plan
from purestep.state import TrainState
from purestep.step_protocol import AnyStep, StepFacts, StepFn, bare, facts_of, name_of, resliced, signature_of


class Donating(AnyStep):
    """A step that consumes its state. Made by `donate`; call it like the step.

    Attributes:
        step: the step.
        donate: True.
    """

    donate = True

    def __init__(self, step: StepFn) -> None:
        self.step = step
        self.__name__ = name_of(step)
        self.__doc__ = step.__doc__
        self.__signature__ = signature_of(step)

    def __repr__(self) -> str:
        return f"donate({self.step!r})"

    @property
    def facts(self) -> StepFacts:
        """Facts of the step, with `donates` set."""
        return dataclasses.replace(facts_of(self.step), donate=True)

    def bare(self, microbatches: int | None = None) -> StepFn:
        return bare(self.step, microbatches)

    def with_microbatches(self, count: int) -> AnyStep:
        return Donating(resliced(self.step, count))

    def under(self, plan: Plan) -> StepFn:
        return self

    def identity(self) -> StepFn:
        """Return the step itself: a snapshot records that, because both have the same bits."""
        return self.step

    def __call__(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        if transforms.active() or _torch.dispatch_modes() > 0:
            # Inside a transform or a trace nothing is written in place.
            return self.step(state, *args, **kwargs)
        own, memory = _without_aliases(state)
        with donating(_states(own), memory) as donation:
            try:
                returned = self.step(own, *args, **kwargs)
            except BaseException:
                if donation.written:
                    consume(state, f"{self.__name__}, which failed while it wrote over it")
                raise
        new, *others = returned if isinstance(returned, tuple) else (returned,)
        if donation.written:
            self._check_apart(others, memory)
        # A step that skipped the update may return the very state it was called with.
        consume(state, self.__name__, kept=nodes(new))
        return returned

    def _check_apart(self, others: list[Any], memory: frozenset[int]) -> None:
        """Refuse a tensor that the step returned besides the state if it shares memory with the overwritten state."""
        if not memory or not any(lies_in(leaf, memory) for leaf in tree.leaves(others)):
            return
        for path, leaf in zip(tree.paths(others), tree.leaves(others), strict=True):
            if lies_in(leaf, memory):
                raise StepError(
                    explain(
                        "what a donating step returns besides the state lies in the memory of the old state",
                        where=f"{self.__name__} returned {tree.describe(leaf)} at {path}",
                        why="it was written over with the new state, so it has not the value it was given any more",
                        instead="return state.apply_gradients(...), {'w': w.clone()}   # cloned before the update",
                    )
                )


@checked(ConfigError)
def donate(step: Callable[..., Any]) -> Any:
    """Make a step consume the state it is called with, without compiling it.

    Parameters and optimizer state are updated in place, unless all parameters are small (below some 32,000 elements),
    where an update in place would save nothing. So memory holds one state instead of two, and the time to fill fresh
    memory is saved; the bits are those of the step itself. Using a consumed state again raises DonatedStateError.
    `fit(..., donate=True)` does this for states that the loop alone owns.

    Args:
        step: a step of `make_step`, or one written by hand, `(state, batch) -> (state, metrics)`. A hand-written one
            writes in place where it calls `state.apply_gradients(..., last_use=True)`, and nowhere else.

    Returns:
        A step with `donate=True` and the original as `step`. A step that donates already is returned as it is.

    Raises:
        ConfigError: the step is compiled without donation.
        StepError: when called: a tensor that the step returned besides the state shares memory with the old state.

    Examples:
        >>> import torch
        >>> import purestep as ps
        >>> tx = ps.optim.adamw(1e-3)
        >>> step = donate(ps.make_step(lambda net, batch: net(batch).square().mean(), tx))
        >>> state = ps.init(lambda: torch.nn.Linear(3, 1), tx)
        >>> new, metrics = step(state, torch.ones(2, 3))
        >>> int(new.step), repr(state)
        (1, '<TrainState, consumed by Step>')
    """
    facts = facts_of(step)
    if facts.donate:
        return step
    if facts.backend is not None:
        raise ConfigError(
            explain(
                "a compiled step is made a donating one when it is compiled",
                where=repr(step),
                instead="step = ps.jit(ps.make_step(loss_fn, tx), donate=True)",
            )
        )
    return Donating(step)


def _without_aliases(state: Any) -> tuple[Any, frozenset[int]]:
    """Return a state whose tensors share no memory with each other, and the memory that an update overwrites."""
    if not worth_reusing(placement.part_of(p) for found in _states(state) for p in found.params.values()):
        return state, frozenset()
    leaves, structure = tree.flatten(state)
    local = _parts(leaves)
    apart = unaliased(local, len(local))
    if not all(map(operator.is_, local, apart)):
        state = placement.rewrap(tree.unflatten(structure, apart), state)
    written: list[Any] = []
    for found in _states(state):
        written += [*tree.leaves(found.params), *tree.leaves(found.opt_state)]
    return state, memory_of(owned(_parts(written)))


def _parts(leaves: list[Any]) -> list[Any]:
    """Return the local parts of leaves; in nearly every call none is split."""
    return leaves if set(map(type, leaves)) <= {torch.Tensor} else [placement.part_of(leaf) for leaf in leaves]


def _states(value: object) -> list[TrainState]:
    """Return the train states in a value: only their memory is overwritten."""
    if isinstance(value, TrainState):  # nearly always: at every call
        return [value]
    return [state for _, state in tree.find(value, TrainState)]
