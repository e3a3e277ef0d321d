"""What callbacks share: an empty reducer to build on."""

from __future__ import annotations

from typing import Any

from purestep.loop.events import Effect, Event, Horizon, View
from purestep.loop.roles import Watcher

Reaction = tuple[Any, tuple[Effect, ...]]


class Reducer(Watcher):
    """A callback that does nothing yet: no state, no effects, no boundaries. Subclass it with a frozen dataclass.

    One that also evaluates, changes the train state, says which snapshots are kept, or shows the run to the outside
    subclasses `Evaluator`, `Transformer`, `SnapshotPolicy` or `Observer` besides.
    """

    def init(self) -> object:
        """Return the own state at the start of a run."""
        return None

    def react(self, own: Any, event: Event, view: View) -> Reaction:
        """Return the own state after an event, and effects: what the loop is to do."""
        return own, ()

    def horizon(self, view: View) -> Horizon:
        """Announce the next boundary at which to be asked."""
        return Horizon()
