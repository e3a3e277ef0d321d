"""The bindings of a forward pass in its backward pass, where checkpoints call the module again.

A binding whose call drew nothing stays in place between the two: taking its tensors out and putting them back costs a
small step a tenth of its time. The others are entered again.
"""

from __future__ import annotations

from typing import Any

from purestep.functional.active import here
from purestep.functional.binding import Binding
from purestep.random.host_draws import Guard


class GradientScope:
    """Collects the bindings whose results are differentiated; `backward` makes them active in the backward pass."""

    def __enter__(self) -> GradientScope:
        self.collected: list[Binding] = []
        self.outer, here.scope = here.scope, self.collected
        return self

    def __exit__(self, *error: Any) -> None:
        here.scope = self.outer
        for bound in self.collected:
            bound.let_go()

    def backward(self) -> _Backward:
        """Return the context of the backward pass."""
        return _Backward(self.collected)


class _Backward:
    def __init__(self, collected: list[Binding]) -> None:
        self.collected = collected
        self.entered: list[Binding] = []
        self.guard: Guard | None = None

    def __enter__(self) -> None:
        self.outer, here.scope = here.scope, None
        try:
            if len(self.collected) == 1 and self.collected[0].held:
                self.guard = self.collected[0].guard_of_backward()
                return
            for bound in self.collected:
                bound.let_go()
            for bound in self.collected:
                repeated = bound.silent(self.collected)
                repeated.__enter__()
                self.entered.append(repeated)
        except BaseException:
            self.__exit__(None, None, None)
            raise

    def __exit__(self, *error: Any) -> None:
        try:
            if self.guard is not None:
                self.guard.exit(error[0] is not None)
            while self.entered:
                self.entered.pop().__exit__(*error)
        finally:
            here.scope = self.outer
