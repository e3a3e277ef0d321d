"""`spike_detection`: find batches at which a training metric jumps, and end the run or note them."""

from __future__ import annotations

import dataclasses
import math
from typing import Literal

from purestep.arguments import Count, Name, NonNegative, Whole, checked
from purestep.callbacks.base import Reaction, Reducer
from purestep.errors import ConfigError, explain
from purestep.loop.events import Event, Log, StepsDone, Stop, View
from purestep.tree import pytree


@pytree(eq=True)
class Recent:
    """Own state of spike detection.

    Attributes:
        values: the latest values that were no spikes, oldest first.
        seen: batches looked at.
        spikes: the batches, counted over the run from 1, at which there was one.
    """

    values: tuple[float, ...] = ()
    seen: int = 0
    spikes: tuple[int, ...] = ()


@dataclasses.dataclass(frozen=True)
class SpikeDetection(Reducer):
    """See `spike_detection`."""

    metric: str
    window: int
    warmup: int
    rtol: float
    atol: float
    mode: Literal["min", "max"]
    on: Literal["stop", "log"]
    name: str

    def watches(self) -> tuple[str, ...]:
        return (f"train/{self.metric}",)

    def init(self) -> Recent:
        return Recent()

    def react(self, own: Recent, event: Event, view: View) -> Reaction:
        if not isinstance(event, StepsDone):
            return own, ()
        known, first = len(own.spikes), view.cursor.batches - event.count
        for offset, metrics in enumerate(event.metrics, start=1):
            if self.metric in metrics:
                own = self._following(own, float(metrics[self.metric].compute()), first + offset)
        new = own.spikes[known:]
        if not new:
            return own, ()
        row = Log({f"{self.name}/spikes": float(len(own.spikes))})
        what = f"{self.metric} jumps at batch {', '.join(map(str, new))}"
        return own, (row, Stop(what)) if self.on == "stop" else (row,)

    def _following(self, own: Recent, value: float, batch: int) -> Recent:
        if own.seen >= self.warmup and self._is_spike(own, value):
            return Recent(own.values, own.seen + 1, (*own.spikes, batch))
        # Before the warm-up is over a value that is not finite is no measure for others either.
        values = (*own.values, value)[-self.window :] if math.isfinite(value) else own.values
        return Recent(values, own.seen + 1, own.spikes)

    def _is_spike(self, own: Recent, value: float) -> bool:
        if not math.isfinite(value):
            return True
        if not own.values:
            return False
        mean = math.fsum(own.values) / len(own.values)
        worse = value - mean if self.mode == "min" else mean - value
        return worse > max(self.atol, self.rtol * abs(mean))


@checked(ConfigError)
def spike_detection(
    metric: Name = "loss",
    *,
    window: Count = 10,
    warmup: Whole = 1,
    rtol: NonNegative[float] = 2.0,
    atol: NonNegative[float] = 0.0,
    mode: Literal["min", "max"] = "min",
    on: Literal["stop", "log"] = "stop",
    name: Name = "spike_detection",
) -> SpikeDetection:
    """Find the batches at which a training metric jumps away from the mean of those before, or is not finite.

    It looks whenever metrics are read anyway (see `log`). A run that was stopped by it goes on behind the spike when it
    is resumed; what it found is in its own state, `result.loop.callbacks["spike_detection"].spikes`, and is not part of
    the mean. To skip the update itself, wrap the transformation: `ps.optim.skip_large_updates(tx, max_norm)`.

    Args:
        metric: which.
        window: values of which the mean is taken.
        warmup: batches at the beginning that are never spikes.
        rtol: how far from the mean, as a fraction of it, a value may be worse.
        atol: the same as a number; the larger of both counts.
        mode: whether "min" or "max" is better.
        on: "stop" ends the run and names the batches; "log" goes on and logs their number.
        name: of the callback.

    Raises:
        ConfigError: settings out of range.

    Reference: `lightning.fabric.utilities.spike.SpikeDetection`.
    """
    if mode not in ("min", "max") or on not in ("stop", "log"):
        where = f"mode={mode!r}, on={on!r}"
        raise ConfigError(explain("mode is 'min' or 'max', on is 'stop' or 'log'", where=where))
    return SpikeDetection(metric, window, warmup, rtol, atol, mode, on, name)
