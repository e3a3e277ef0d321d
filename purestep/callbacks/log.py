"""`log` and `learning_rate`: rows for the loggers."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

from purestep import metrics
from purestep.arguments import Name, checked
from purestep.callbacks.base import Reaction, Reducer
from purestep.errors import ConfigError
from purestep.loop.cadence import Every, every
from purestep.loop.events import EpochDone, Event, Log, StepsDone, View
from purestep.loop.roles import Recurring
from purestep.optim.base import GradientTransformation


@dataclasses.dataclass(frozen=True)
class LogCallback(Recurring, Reducer):
    """See `log`."""

    every: Every
    name: str

    def init(self) -> Mapping[str, metrics.Metric]:
        return {}

    def react(self, own: Mapping[str, metrics.Metric], event: Event, view: View) -> Reaction:
        if isinstance(event, StepsDone):
            own = metrics.fold(own, event.metrics)
        if isinstance(event, EpochDone):
            return own, (Log(event.row),)
        if self.every.due(event, view) and own:
            return {}, (Log(metrics.compute(own, prefix="train/")),)
        return own, ()


@checked(ConfigError)
def log(*, every: Every = every.steps(50), name: str = "log") -> LogCallback:  # noqa: B008
    """Log the training metrics: their weighted means since the last row as `train/<metric>`, and over each epoch as
    `train/<metric>_epoch`. Added by `fit` when absent.

    Args:
        every: when. Nothing is read from the device in between.
        name: of the callback.
    """
    return LogCallback(every, name)


@dataclasses.dataclass(frozen=True)
class LearningRate(Recurring, Reducer):
    """See `learning_rate`."""

    tx: GradientTransformation = dataclasses.field(repr=False)
    every: Every
    name: str

    def identity(self) -> dict[str, object]:
        """Return what a snapshot of a run records of it: it has the transformation from the step."""
        return {"every": self.every}

    def react(self, own: object, event: Event, view: View) -> Reaction:
        if not self.every.due(event, view):
            return own, ()
        values = self.tx.hyperparams(view.train.opt_state, view.train.step)
        return own, (Log({name: float(value) for name, value in values.items()}),)


@checked(ConfigError)
def learning_rate(
    tx: GradientTransformation,
    *,
    every: Every = every.steps(50),  # noqa: B008
    name: Name = "learning_rate",
) -> LearningRate:
    """Log what the schedules of a transformation give at the present step: `learning_rate` and other hyperparameters.

    Args:
        tx: the transformation of the step.
        every: when.
        name: of the callback.
    """
    return LearningRate(tx, every, name)
