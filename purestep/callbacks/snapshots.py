"""`snapshots`: when to take one, and which to keep."""

from __future__ import annotations

import dataclasses

from purestep import snapshot
from purestep.arguments import Name, checked
from purestep.callbacks.base import Reaction, Reducer
from purestep.errors import ConfigError
from purestep.loop.cadence import Every, every
from purestep.loop.events import Event, Save, View
from purestep.loop.roles import Recurring, SnapshotPolicy


@dataclasses.dataclass(frozen=True)
class Snapshots(Recurring, Reducer, SnapshotPolicy):
    """See `snapshots`."""

    every: Every
    keep: snapshot.Keep
    name: str

    def identity(self) -> None:
        """Return None: when a run is saved does not change it."""

    def watches(self) -> tuple[str, ...]:
        return self.keep.metrics()

    def preserves(self) -> snapshot.Keep:
        return self.keep

    def react(self, own: object, event: Event, view: View) -> Reaction:
        return own, ((Save(),) if self.every.due(event, view) else ())


@checked(ConfigError)
def snapshots(
    *,
    every: Every = every.epoch(),  # noqa: B008
    keep: snapshot.Keep | None = None,
    name: Name = "snapshots",
) -> Snapshots:
    """Take snapshots of the whole run into `run_dir/snapshots`, in the background.

    A snapshot is taken when everything else of its moment is done (evaluations above all), and an old one is deleted
    only when the new one is durable. A run that ends, or is ended by a signal, takes one more.

    Args:
        every: when.
        keep: which to keep: `snapshot.latest(n)`, `best(metric, n, mode)`, `every_steps(n)`, combined with `|`; the
            latest by default.
        name: of the callback.
    """
    return Snapshots(every, snapshot.latest(1) if keep is None else keep, name)
