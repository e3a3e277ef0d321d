"""`lr_range`: the learning-rate range test, a short run in which every step has a larger learning rate.

The learning rate is a tensor of the optimizer state, which a function around the step sets; so the test is a run of
`fit` like any other, and the state that it was given stays as it is.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Annotated, Any, Literal

import torch

from purestep import metrics, optim, trainer
from purestep.arguments import Count, Name, Positive, Range, Whole, checked
from purestep.callbacks.base import Reaction, Reducer
from purestep.display import plots
from purestep.errors import ConfigError, OptimError, explain
from purestep.loop.cadence import steps
from purestep.loop.events import Event, Horizon, StepsDone, Stop
from purestep.loop.events import View as LoopView
from purestep.optim.base import GradientTransformation
from purestep.optim.hyperparams import InjectHyperparamsState
from purestep.optim.state_access import nodes
from purestep.state import TrainState
from purestep.step import Step, make_step
from purestep.step_protocol import StepFn, facts_of, name_of, wrap_step
from purestep.views import Block, Curves, Line, Mark, Panel, Printed, Table, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

RATE = "tune/learning_rate"  # the metric in which a step of the test says its learning rate
BETA = 0.98  # of the moving average of losses
_CHUNK = 16  # steps between two looks at the losses: what was computed too far is left out of the curve
_LOG = 300  # a loss that spans more than this factor has a logarithmic axis
Threshold = Annotated[float, Range(1, math.inf, "(]")]


@dataclasses.dataclass(frozen=True, repr=False)
class LearningRateRange(Printed):
    """The losses of a learning-rate range test. Made by `lr_range`.

    Attributes:
        lrs: the learning rate of each step.
        losses: the loss of each step, of its batch before the update.
        mode: how the learning rate grew.
        why: why the test ended.
        name: of the learning rate in the optimizer state.
        skip_begin, skip_end: steps at the two ends that are never suggested.
        state: the state after the test; the one it was given is as before.
    """

    lrs: tuple[float, ...]
    losses: tuple[float, ...]
    mode: Literal["exponential", "linear"]
    why: str
    name: str = "learning_rate"
    skip_begin: int = 10
    skip_end: int = 1
    state: Any = None

    @property
    def smoothed(self) -> tuple[float, ...]:
        """The moving average of the losses with weight 0.98, without the bias to its first value."""
        return smooth(self.losses)

    @property
    def suggestion(self) -> float | None:
        """The learning rate at which the loss falls most steeply, along the axis on which the test moved (the logarithm
        of an exponential test). None where it falls nowhere, or fewer than two steps are left.

        The slope at a step is that of the least-squares line through the losses of its neighbours, a tenth of the steps
        to each side: a difference of two losses would be the noise of their batches.
        """
        index = self._steepest()
        return None if index is None else self.lrs[index]

    def _steepest(self) -> int | None:
        inner = range(self.skip_begin, len(self.losses) - self.skip_end)
        if len(inner) < 2:
            return None
        reach = max(len(self.losses) // 10, 1)
        slopes = {index: self._slope(max(index - reach, 0), index + reach + 1) for index in inner}
        lowest = min(slopes, key=slopes.__getitem__)
        return lowest if slopes[lowest] < 0 else None

    def _slope(self, first: int, end: int) -> float:
        """Return the slope of the line through some losses; infinite where it has none, or a loss is not finite."""
        places = [self._place(index) for index in range(first, min(end, len(self.losses)))]
        losses = self.losses[first:end]
        middle, height = sum(places) / len(places), sum(losses) / len(losses)
        width = sum((place - middle) ** 2 for place in places)
        if not math.isfinite(height) or width == 0:
            return math.inf
        return sum((p - middle) * (y - height) for p, y in zip(places, losses, strict=True)) / width

    def _place(self, index: int) -> float:
        return self.lrs[index] if self.mode == "linear" else math.log10(self.lrs[index])

    def _panels(self) -> list[Panel]:
        if not self.lrs:
            return []
        places = [self._place(index) for index in range(len(self.lrs))]
        known = [loss for loss in self.losses if math.isfinite(loss)]
        log = bool(known) and min(known) > 0 and max(known) > _LOG * min(known)
        lines = (
            Line("loss", list(zip(places, self.losses, strict=True)), faint=True),
            Line("smoothed", list(zip(places, self.smoothed, strict=True))),
        )
        index = self._steepest()
        mark = None if index is None else Mark(places[index], f"{self.lrs[index]:.3g}")
        axis = self.name if self.mode == "linear" else f"log10 {self.name}"
        return [Panel("loss", lines, log=log, limits=(places[0], places[-1]), axis=axis, mark=mark)]

    def plot(self, *, title: str | None = None) -> Figure:
        """Draw the losses against the learning rate, with the suggestion.

        Args:
            title: of the picture; none by default.

        Raises:
            MissingExtra: matplotlib is not installed.
        """
        return plots.draw(self._panels(), title=title)

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        found = self.suggestion
        few = len(self.lrs) - self.skip_begin - self.skip_end < 2
        none = "none: too few steps" if few else "none: the loss falls nowhere"
        facts = [
            ["suggestion", none if found is None else f"{found:.4g}"],
            ["tried", f"{written(self.lrs[0])} to {self.lrs[-1]:.4g}, {self.mode}" if self.lrs else "nothing"],
        ]
        return [Table([f"{self.name} range", self.why], facts, wide=True), Curves(self._panels())]


def smooth(losses: Sequence[float], beta: float = BETA) -> tuple[float, ...]:
    """Return the moving average of numbers, without the bias to its beginning.

    Examples:
        >>> [round(value, 2) for value in smooth([4.0, 4.0, 1.0], beta=0.5)]
        [4.0, 4.0, 2.29]
    """
    found, average = [], 0.0
    for count, loss in enumerate(losses, start=1):
        average = beta * average + (1 - beta) * loss
        found.append(average / (1 - beta**count))
    return tuple(found)


def diverged(losses: Sequence[float], threshold: float) -> int | None:
    """Return the first step whose smoothed loss is not finite, or more than so many times the smallest before it."""
    best = math.inf
    for index, value in enumerate(smooth(losses)):
        if not math.isfinite(value) or (index > 0 and value > threshold * best):
            return index
        best = min(best, value)
    return None


@dataclasses.dataclass(frozen=True)
class _Ramp:
    """A function around a step that sets the learning rate by the number of the step."""

    name: str
    low: float
    high: float
    count: int
    mode: str
    first: int

    def __call__(self, step: StepFn, state: TrainState, batch: Any) -> tuple[TrainState, dict[str, Any]]:
        done = (state.step - self.first).to(torch.float64)
        fraction = done / max(self.count - 1, 1)
        if self.mode == "linear":
            rate = self.low + (self.high - self.low) * fraction
        else:
            rate = self.low * torch.exp(fraction * math.log(self.high / self.low))
        new, row = step(state.replace(opt_state=optim.set(state.opt_state, {self.name: rate})), batch)
        return new, {**row, RATE: metrics.Last(rate)}


@dataclasses.dataclass(frozen=True)
class _Losses(Reducer):
    """Collects learning rates and losses, and ends the run where the loss diverges."""

    metric: str
    threshold: float | None
    name: str = "lr_range"

    def init(self) -> tuple[tuple[float, float], ...]:
        return ()

    def horizon(self, view: LoopView) -> Horizon:
        return Horizon(_CHUNK)

    def react(self, own: tuple[tuple[float, float], ...], event: Event, view: LoopView) -> Reaction:
        if not isinstance(event, StepsDone):
            return own, ()
        for row in event.metrics:
            if self.metric not in row:
                known = ", ".join(name for name in row if name != RATE)
                problem = f"the step has no metric {self.metric!r}, which the range test is to look at"
                raise ConfigError(explain(problem, where=f"metrics: {known or 'none'}"))
        own = (*own, *((_number(row[RATE]), _number(row[self.metric])) for row in event.metrics))
        if self.threshold is None or diverged([loss for _, loss in own], self.threshold) is None:
            return own, ()
        return own, (Stop("the loss diverged"),)


def _number(metric: metrics.Metric) -> float:
    return float(metric.compute())


@checked(ConfigError)
def lr_range(
    step: Callable[..., Any],
    state: TrainState,
    data: object,
    *,
    tx: Callable[[Any], GradientTransformation] | None = None,
    min_lr: Positive[float] = 1e-8,
    max_lr: Positive[float] = 1.0,
    num_steps: Count = 100,
    mode: Literal["exponential", "linear"] = "exponential",
    early_stop: Threshold | None = 4.0,
    skip_begin: Whole = 10,
    skip_end: Whole = 1,
    metric: Name = "loss",
    name: Name = "learning_rate",
) -> LearningRateRange:
    """Train a few steps, each with a larger learning rate, and suggest one: where the loss falls most steeply.

    Args:
        step: a training step whose optimizer state holds the learning rate, as that of `optim.inject_hyperparams`
            does, compiled or not; with `tx`, a loss function or any step of `make_step`.
        state: the first state of the test. It stays as it is, with its optimizer state and its random numbers.
        data: what `fit` takes as `train`; read from its beginning, over several epochs where one is too short.
        tx: function of the learning rate that makes the gradient transformation (`ps.optim.adamw`), for a step whose
            own has a fixed one; its state begins anew. None for that of the step.
        min_lr, max_lr: learning rate of the first and of the last step.
        num_steps: number of steps.
        mode: whether the learning rate grows by a factor in each step or by a difference.
        early_stop: end the test when the smoothed loss is more than so many times the smallest so far, or not finite;
            None to go on to `max_lr`.
        skip_begin, skip_end: steps at the two ends that are never suggested.
        metric: of the step: the loss.
        name: of the learning rate in the optimizer state, with dots where several have one:
            `head.hyperparams.learning_rate`.

    Returns:
        A value that prints and draws itself: `lrs`, `losses`, `smoothed`, `suggestion`. The same arguments give the
        same bits.

    Raises:
        ConfigError: the learning rate of the step cannot be set, `max_lr` is not above `min_lr`, or the state is no
            TrainState.

    Examples:
        >>> import purestep as ps
        >>> def loss_fn(net, batch):
        ...     return (net(batch["x"]) - batch["y"]).square().mean()
        >>> data = ps.data.batches({"x": torch.ones(64, 1), "y": torch.zeros(64, 1)}, 8)
        >>> state = ps.init(lambda: torch.nn.Linear(1, 1), ps.optim.sgd(0.1))
        >>> found = lr_range(loss_fn, state, data, tx=ps.optim.sgd, min_lr=1e-4, max_lr=10.0, num_steps=60)
        >>> found.why, 0.01 < found.suggestion < 1.0
        ('the loss diverged', True)

    Reference: Smith, Cyclical Learning Rates for Training Neural Networks, 2017; the arguments and their defaults are
    those of Lightning's `Tuner.lr_find`.
    """
    if not isinstance(state, TrainState):
        raise ConfigError(
            explain(
                "the state of a range test is a TrainState, whose steps are counted",
                where=f"state is a {type(state).__name__}",
                instead="state = ps.init(model, tx)",
            )
        )
    if not max_lr > min_lr:
        raise ConfigError(explain("max_lr is above min_lr", where=f"min_lr={min_lr!r}, max_lr={max_lr!r}"))
    if tx is not None:
        step, state = _injected(step, state, tx, min_lr)
    _check_settable(step, state, name)
    ramp = _Ramp(name, float(min_lr), float(max_lr), num_steps, mode, int(state.step))
    result = trainer.fit(
        wrap_step(step, ramp),
        state,
        data,
        until=steps(num_steps),
        callbacks=[_Losses(metric, early_stop)],
    )
    if result.interrupted:
        raise KeyboardInterrupt(f"{result.reason} in a learning-rate range test")
    pairs = result.loop.callbacks["lr_range"]
    end = None if early_stop is None else diverged([loss for _, loss in pairs], early_stop)
    pairs = pairs if end is None else pairs[: end + 1]
    return LearningRateRange(
        tuple(rate for rate, _ in pairs),
        tuple(loss for _, loss in pairs),
        mode,
        result.reason,
        name,
        skip_begin,
        skip_end,
        result.state,
    )


def _injected(
    step: Callable[..., Any], state: TrainState, tx: Callable[[Any], GradientTransformation], rate: float
) -> tuple[StepFn, TrainState]:
    """Return a step whose optimizer state holds the learning rate, and the state with a new one."""

    def by_rate(learning_rate: Any) -> GradientTransformation:
        return tx(learning_rate)

    chosen = optim.inject_hyperparams(by_rate)(learning_rate=float(rate))
    facts = facts_of(step)
    if facts.policy is not None or facts.plan is not None:
        raise ConfigError(
            explain(
                "tx= makes a new optimizer state, which under a policy or a plan has more in it",
                where=f"lr_range({name_of(step)}, ..., tx=...)",
                instead=_INSTEAD,
            )
        )
    if isinstance(step, Step):
        made: StepFn = dataclasses.replace(step, tx=chosen)
    elif facts.loss_fn is not None:
        count = facts.microbatches
        made = make_step(facts.loss_fn, chosen, microbatches=count)
    else:
        made = make_step(step, chosen)
    return made, state.replace(opt_state=chosen.init(state.params))


_INSTEAD = (
    "tx = ps.optim.inject_hyperparams(ps.optim.adamw)(learning_rate=1e-3)   # for the state and for the step\n"
    "or lr_range(step, state, data, tx=ps.optim.adamw)"
)


def _check_settable(step: StepFn, state: TrainState, name: str) -> None:
    try:
        optim.get(state.opt_state, name)
    except OptimError as error:
        named = [".".join(path) for path, _ in nodes(state.opt_state) if path and path[-1] == name.rpartition(".")[2]]
        fixed = "a number given to an optimizer is part of the transformation; the test sets one of its state"
        raise ConfigError(
            explain(
                f"the learning rate {name!r} of this step cannot be set",
                where=f"tx = {facts_of(step).tx!r}"[:200],
                why=f"its state has {len(named)}: {', '.join(named[:8])}" if named else fixed,
                instead=f"lr_range(step, state, data, name={named[0]!r})" if named else _INSTEAD,
            )
        ) from error
    scheduled = [
        node
        for _, node in nodes(state.opt_state)
        if isinstance(node, InjectHyperparamsState) and name.rpartition(".")[2] in node.scheduled
    ]
    if scheduled:
        raise ConfigError(
            explain(
                f"a schedule sets the learning rate {name!r} of this step, whatever is in the state",
                where=f"tx = {facts_of(step).tx!r}"[:200],
                instead=_INSTEAD,
            )
        )
