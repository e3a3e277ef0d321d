"""`early_stopping`: end the run when a metric has stopped improving."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from purestep.arguments import Finite, Name, Whole, checked
from purestep.callbacks.base import Reaction, Reducer
from purestep.errors import ConfigError, MetricError, explain
from purestep.loop.cadence import Until
from purestep.loop.events import EpochDone, Evaluated, Event, Resumed, Stop, View
from purestep.tree import pytree


@pytree(eq=True)
class Patience:
    """Own state of early stopping.

    Attributes:
        best: the best value so far.
        wait: checks since then.
        last: the value of the last check, None before the first.
    """

    best: float
    wait: int = 0
    last: float | None = None


@dataclasses.dataclass(frozen=True)
class EarlyStopping(Reducer):
    """See `early_stopping`."""

    monitor: str
    patience: int
    min_delta: float
    mode: Literal["min", "max"]
    check_finite: bool
    stopping_threshold: float | None
    divergence_threshold: float | None
    name: str
    not_before: Until | None = None

    def init(self) -> Patience:
        return Patience(math.inf if self.mode == "min" else -math.inf)

    def watches(self) -> tuple[str, ...]:
        return (self.monitor,)

    def react(self, own: Patience, event: Event, view: View) -> Reaction:
        if isinstance(event, (Evaluated, EpochDone)) and self._speaks(event):
            own = self._check(own, event.row[self.monitor])
        elif not isinstance(event, Resumed) or self.monitor.split("/")[0] in view.loop.status.due:
            # An evaluation that was cut off is done first after a resume, and may be better.
            return own, ()
        early = self.not_before is not None and not self.not_before.reached(view)
        reason = None if early else self._reason(own)
        return own, (() if reason is None else (Stop(f"early stopping: {reason}"),))

    def _speaks(self, event: Evaluated | EpochDone) -> bool:
        """Tell whether the row has the metric; an evaluation of its set that lacks it is a mistake in the name."""
        if self.monitor in event.row:
            return True
        if isinstance(event, Evaluated) and self.monitor.startswith(f"{event.name}/"):
            raise MetricError(
                explain(
                    f"early stopping watches {self.monitor!r}, which is not evaluated",
                    where=f"metrics of {event.name!r}: {', '.join(sorted(event.row))}",
                    instead=f"ps.callbacks.early_stopping({min(event.row, default='val/loss')!r})",
                )
            )
        return False

    def _check(self, own: Patience, value: float) -> Patience:
        improved = self._better(value + self.min_delta if self.mode == "min" else value - self.min_delta, own.best)
        return Patience(value if improved else own.best, 0 if improved else own.wait + 1, value)

    def _better(self, a: float, b: float) -> bool:
        return a < b if self.mode == "min" else a > b

    def _reason(self, own: Patience) -> str | None:
        """Say why to stop, from the own state and the present settings: so new settings win when a run is resumed."""
        if own.last is None:
            return None
        shown = f"{self.monitor} = {own.last:.6g}"
        if self.check_finite and not math.isfinite(own.last):
            return f"{shown} is not finite"
        if self.stopping_threshold is not None and self._better(own.last, self.stopping_threshold):
            return f"{shown} is better than {self.stopping_threshold:g}"
        if self.divergence_threshold is not None and self._better(-own.last, -self.divergence_threshold):
            return f"{shown} is worse than {self.divergence_threshold:g}"
        if own.wait >= self.patience:
            return f"{self.monitor} has not improved on {own.best:.6g} for {own.wait} checks"
        return None


@checked(ConfigError)
def early_stopping(
    monitor: Name,
    *,
    patience: Whole = 3,
    min_delta: Finite[float] = 0.0,
    mode: Literal["min", "max"] = "min",
    check_finite: bool = True,
    stopping_threshold: Finite[float] | None = None,
    divergence_threshold: Finite[float] | None = None,
    not_before: Until | None = None,
    name: Name = "early_stopping",
) -> EarlyStopping:
    """End the run when a metric has not improved for some checks. Each argument means what it means in Lightning.

    Args:
        monitor: metric of an evaluation (`val/loss`) or epoch mean of training (`train/loss_epoch`); checked when it
            is new.
        patience: checks without improvement after which to stop.
        min_delta: an improvement is strictly better than the best by more than this.
        mode: whether "min" or "max" is better.
        check_finite: stop when it is NaN or infinite.
        stopping_threshold: stop once it is better than this.
        divergence_threshold: stop once it is worse than this.
        not_before: a moment, as `ps.epochs(5)`. Checks before it count and stop nothing; the first one from then on
            judges by what holds then.
        name: of the callback.

    A resumed run goes by the settings it is given now: a larger patience continues a run that had stopped.

    Raises:
        ConfigError: settings out of range, or a name that is none of an evaluation or an epoch.
        MetricError: at run time, when the evaluation does not have the metric.
    """
    part, _, metric = monitor.partition("/")
    if not metric or (part == "train" and not metric.endswith("_epoch")):
        raise ConfigError(
            explain(
                "early stopping watches a metric of an evaluation, or the mean of one of training over an epoch",
                where=f"monitor={monitor!r}",
                why="only these are made anew at moments at which it could stop",
                instead=f"'train/{metric}_epoch'" if metric else f"'val/{monitor.removeprefix('val_')}'",
            )
        )
    if mode not in ("min", "max") or patience < 1 or min_delta < 0:
        raise ConfigError(
            explain(
                "early stopping needs mode 'min' or 'max', patience of at least 1 and min_delta of at least 0",
                where=f"mode={mode!r}, patience={patience!r}, min_delta={min_delta!r}",
            )
        )
    return EarlyStopping(
        monitor, patience, min_delta, mode, check_finite, stopping_threshold, divergence_threshold, name, not_before
    )
