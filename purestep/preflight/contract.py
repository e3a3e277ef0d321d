"""The contract of a step, checked once on what it really returned."""

from __future__ import annotations

from torch import Tensor

from purestep import tree
from purestep.errors import StepError, explain
from purestep.step_protocol import StepFn, name_of


class Contract:
    """What a step has to return, noted from the state it is given: a donating step leaves nothing to compare with.

    Args:
        step: for the name in messages.
        state: the state it is given.
    """

    def __init__(self, step: StepFn, state: object) -> None:
        self.name = name_of(step)
        self.kind = type(state).__name__
        self.structure = tree.structure(state)
        self.paths = tree.paths(state, "state")
        self.leaves = [(tree.describe(leaf) if isinstance(leaf, Tensor) else None) for leaf in tree.leaves(state)]

    def check(self, returned: object) -> None:
        """Refuse what the step returned unless it is a state like the one it was given, and a dict of metrics.

        Raises:
            StepError: with the first path that differs, and what to return instead.
        """
        if not isinstance(returned, tuple) or len(returned) != 2:
            raise StepError(
                explain(
                    "a step returns (state, metrics)",
                    where=f"{self.name} returned {type(returned).__name__}",
                    instead="return state.apply_gradients(tx, grads), {'loss': loss}",
                )
            )
        new = returned[0]
        if tree.structure(new) != self.structure:
            raise StepError(
                explain(
                    "a step returns a state of the structure it was given",
                    where=f"{self.name}: {self._difference(new)}",
                    why="otherwise it could not be called again, compiled once, or resumed",
                    instead="return state.replace(...), which keeps every node",
                )
            )
        for path, old, value in zip(self.paths, self.leaves, tree.leaves(new), strict=True):
            if old is not None and (not isinstance(value, Tensor) or tree.describe(value) != old):
                raise StepError(
                    explain(
                        "a step returns leaves of the shape and dtype it was given",
                        where=f"{self.name}: {path} was {old} and came back as {tree.describe(value)}",
                        why="otherwise it could not be called again, compiled once, or resumed",
                        instead="new.to(old.dtype), new.reshape(old.shape)",
                    )
                )

    def _difference(self, new: object) -> str:
        after = tree.paths(new, "state")
        gone, added = [p for p in self.paths if p not in after], [p for p in after if p not in self.paths]
        if gone or added:
            return "; ".join(f"{word} {', '.join(ps[:4])}" for word, ps in (("missing", gone), ("new", added)) if ps)
        return f"other node types: {self.kind} came back as {type(new).__name__}"
