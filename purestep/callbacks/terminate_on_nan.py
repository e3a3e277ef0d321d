"""`terminate_on_nan`: end a run whose loss is no longer a number."""

from __future__ import annotations

import dataclasses
import math

from purestep.arguments import Name, checked
from purestep.callbacks.base import Reaction, Reducer
from purestep.errors import ConfigError
from purestep.loop.events import Event, Resumed, StepsDone, Stop, View
from purestep.metrics import Metric


@dataclasses.dataclass(frozen=True)
class TerminateOnNan(Reducer):
    """See `terminate_on_nan`."""

    metric: str
    name: str

    def watches(self) -> tuple[str, ...]:
        return (f"train/{self.metric}",)

    def init(self) -> str:
        return ""

    def react(self, own: str, event: Event, view: View) -> Reaction:
        if isinstance(event, StepsDone) and not own:
            first = view.cursor.batches - event.count
            for offset, metrics in enumerate(event.metrics, start=1):
                if self.metric in metrics and not _finite(metrics[self.metric]):
                    value = float(metrics[self.metric].compute())
                    own = f"{self.metric} is {value} at batch {first + offset}"
                    break
        stop = own and isinstance(event, StepsDone | Resumed)
        return own, ((Stop(own),) if stop else ())


def _finite(metric: Metric) -> bool:
    return math.isfinite(float(metric.compute()))


@checked(ConfigError)
def terminate_on_nan(metric: Name = "loss", *, name: Name = "terminate_on_nan") -> TerminateOnNan:
    """End the run when a training metric is NaN or infinite, and say at which batch.

    It looks whenever metrics are read anyway (see `log`), so it costs nothing in between. To skip such updates
    instead, wrap the transformation: `optim.apply_if_finite(tx)`.

    Args:
        metric: which.
        name: of the callback.
    """
    return TerminateOnNan(metric, name)
