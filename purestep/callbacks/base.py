"""What callbacks share: an empty reducer to build on, and the defaults that `fit` adds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from purestep.loop.events import Effect, Event, Horizon, View

Reaction = tuple[Any, tuple[Effect, ...]]


class Reducer:
    """A callback that does nothing yet: no state, no wishes, no boundaries. Subclass it with a frozen dataclass."""

    def init(self) -> Any:
        """Return the own state at the start of a run."""
        return None

    def react(self, own: Any, event: Event, view: View) -> Reaction:
        """Return the own state after an event, and wishes."""
        return own, ()

    def horizon(self, view: View) -> Horizon:
        """Announce the next boundary at which to be asked."""
        return Horizon()

    def watches(self) -> Sequence[str]:
        """Name the metrics that it waits for, as they are logged: `val/loss`. A run refuses names that never come."""
        return ()
