"""`replay`: a span of a run, executed again a step at a time, with the bits that it had."""

from __future__ import annotations

import contextlib
import dataclasses
import itertools
from collections.abc import Generator, Iterator, Mapping
from pathlib import Path
from typing import Annotated, Any

from torch import Tensor

from purestep import metrics, tree
from purestep.arguments import Judge, Whole, checked
from purestep.data import Batches
from purestep.errors import ConfigError, explain
from purestep.loop.cadence import steps
from purestep.loop.events import LoopState, Saved, StepsDone, Stopped
from purestep.loop.replaying import Replaying
from purestep.loop.resume import around
from purestep.record.experiment import Experiment, Makes, made
from purestep.record.member_step import without_others
from purestep.record.run_record import RunRecord
from purestep.record.run_record import open as open_run
from purestep.snapshot import Manifest, Store, root_of
from purestep.step_protocol import Seat
from purestep.views import Block, Printed, Table, shortened

Which = Annotated[
    RunRecord | str | Path,
    Judge(
        "a run of ps.open, or its directory",
        lambda v: isinstance(v, (RunRecord, Path)) or (isinstance(v, str) and v != ""),
    ),
]


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Replayed(Printed):
    """One step of a run, executed again.

    Attributes:
        position: batches consumed after it; a snapshot of this number holds `state`.
        epoch, batch: the place of its batch in the data.
        indices: which samples of the data set the batch is of, int64[b]; None where the data does not say.
        data: the batch that the step was called with.
        state: the train state after it, and after what callbacks made of it at this moment.
        metrics: of this batch.
    """

    position: int
    epoch: int
    batch: int
    indices: Tensor | None
    data: Any
    state: Any
    metrics: Mapping[str, float]

    @property
    def digest(self) -> str:
        """Of the train state, as a snapshot records it."""
        return tree.digest(self.state)

    def view(self) -> list[Block]:
        rows: list[list[object]] = [[name, value] for name, value in self.metrics.items()]
        samples = [] if self.indices is None else [["samples", shortened(str(self.indices.tolist()), 60)]]
        head = ["position", str(self.position)]
        return [Table(head, [["epoch, batch", f"{self.epoch}, {self.batch}"], *samples, *rows])]


@checked(ConfigError)
def replay(run: Which, experiment: Makes, first: Whole, last: Whole) -> Iterator[Replayed]:
    """Execute a span of a run again: the steps that lead from position `first` to position `last`.

    It begins at the snapshot at or before `first`, or at the beginning of the experiment where there is none, and goes
    through the same loop, data and callbacks as the run did: evaluations and transforms are performed, snapshots and
    logs are not written. The bits are those of the run, if the experiment is. What is not says `RunChangedWarning`.

    A step that donates its state writes over the states that were given before: look at each before the next.

    Args:
        run: a run, or its directory.
        experiment: what the run was made of, or a function that makes it from the settings of the run.
        first: the position to begin at, in batches.
        last: the position to end at.

    Yields:
        A `Replayed` for each of the positions first + 1, ..., last.

    Raises:
        ConfigError: `last` is before `first`, or the run ends before it.
        TemplateMismatch: the state of the experiment is not that of the run.

    Examples:
        >>> import tempfile, torch
        >>> import purestep as ps
        >>> @ps.experiment
        ... def linear(lr=0.1):
        ...     tx = ps.optim.sgd(lr)
        ...     step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        ...     data = ps.data.batches({"x": torch.arange(16.0).reshape(8, 2)}, 4)
        ...     return ps.Experiment(step, ps.init(lambda: torch.nn.Linear(2, 1), tx), data, until=ps.steps(5))
        >>> run_dir = tempfile.mkdtemp()
        >>> digest = ps.digest(linear(lr=0.01).fit(run_dir=run_dir).state)
        >>> for r in ps.replay(run_dir, linear, 3, 5):
        ...     r.position, r.epoch, r.batch, r.indices.shape, r.digest == digest
        (4, 1, 1, torch.Size([4]), False)
        (5, 2, 0, torch.Size([4]), True)
    """
    record = opened(run)
    if last < first:
        raise ConfigError(explain("a span ends where it begins, or later", where=f"first={first}, last={last}"))
    experiments = Experiments(record, experiment)
    experiments.at(last)  # raises here what is wrong with it, before the first `next`
    return replayed(record, experiments, first, last)


def replayed(record: RunRecord, experiments: Experiments, first: int, last: int) -> Generator[Replayed, None, None]:
    """Execute a span of a run again, see `replay`."""
    if last > first:
        for start, end in experiments.spans(nearest(record, first), last):
            with begun(record, experiments.at(end), start, end) as replaying:
                yield from (step for step in positions(replaying, end) if step.position > first)


class Experiments:
    """The experiments that a run was made of: one, unless it was resumed under other settings, or with other runs.

    Args:
        record: the run.
        makes: an experiment, or a function that makes one from settings.
    """

    def __init__(self, record: RunRecord, makes: Makes) -> None:
        self.record, self._makes = record, makes
        self._under: tuple[Any, Seat | None] = ({}, None)
        self._experiment: Experiment | None = None

    def at(self, position: int) -> Experiment:
        """Return what trained the step that led to a position: a step that was mapped over several runs is so again."""
        under = settings, seat = self._under_at(position)
        if self._experiment is None or under != self._under:
            one = made(self._makes, {} if settings is None else settings)
            one = one if seat is None else dataclasses.replace(one, step=without_others(one.step, seat))
            self._under, self._experiment = under, one
        return self._experiment

    def spans(self, start: int, end: int) -> list[tuple[int, int]]:
        """Split a span where the run was resumed in another way: at a snapshot, after which settings or seat change."""
        cuts = [at for at in self.record.snapshots if start < at < end and self._under_at(at) != self._under_at(at + 1)]
        return list(itertools.pairwise([start, *cuts, end]))

    def _under_at(self, position: int) -> tuple[Any, Seat | None]:
        settings = None if isinstance(self._makes, Experiment) else self.record.settings_at(position)
        return settings, self.record.seat_at(position)


def nearest(record: RunRecord, position: int) -> int:
    """Return where to begin for a position: its snapshot or the one before it, else the beginning.

    Raises:
        ConfigError: the run is a fork that began after it.
    """
    start = max((step for step in record.snapshots if step <= position), default=0)
    if start or record.parent is None:
        return start
    raise ConfigError(
        explain(
            f"the run began at {record.parent.at}, after {position}",
            where=f"{record.path}: forked from {record.parent.run}",
            instead="replay what was before from the run that it was forked from",
        )
    )


def opened(run: Which) -> RunRecord:
    """Return the record of a run that is given as a record or a directory."""
    return run if isinstance(run, RunRecord) else open_run(run)


@contextlib.contextmanager
def begun(
    record: RunRecord, experiment: Experiment, start: int, last: int, *, warn: bool = True, strict: bool = False
) -> Iterator[Replaying]:
    """Begin to execute a run again at a snapshot; without one there, and at 0, at its beginning.

    Raises:
        ConfigError: the run reached its end before `last`.
    """
    end = record.summary.batches
    # One that was interrupted, or failed, has steps to come, which are those that it will have when it goes on.
    if end is not None and last > end and record.why.startswith("reached "):
        what, where = f"the run ends at {end}, before {last}", f"{record.path}: {record.why}"
        raise ConfigError(explain(what, where=where, instead=f"{end} at most, or go on with it: fit(until=...)"))
    loop: LoopState | None = None
    manifest: Manifest | None = None
    if start in record.snapshots:
        loop, manifest = stored(record, experiment, start)
    # The snapshot that ends the span records what trained it; the one that begins it may be of other settings.
    later = next((step for step in record.snapshots if step > start), None)
    if later is not None:
        manifest = Store(root_of(record.path)).read_manifest(later)
    replaying = Replaying(experiment.arguments(steps(max(last, 1)), strict=strict), loop, manifest, warn=warn)
    del loop
    with contextlib.closing(replaying):
        yield replaying


def stored(record: RunRecord, experiment: Experiment, step: int) -> tuple[LoopState, Manifest]:
    """Return the loop in a snapshot, verified, and its manifest."""
    store = Store(root_of(record.path))
    return store.restore(like=around(experiment.state), step=step).value, store.read_manifest(step)


def positions(replaying: Replaying, last: int) -> Iterator[Replayed]:
    """Yield each step up to a position, at the moment at which a snapshot of it would be taken."""
    source = replaying.source
    done: StepsDone | None = None
    epoch = batch = 0
    for event in replaying:
        cursor = replaying.loop.cursor
        if isinstance(event, StepsDone) and event.count:
            done, epoch, batch = event, cursor.epoch, cursor.batch - 1
        elif isinstance(event, Saved) and done is not None:
            found = metrics.compute(done.metrics[0])
            indices = source.indices(epoch, batch) if isinstance(source, Batches) else None
            state = replaying.loop.train
            yield Replayed(cursor.batches, epoch, batch, indices, replaying.batch, state, found)
            done = None
            if cursor.batches >= last:
                return
        elif isinstance(event, Stopped):
            raise ConfigError(
                explain(
                    f"the run ends at {cursor.batches}, before {last}",
                    where=f"it ended because: {event.reason}",
                    instead=f"last={cursor.batches}",
                )
            )
