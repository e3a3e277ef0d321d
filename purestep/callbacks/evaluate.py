"""`evaluate`: metrics of a held-out set. It restores nothing, because it changes nothing."""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from purestep import data, metrics
from purestep.arguments import Name, checked
from purestep.callbacks.base import Reaction, Reducer
from purestep.data.to_device import on_device
from purestep.errors import ConfigError, DataError, explain
from purestep.loop.cadence import Every, every
from purestep.loop.events import Evaluate, Evaluated, Event, Log, Started, View
from purestep.loop.input import device_of
from purestep.loop.roles import Evaluator, Peers, Recurring
from purestep.loop.shared_evaluation import Shared
from purestep.step import make_eval
from purestep.step_protocol import AnyStep, facts_of

Sums = Mapping[str, metrics.Metric]
_READ_EVERY = 100  # batches whose metrics wait on the device before they are read


@dataclasses.dataclass(frozen=True)
class EvaluateCallback(Recurring, Reducer, Evaluator):
    """See `evaluate`."""

    loss_fn: Callable[..., Any] = dataclasses.field(repr=False)
    data: Any = dataclasses.field(repr=False)
    every: Every
    at_start: bool
    of: Callable[[Any], Any] | None
    name: str

    def react(self, own: object, event: Event, view: View) -> Reaction:
        if isinstance(event, Evaluated) and event.name == self.name:
            return own, (Log(event.row),)
        if self.every.due(event, view) or (self.at_start and isinstance(event, Started)):
            return own, (Evaluate(self.name),)
        return own, ()

    def identity(self) -> dict[str, object]:
        """Return what a snapshot of a run records of it: the data as the source it is read from."""
        of = {"loss_fn": self.loss_fn, "data": self._source, "of": self.of}
        return {**of, "every": self.every, "at_start": self.at_start}

    @functools.cached_property
    def _step(self) -> Callable[..., Any]:
        return self.loss_fn if facts_of(self.loss_fn).evaluates else make_eval(self.loss_fn)

    @functools.cached_property
    def _source(self) -> data.Source:
        return data.as_source(self.data)

    def check_first(self, train: object) -> tuple[str, ...] | None:
        """Check the evaluation on the shapes of its first batch, where that can be read without disturbing anything.

        Returns:
            The names of its metrics, None where they are not known.
        """
        from purestep.preflight.check import check_eval

        source = self._source
        if not self.rereads():
            return None
        if isinstance(source, data.Batches):
            source = source.replace(num_workers=0)
        for batch in source.open(0, 0, None):
            return check_eval(self.name, self._step, train, batch, of=self.of)
        return None

    def rereads(self) -> bool:
        """Tell whether the data are batches of a data set, or a list of them."""
        from purestep.data.adapters import BatchSequence

        return isinstance(self._source, (data.Batches, BatchSequence))

    def limited(self, batches: int) -> EvaluateCallback:
        """Return the same evaluation of the first batches only."""
        return dataclasses.replace(self, data=data.take(self._source, batches))

    def evaluate(
        self, train: object, interrupted: Callable[[], bool], peers: Peers | None = None
    ) -> dict[str, float] | None:
        """Return the row of metrics over the whole set, or None when a signal cut it off.

        With peers every rank evaluates some of the batches, and all of them return the same row: that of one process.
        """
        train = train if self.of is None else self.of(train)
        sums = self._alone(train, interrupted) if peers is None else self._together(train, interrupted, peers)
        if sums is None:
            return None
        if not sums:
            raise DataError(
                explain(
                    f"the evaluation {self.name!r} has no batches",
                    where=f"data: {self._source!r}",
                    why="it is empty, or smaller than one batch and drop_last=True leaves nothing",
                    instead="ps.data.batches(val_set, batch_size, shuffle=False, drop_last=False)",
                )
            )
        return metrics.compute(sums, prefix=f"{self.name}/")

    def _alone(self, train: object, interrupted: Callable[[], bool]) -> Sums | None:
        device = device_of(train)
        sums: Sums = {}
        waiting: list[Any] = []
        for batch in self._source.open(0, 0, None):
            waiting.append(self._step(train, on_device(batch, device)))
            if len(waiting) == _READ_EVERY:
                sums, waiting = metrics.fold(sums, metrics.to_host(waiting)), []
            if interrupted():
                return None
        return metrics.fold(sums, metrics.to_host(waiting))

    def _together(self, train: object, interrupted: Callable[[], bool], peers: Peers) -> Sums | None:
        if peers.plan not in self._shared:
            self._shared[peers.plan] = Shared(self._step_under(peers.plan), self._source, peers.plan)
        work = self._shared[peers.plan]
        sums: Sums = {}
        for steps in work.run(train, lambda value: peers.meet(f"evaluation {self.name!r}", value)):
            if interrupted():
                return None
            sums = metrics.fold(sums, steps)
        return sums

    @functools.cached_property
    def _shared(self) -> dict[Any, Shared]:
        return {}  # by plan: what reads the data may hold worker processes

    def _step_under(self, plan: Any) -> Callable[..., Any]:
        """The evaluation step, told of the plan unless it has one or was compiled without."""
        step = self._step
        return step.under(plan) if isinstance(step, AnyStep) else step


@checked(ConfigError)
def evaluate(
    loss_fn: Callable[..., Any],
    data: object,
    *,
    every: Every = every.epoch(),  # noqa: B008
    at_start: bool = False,
    of: Callable[[Any], Any] | None = None,
    name: Name = "val",
) -> EvaluateCallback:
    """Evaluate on a held-out set and log the exact weighted means as `<name>/<metric>`.

    Several sets are several callbacks of different names.

    Args:
        loss_fn: the loss function of `make_step`, or an evaluation step from `make_eval` (jitted, say).
        data: what `fit` takes as data; it is always read from its beginning, in the order of its epoch 0. Under a plan
            each rank reads and evaluates every n-th batch, and the metrics are merged in the order of the batches.
        every: when.
        at_start: also before the first step.
        of: what of the train state is evaluated: a pure function of it. `of=ps.optim.averaged` evaluates the averages
            of the parameters that `ps.optim.average_params` keeps.
        name: prefix of the metrics.

    Raises:
        ConfigError: `loss_fn` does not take two arguments.

    Examples:
        >>> import purestep as ps
        >>> evaluate(lambda net, batch: net(batch).mean(), [], every=ps.every.steps(100), name="test")
        EvaluateCallback(every=EverySteps(n=100), at_start=False, of=None, name='test')
    """
    made = EvaluateCallback(loss_fn, data, every, at_start, of, name)
    _ = (
        made._step,
        made._source,
    )  # refuse a loss function of other arguments, and what is no data, where they are written
    return made
