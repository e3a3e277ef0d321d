"""`throughput`: samples, tokens and FLOPs a second, and how much of the hardware that is; `count_flops`."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils.flop_counter import FlopCounterMode

from purestep import tree
from purestep.arguments import Name, Positive, checked
from purestep.callbacks.base import Reducer
from purestep.errors import ConfigError, StepError, explain
from purestep.loop.cadence import Every, every
from purestep.loop.events import Event, LoopState, StepsDone, Ticked
from purestep.loop.roles import Moments, Observer, Recurring
from purestep.metrics import Mean, Metric, Sum
from purestep.step_protocol import bare


@dataclasses.dataclass(frozen=True)
class Throughput(Recurring, Reducer, Observer):
    """See `throughput`."""

    every: Every
    samples: str
    tokens: str | None
    flops: float | None
    peak_flops: float | None
    name: str

    def identity(self) -> None:
        """Return None: it only measures the run."""

    def watches(self) -> tuple[str, ...]:
        return tuple(f"train/{metric}" for metric in (self.samples, self.tokens) if metric is not None)

    def open_sink(self, run_dir: Path | None, length: int | None) -> _Rates:
        return _Rates(self, length)


class _Rates:
    """Counts what was trained on, and the seconds of it, since the last row."""

    def __init__(self, settings: Throughput, length: int | None) -> None:
        self._settings, self._moments = settings, Moments(settings.every, length)
        self._mark = 0.0
        self._clear()

    def _clear(self) -> None:
        self._seconds, self._batches = 0.0, 0
        self._counts = {n: 0.0 for n in ("samples", "tokens") if getattr(self._settings, n) is not None}

    def receive(self, event: Event, loop: LoopState) -> Mapping[str, float] | None:
        if isinstance(event, Ticked):
            return None  # of what follows: of steps, or of an evaluation, whose time does not count
        if isinstance(event, StepsDone):
            self._seconds += loop.elapsed - self._mark
            self._batches += event.count
            for name in self._counts:
                metric = getattr(self._settings, name)
                self._counts[name] += sum(_weight(metric, step[metric]) for step in event.metrics if metric in step)
        self._mark = loop.elapsed
        if not self._moments.due(event, loop) or not self._batches or self._seconds <= 0:
            return None
        row = self._row()
        self._clear()
        return row

    def _row(self) -> dict[str, float]:
        rates = {"batches": float(self._batches), **self._counts}
        if self._settings.flops is not None:
            rates["flops"] = self._settings.flops * self._batches
        name = self._settings.name
        row = {f"{name}/{what}_per_second": count / self._seconds for what, count in rates.items()}
        if self._settings.flops is not None and self._settings.peak_flops is not None:
            row[f"{name}/mfu"] = rates["flops"] / self._seconds / self._settings.peak_flops
        return row

    def close(self) -> None:
        """Nothing is held open."""


def _weight(name: str, metric: Metric) -> float:
    if isinstance(metric, Mean):
        return float(metric.weight)
    if isinstance(metric, Sum):
        return float(metric.value)
    raise ConfigError(
        explain(
            f"throughput counts the weight of a mean, or a sum, and {name!r} is neither",
            where=type(metric).__name__,
            instead="return loss, {'tokens': ps.metrics.Sum(mask.sum())}",
        )
    )


@checked(ConfigError)
def throughput(
    *,
    every: Every = every.steps(50),  # noqa: B008
    samples: Name = "loss",
    tokens: Name | None = None,
    flops: Positive[float] | None = None,
    peak_flops: Positive[float] | None = None,
    name: Name = "throughput",
) -> Throughput:
    """Log how fast the run trains since the last row: `throughput/samples_per_second` and its kin.

    The time of evaluations does not count. Rows go to the loggers and into no state, so the run keeps its bits. Under a
    plan the numbers are of all ranks together.

    Args:
        every: when.
        samples: the training metric whose weight is the number of samples; that of the loss is, unless it is weighted
            (`ps.weighted`).
        tokens: a metric that counts tokens: a `ps.metrics.Sum`, or a mean over them, such as a weighted loss.
        flops: of one batch, see `count_flops`: `throughput/flops_per_second`.
        peak_flops: FLOP/s that the hardware of all ranks can do in the dtype of the run: `throughput/mfu` is the
            fraction that is reached (model FLOPs utilization).
        name: of the callback, and prefix of the rows.

    Reference: PaLM, 2022, appendix B, for MFU; `lightning.pytorch.callbacks.ThroughputMonitor`.
    """
    return Throughput(every, samples, tokens, flops, peak_flops, name)


@checked(StepError)
def count_flops(step: Callable[..., Any], state: Any, batch: Any) -> int:
    """Count the floating-point operations of the matrix products, convolutions and attentions of a step on a batch.

    Nothing is computed: the step runs on tensors without memory.

    Args:
        step: any step; a compiled one is counted as the function it was compiled of.
        state, batch: of the shapes of the run. Under a plan: the whole state and batch, for the FLOPs of all ranks.

    Returns:
        FLOPs of the forward and the backward pass, a multiplication and an addition counted as two.

    Raises:
        StepError: the step cannot run on tensors without memory.

    Examples:
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx)
        >>> state = ps.init(lambda: torch.nn.Linear(16, 4), tx)
        >>> count_flops(step, state, torch.ones(8, 16)) == 2 * (2 * 8 * 16 * 4)    # forward, and to the weights
        True

    Reference: `torch.utils.flop_counter.FlopCounterMode`.
    """
    counter = FlopCounterMode(display=False)
    on_meta = tree.map(lambda leaf: leaf.to("meta") if isinstance(leaf, Tensor) else leaf, (state, batch))
    try:
        with counter, torch.device("meta"):
            bare(step)(*on_meta)
    except Exception as error:  # the user's code runs in it
        raise StepError(
            explain(
                "the step cannot run on tensors without memory, so its operations are not counted",
                where=f"{type(error).__name__}: {error}".split("\n")[0][:200],
                instead="with torch.utils.flop_counter.FlopCounterMode() as counter: step(state, batch)",
            )
        ) from error
    return int(counter.get_total_flops())
