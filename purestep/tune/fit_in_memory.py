"""`batch_size` and `microbatches`: the largest batch, and the fewest microbatches, with which a step fits in memory.

Each candidate is judged by the estimate of a dry run first, which costs no memory; one that passes is tried on real
tensors. A step is pure, so a trial changes nothing that would have to be put back.
"""

from __future__ import annotations

import contextlib
import dataclasses
import time
from collections.abc import Callable, Iterator
from typing import Any, Literal

import torch

from purestep import metrics
from purestep.arguments import Count, Decay, checked
from purestep.bits import human_bytes
from purestep.data.source import as_source, close
from purestep.data.to_device import on_device
from purestep.donation import copied
from purestep.errors import ConfigError, DataError, PurestepError, explain
from purestep.loop.input import device_of
from purestep.preflight import fit_memory, memory
from purestep.step_protocol import StepFn, facts_of, name_of, no_microbatches, resliced
from purestep.views import Block, Printed, Table

Mode = Literal["power", "binary"]
_FEWER = "a smaller model, ps.jit(step, donate=True), ps.checkpoint around its blocks, or a device with more memory"


@dataclasses.dataclass(frozen=True)
class Trial:
    """A size that was looked at.

    Attributes:
        size: of the batch; of a search for microbatches their number.
        fits: whether the step fits in memory.
        how: what says so: "estimate" for a dry run that needs more than is free, "trial" for a step that was run,
            "data" where the data have no batch of this size.
        estimated: bytes that are needed at least besides the state and the batch; None without a batch.
        seconds: of one step: the fastest of the trial, None where none was run to its end.
        samples: in the batch.
    """

    size: int
    fits: bool
    how: Literal["estimate", "trial", "data"]
    estimated: int | None = None
    seconds: float | None = None
    samples: int = 0

    @property
    def samples_per_second(self) -> float | None:
        """Throughput of the trial."""
        return None if not self.seconds else self.samples / self.seconds


@dataclasses.dataclass(frozen=True, repr=False)
class _Found(Printed):
    trials: tuple[Trial, ...]
    mode: Mode
    margin: float
    room: int | None

    def _view(self, what: str, chosen: int) -> list[Block]:
        facts = [["search", self.mode + (f", margin {self.margin:.0%}" if self.mode == "binary" else "")]]
        facts += [["memory", "unknown" if self.room is None else f"{human_bytes(self.room)} usable"]]
        words = {"estimate": "too large by the estimate", "data": "no batch of this size"}
        rows = [
            [
                trial.size,
                "fits" if trial.fits else words.get(trial.how, "out of memory"),
                None if trial.estimated is None else human_bytes(trial.estimated),
                None if trial.seconds is None else 1000 * trial.seconds,
                trial.samples_per_second,
            ]
            for trial in self.trials
        ]
        columns = [what, "result", "estimate", "ms a step", "samples/s"]
        return [Table([what, str(chosen)], facts, wide=True), Table(columns, rows, right=[2])]


@dataclasses.dataclass(frozen=True, repr=False)
class BatchSize(_Found):
    """What `batch_size` found. It prints as a table of its trials.

    Attributes:
        size: the batch size to take.
        trials: what was looked at, in order.
        mode, margin: of the search.
        room: bytes that a step may use by the estimate; None where the system does not say.
    """

    size: int

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        return self._view("batch size", self.size)


@dataclasses.dataclass(frozen=True, repr=False)
class Microbatches(_Found):
    """What `microbatches` found. It prints as a table of its trials.

    Attributes:
        count: the number of microbatches to take.
        trials: what was looked at, in order.
        mode, margin: of the search.
        room: bytes that a step may use by the estimate; None where the system does not say.
    """

    count: int

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        return self._view("microbatches", self.count)


@checked(ConfigError)
def batch_size(
    step: Callable[..., Any],
    state: Any,
    make_data: Callable[[int], Any],
    *,
    mode: Mode = "power",
    start: Count = 2,
    largest: Count = 8192,
    margin: Decay[float] = 0.05,
    steps_per_trial: Count = 3,
    free: Count | None = None,
) -> BatchSize:
    """Find the largest batch size with which a step fits in memory.

    The size is doubled until one does not fit; `mode="binary"` then halves the interval between the last that fits and
    the first that does not. A size is first judged by the memory that a dry run of the step says it needs, then tried.

    Args:
        step: a training step of one process, compiled or not.
        state: what it is given. It stays as it is.
        make_data: `make_data(size)` returns what `fit` takes as `train`, with batches of `size` samples; its first
            batches are tried.
        mode: "power" gives `start` times a power of 2, "binary" the largest size less `margin`.
        start: the first size. Where it does not fit, it is halved.
        largest: the largest size to look at.
        margin: of "binary": the part of the size that is taken off, for batches that need more.
        steps_per_trial: steps on each size, fewer where the data have fewer batches.
        free: bytes to go by in estimates; by default nine tenths of what is free where the state is. On a CPU only the
            estimate protects from a system that ends the process instead of refusing it memory.

    Raises:
        ConfigError: not even one sample fits, the data have no batch at all, or the step has a plan or
            `microbatches="auto"`.

    Examples:
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        >>> state = ps.init(lambda: torch.nn.Linear(3, 1), tx)
        >>> found = batch_size(step, state, lambda size: ps.data.batches({"x": torch.ones(100, 3)}, size))
        >>> found.size, [(trial.size, trial.fits, trial.how) for trial in found.trials[-2:]]
        (64, [(64, True, 'trial'), (128, False, 'data')])

    Reference: the modes and defaults of Lightning's `Tuner.scale_batch_size`.
    """
    _check_alone(step, "batch_size")
    if facts_of(step).microbatches == "auto":
        raise ConfigError(
            explain(
                "microbatches='auto' and a search for the batch size do not go together",
                where=f"batch_size({name_of(step)}, ...)",
                why="every batch fits, in as many microbatches as it takes",
                instead="ps.make_step(loss_fn, tx, microbatches=1)",
            )
        )
    room, device = _room(state, free)
    trials: list[Trial] = []

    def fits(size: int) -> bool:
        with _batches(make_data, size, steps_per_trial, device) as batches:
            if batches is None:
                return _noted(trials, Trial(size, False, "data"))
            if not batches:
                return _noted(trials, Trial(size, False, "trial"))
            return _noted(trials, _tried(step, state, batches, size, room, steps_per_trial))

    size = _largest(fits, min(start, largest), largest, mode)
    if size is None:
        raise _nothing(trials, room, "no batch size fits: not even one sample")
    chosen = max(1, int(size * (1 - margin))) if mode == "binary" else size
    return BatchSize(tuple(trials), mode, margin, room, chosen)


@checked(ConfigError)
def microbatches(
    step: Callable[..., Any],
    state: Any,
    batch: Any,
    *,
    mode: Mode = "power",
    margin: Decay[float] = 0.05,
    steps_per_trial: Count = 3,
    free: Count | None = None,
) -> Microbatches:
    """Find the smallest number of microbatches with which a step fits in memory, for a batch whose size is given.

    `ps.make_step(..., microbatches="auto")` settles it in `fit`, by the estimate; this shows each number that was
    looked at and how fast it is.

    Args:
        step: a step of `make_step` of one process, with any number of microbatches, compiled or not.
        state: what it is given. It stays as it is.
        batch: the largest that it will be given.
        mode: "power" gives a power of 2, or the number of samples; "binary" the smallest number, and `margin` more.
        margin: of "binary": the part of a microbatch that is taken off, for batches that need more.
        steps_per_trial: steps with each number.
        free: bytes to go by in estimates; by default nine tenths of what is free where the state is.

    Raises:
        ConfigError: not even one sample at a time fits, or the step has a plan, or no microbatches.

    Examples:
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        >>> state = ps.init(lambda: torch.nn.Linear(3, 1), tx)
        >>> microbatches(step, state, {"x": torch.ones(100, 3)}).count
        1
    """
    _check_alone(step, "microbatches")
    if facts_of(step).microbatches is None:
        raise no_microbatches(step)
    room, device = _room(state, free)
    placed = on_device(batch, device)
    samples = metrics.sample_count(placed)
    trials: list[Trial] = []

    def fits(count: int) -> bool:
        sliced = resliced(step, count)
        return _noted(trials, _tried(sliced, state, [placed], count, room, steps_per_trial))

    count = _fewest(fits, samples, mode)
    if count is None:
        raise _nothing(trials, room, "no number of microbatches makes the step fit in memory")
    chosen = min(samples, -int(-count // (1 - margin))) if mode == "binary" and count > 1 else count
    return Microbatches(tuple(trials), mode, margin, room, chosen)


# --- the searches -----------------------------------------------------------------------------------------------------


def _largest(fits: Callable[[int], bool], start: int, largest: int, mode: Mode) -> int | None:
    """Return the largest size that fits, None where 1 does not."""
    size, above = start, largest + 1
    while not fits(size):
        above = size
        if size == 1:
            return None
        size //= 2
    while above > largest and 2 * size <= largest:
        if fits(2 * size):
            size *= 2
        else:
            above = 2 * size
    while mode == "binary" and above - size > 1:
        middle = (size + above) // 2
        size, above = (middle, above) if fits(middle) else (size, middle)
    return size


def _fewest(fits: Callable[[int], bool], most: int, mode: Mode) -> int | None:
    """Return the smallest number that fits, None where the largest does not."""
    below, count = 0, 1
    while not fits(count):
        if count == most:
            return None
        # From each power of two on there is one more sum at a time: before it the need is least, see `fit_memory`.
        below, count = count, min(2 * count + (mode == "binary"), most)
    while mode == "binary" and count - below > 1:
        middle = (below + count) // 2
        below, count = (below, middle) if fits(middle) else (middle, count)
    return count


def _noted(trials: list[Trial], trial: Trial) -> bool:
    trials.append(trial)
    return trial.fits


def _nothing(trials: list[Trial], room: int | None, what: str) -> ConfigError:
    last = trials[-1]
    if last.how == "data":
        return ConfigError(
            explain(
                "the data have no batch, of whatever size",
                where=f"make_data({last.size})",
                instead="lambda size: ps.data.batches(dataset, size)",
            )
        )
    needed = "" if last.estimated is None else f"{human_bytes(last.estimated)} needed besides state and batch"
    usable = "" if room is None else f"{human_bytes(room)} usable"
    return ConfigError(explain(what, where=", ".join(filter(None, [needed, usable])) or None, instead=_FEWER))


# --- one candidate ----------------------------------------------------------------------------------------------------


def _check_alone(step: StepFn, call: str) -> None:
    if facts_of(step).plan is None:
        return
    raise ConfigError(
        explain(
            "a search in memory is for the step of one process",
            where=f"ps.tune.{call}, for a step with a plan",
            why="all ranks have to try the same, and each knows only its own memory",
            instead="the same step without its plan, with the share of the batch that one rank has",
        )
    )


def _room(state: Any, free: int | None) -> tuple[int | None, torch.device]:
    device = device_of(state)
    if free is not None:
        return free, device
    found = memory.free_memory(device)
    return None if found is None else int(memory.USABLE * found), device


@contextlib.contextmanager
def _batches(
    make_data: Callable[[int], Any], size: int, count: int, device: torch.device
) -> Iterator[list[Any] | None]:
    """Give the first batches of a size; none where memory for them is missing, None where the data have none."""
    found: list[Any] | None = []
    try:
        source = as_source(make_data(size))
        opened = source.open(0, 0, source.state())
        try:
            for batch in opened:
                if metrics.sample_count(batch) < size:
                    break
                found.append(on_device(batch, device))  # type: ignore[union-attr]
                if len(found) == count:  # type: ignore[arg-type]
                    break
        finally:
            close(opened)
            close(source)
        found = found or None
    except Exception as error:
        if memory.is_out_of_memory(error):
            found = []
        elif isinstance(error, DataError) and size > 1:
            found = None
        else:
            raise
    yield found


def _tried(step: StepFn, state: Any, batches: list[Any], size: int, room: int | None, count: int) -> Trial:
    """Judge a candidate by its estimate, and try it unless that says it does not fit."""
    samples = metrics.sample_count(batches[0])
    estimated = fit_memory.needed(step, state, batches[0]).beyond
    if room is not None and estimated > room:
        return Trial(size, False, "estimate", estimated, None, samples)
    seconds = []
    try:
        # A donating step writes over the state that it is given.
        current = copied(state) if facts_of(step).donate else state
        for number in range(count):
            begun = time.perf_counter()
            current, row = step(current, batches[number % len(batches)])
            metrics.compute(metrics.as_metrics(row, samples))  # waits for the device
            seconds.append(time.perf_counter() - begun)
    except Exception as error:
        cause = error.__cause__ if isinstance(error, PurestepError) else None
        if not memory.is_out_of_memory(error) and (cause is None or not memory.is_out_of_memory(cause)):
            raise
        return Trial(size, False, "trial", estimated, None, samples)
    finally:
        if torch.accelerator.is_available() and hasattr(torch.accelerator, "empty_cache"):
            torch.accelerator.empty_cache()
    return Trial(size, True, "trial", estimated, min(seconds), samples)
