"""Donation without compilation: an eager step that consumes the state it is given.

Owns `donate`. The step itself says when it has no more use for the state (`last_use=` of `apply_gradients`); until then
nothing is written, so a call that fails before leaves the state as it was.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from purestep import _torch, given, transforms, tree
from purestep.arguments import checked
from purestep.errors import ConfigError, StepError, explain
from purestep.jit import donation
from purestep.jit.call import Jit
from purestep.jit.pieces import JitStep
from purestep.optim.blocks import is_owned, worth_reusing
from purestep.sharding import place
from purestep.state import TrainState


class Donating:
    """A step that consumes its state. Made by `donate`; call it like the step.

    Attributes:
        donate: True.
    """

    donate = True

    def __init__(self, step: Callable[..., Any]) -> None:
        self.__wrapped__ = step
        self.__name__ = getattr(step, "__name__", type(step).__name__)
        self.__doc__ = step.__doc__

    def __repr__(self) -> str:
        return f"donate({self.__wrapped__!r})"

    def __call__(self, state: Any, *args: Any, **kwargs: Any) -> Any:
        if transforms.active() or _torch.dispatch_modes() > 0:
            # Inside a transform or a trace nothing is written in place.
            return self.__wrapped__(state, *args, **kwargs)
        own, places = _of_its_own(state)
        with given.giving(_states(own)) as call:
            try:
                returned = self.__wrapped__(own, *args, **kwargs)
            except BaseException:
                if call.taken:
                    _consume(state, f"{self.__name__}, which failed while it wrote over it", ())
                raise
        new, *others = returned if isinstance(returned, tuple) else (returned,)
        if call.taken:
            self._check_apart(others, places)
        _consume(state, self.__name__, _nodes(new))
        return returned

    def _check_apart(self, others: Any, places: frozenset[int]) -> None:
        """Refuse what the step returned besides the state where it shows the memory that was written over."""
        for path, leaf in zip(tree.paths(others), tree.leaves(others), strict=True) if places else ():
            if given.shares(leaf, places):
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
    """Make a step consume the state it is given, without compiling it.

    Parameters and optimizer state are updated in place, unless all parameters are small (below some 16,000 elements),
    when it would save nothing. So memory holds one state instead of two, and the time to fill fresh memory is saved;
    the bits are those of the step itself. Using a consumed state again raises DonatedStateError.
    `fit(..., donate=True)` does this for states that the loop alone owns.

    Args:
        step: a step of `make_step`, or one written by hand, `(state, batch) -> (state, metrics)`. A hand-written one
            writes in place where it calls `state.apply_gradients(..., last_use=True)`, and nowhere else.

    Returns:
        A step. Its `donate` is True, its `__wrapped__` the step. One that donates already is returned as it is.

    Raises:
        ConfigError: the step is compiled without donation.
        StepError: when called: what the step returned besides the state lies in memory that was written over.

    Example:
        >>> import purestep as ps
        >>> tx = ps.optim.adamw(1e-3)
        >>> step = donate(ps.make_step(lambda net, batch: net(batch).square().mean(), tx))
        >>> state = ps.init(lambda: torch.nn.Linear(3, 1), tx)
        >>> new, metrics = step(state, torch.ones(2, 3))
        >>> int(new.step), repr(state)
        (1, '<TrainState, consumed by Step>')
    """
    if getattr(step, "donate", False):
        return step
    if isinstance(step, (Jit, JitStep)):
        raise ConfigError(
            explain(
                "a compiled step is made a donating one when it is compiled",
                where=repr(step),
                instead="step = ps.jit(ps.make_step(loss_fn, tx), donate=True)",
            )
        )
    return Donating(step)


def _of_its_own(state: Any) -> tuple[Any, frozenset[int]]:
    """Return a state whose tensors share memory with nothing else in it, and where what is written over lies."""
    if not worth_reusing(place.part_of(p) for found in _states(state) for p in found.params.values()):
        return state, frozenset()
    leaves, structure = tree.flatten(state)
    parts = [place.part_of(leaf) for leaf in leaves]
    apart = donation.unaliased(parts, len(parts))
    if any(a is not b for a, b in zip(parts, apart, strict=True)):
        state = place.rewrap(tree.unflatten(structure, apart), state)
    own = [place.part_of(leaf) for found in _states(state) for leaf in tree.leaves((found.params, found.opt_state))]
    return state, given.memory(filter(is_owned, own))


def _states(value: Any) -> list[TrainState]:
    """Return the train states in a value, which alone are written over."""
    if isinstance(value, TrainState):
        return [value]
    if isinstance(value, dict):
        children: Any = value.values()
    elif isinstance(value, (list, tuple)):
        children = value
    elif tree.node_name(type(value)):
        children = [getattr(value, name) for name in tree.node_fields(type(value))[0]]
    else:
        return []
    return [state for child in children for state in _states(child)]


def _nodes(value: Any) -> list[Any]:
    """Return the outermost nodes of a value that can be marked as consumed."""
    if tree.node_name(type(value)):
        return [value]
    if isinstance(value, dict):
        return [node for child in value.values() for node in _nodes(child)]
    if isinstance(value, (list, tuple)):
        return [node for child in value for node in _nodes(child)]
    return []


def _consume(state: Any, by: str, kept: Any) -> None:
    """Make the nodes of a state unusable, but those that the step returned as they are."""
    for node in _nodes(state):
        if not any(node is other for other in kept):
            tree.consume(node, by)
