"""The contract of a step, checked once on what it really returned."""

from __future__ import annotations

from typing import Any

from torch import Tensor

from purestep import tree
from purestep.errors import StepError, explain


def check_returned(step: Any, state: Any, returned: Any) -> None:
    """Refuse what a step returned unless it is a state like the one it was given, and a dict of metrics.

    Raises:
        StepError: with the first path that differs, and what to return instead.
    """
    name = getattr(step, "__name__", type(step).__name__)
    if not isinstance(returned, tuple) or len(returned) != 2:
        raise StepError(
            explain(
                "a step returns (state, metrics)",
                where=f"{name} returned {type(returned).__name__}",
                instead="return state.apply_gradients(tx, grads), {'loss': loss}",
            )
        )
    if isinstance(state, tree.Consumed):
        return  # a donating step compared them when it was traced
    new = returned[0]
    if tree.structure(new) != tree.structure(state):
        raise StepError(
            explain(
                "a step returns a state of the structure it was given",
                where=f"{name}: {_where(state, new)}",
                why="otherwise it could not be called again, compiled once, or resumed",
                instead="return state.replace(...), which keeps every node",
            )
        )
    for path, old, value in zip(tree.paths(state, "state"), tree.leaves(state), tree.leaves(new), strict=True):
        if isinstance(old, Tensor) and not (
            isinstance(value, Tensor) and value.shape == old.shape and value.dtype == old.dtype
        ):
            raise StepError(
                explain(
                    "a step returns leaves of the shape and dtype it was given",
                    where=f"{name}: {path} was {tree.describe(old)} and came back as {tree.describe(value)}",
                    why="otherwise it could not be called again, compiled once, or resumed",
                )
            )


def _where(state: Any, new: Any) -> str:
    before, after = tree.paths(state, "state"), tree.paths(new, "state")
    gone, added = [p for p in before if p not in after], [p for p in after if p not in before]
    if gone or added:
        return "; ".join(f"{label} {', '.join(ps[:4])}" for label, ps in (("missing", gone), ("new", added)) if ps)
    return f"other node types: {type(state).__name__} came back as {type(new).__name__}"
