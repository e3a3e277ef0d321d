"""`bisect`: the first batch in which two runs differ, and the first leaf of their train states.

It goes from the last snapshot that is equal in both, and executes both again beside each other. `Bisection.operation`
then traces the step of both at which they part (`trace_bits`), and names the first operation that differs.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from purestep import portable, tree
from purestep.arguments import checked
from purestep.donation import copied
from purestep.errors import ConfigError, explain
from purestep.record.compare import last_equal
from purestep.record.compare_bits import BitsComparison, compare_bits
from purestep.record.experiment import Makes
from purestep.record.replay import Experiments, Replayed, Which, opened, replayed, stored
from purestep.record.run_record import RunRecord
from purestep.record.trace_bits import trace_bits
from purestep.step_protocol import facts_of
from purestep.views import Block, Printed, Table

_LEAVES = 12  # in a text


@dataclasses.dataclass(frozen=True, repr=False)
class FirstBatch(Printed):
    """The first batch in which two runs differ.

    Attributes:
        position: batches consumed after it.
        places: (epoch, batch) of it in the data of each run.
        indices: the samples that it is of in each run, where the data says so.
        differences: of the batch of the first run (left) from that of the second (right), by leaf.
        rows: the places in the batch of the samples that differ; () where batches differ in shape.
    """

    position: int
    places: tuple[tuple[int, int], tuple[int, int]]
    indices: tuple[Tensor | None, Tensor | None]
    differences: tree.Differences
    rows: tuple[int, ...] = ()

    @property
    def samples(self) -> list[tuple[int, int]]:
        """The index in the data set, of the first and of the second run, of each sample that differs; [] where the data
        does not say."""
        a, b = self.indices
        return [] if a is None or b is None else [(int(a[row]), int(b[row])) for row in self.rows]

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        return [Table(["", ""], self.facts(), wide=True), *self.differences.view()]

    def facts(self) -> list[list[object]]:
        """Return where it is and which samples differ, as rows of a table."""
        (epoch, number), _ = self.places
        place: list[list[object]] = [["first batch", f"step {self.position}: batch {number} of epoch {epoch}"]]
        return place + ([["samples", _samples(self)]] if self.rows else [])


@dataclasses.dataclass(frozen=True, eq=False, repr=False)
class Bisection(Printed):
    """The result of `bisect`.

    Attributes:
        names: of the two runs.
        start: the position of the last equal state from which both were executed again.
        end: the last position that was compared.
        batch: the first batch that differs, None when none does up to there.
        position: of the first train state that differs, None when none does.
        leaves: what differs of that state: the first run left, the second right.
        before: the train states of both before that step; None where no state differs.
        batches: the batches of that step of both.
        metrics: what that step returned in both.
        steps: the steps of both runs.
        recorded: where both, executed here, are equal: the first position at which their snapshots are not, because of
            a machine, its versions, or of code that is not that of the run. None otherwise.
        threads: how many threads each ran with and was executed again with, where these are two numbers; else None.
    """

    names: tuple[str, str]
    start: int
    end: int
    batch: FirstBatch | None = None
    position: int | None = None
    leaves: tree.Differences = dataclasses.field(default_factory=tree.Differences)
    before: tuple[Any, Any] | None = dataclasses.field(default=None, repr=False)
    batches: tuple[Any, Any] | None = dataclasses.field(default=None, repr=False)
    metrics: tuple[Any, Any] | None = None
    steps: tuple[Any, Any] | None = dataclasses.field(default=None, repr=False)
    recorded: int | None = None
    threads: tuple[int, int] | None = None

    def operation(self) -> BitsComparison | None:
        """Execute the first step that differs once more in both, and compare the bits of all its operations.

        Returns:
            The first operation that differs, with its module, its line, both values and how far they are apart; None
            where no step differs, or the first states do.

        Raises:
            ConfigError: a step is compiled by Inductor, whose kernels are no operations.
        """
        if self.steps is None or self.before is None or self.batches is None:
            return None
        traces = []
        for side, count in enumerate(_counts(self.threads)):
            with _computing_with(count):
                state = copied(self.before[side])
                traces.append(trace_bits(self.steps[side], state, self.batches[side], values=True))
        return compare_bits(*traces)

    def __bool__(self) -> bool:
        """Whether the runs differ."""
        return self.batch is not None or self.position is not None or self.recorded is not None

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        rows: list[list[object]] = []
        if self.position is not None:
            first = self.position == self.start
            rows.append(["equal up to", "nothing: the first states differ" if first else f"step {self.position - 1}"])
        rows += [] if self.batch is None else self.batch.facts()
        if self.position is not None:
            what = "1 leaf differs" if len(self.leaves) == 1 else f"{len(self.leaves)} leaves differ"
            rows.append(["first state", f"step {self.position}: {what}"])
        else:
            rows.append(["states", f"executed here, equal up to {self.end}"])
        if self.threads is not None:
            rows.append(["threads", "{} and {}, as they ran".format(*self.threads)])
        if self.recorded is not None:
            rows.append(["snapshots", f"differ at {self.recorded}: ps.verify says which run computes otherwise here"])
        blocks: list[Block] = [Table(["runs", " and ".join(self.names)], rows, wide=True)]
        blocks += [] if self.batch is None else self.batch.differences.view()
        return blocks + (self.leaves.view() if self.leaves else [])


@checked(ConfigError)
def bisect(a: Which, b: Which, experiment_a: Makes, experiment_b: Makes | None = None) -> Bisection:
    """Find where two runs part: the first batch that differs, then the first leaves of the train state.

    Both are executed again, beside each other, from the last position at which both have a snapshot of the same train
    state, or at which one was forked from the other; else from their beginnings. Where they ran with different numbers
    of threads, on which sums depend, each is executed with its own.

    Args:
        a: a run, or its directory.
        b: another.
        experiment_a: what the first was made of, or a function that makes it from the settings of the run.
        experiment_b: of the second; that of the first by default, made with the settings of the second.

    Raises:
        ConfigError: there is no position to begin at.

    Examples:
        >>> import tempfile, torch
        >>> import purestep as ps
        >>> @ps.experiment
        ... def linear(changed=0.0):
        ...     tx = ps.optim.sgd(0.01)
        ...     x = torch.arange(16.0).reshape(8, 2)
        ...     x[5, 1] += changed
        ...     step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        ...     data = ps.data.batches({"x": x}, 4, shuffle=False)
        ...     return ps.Experiment(step, ps.init(lambda: torch.nn.Linear(2, 1), tx), data, until=ps.steps(4))
        >>> root = tempfile.mkdtemp()
        >>> for changed in (0.0, 1.0):
        ...     _ = linear(changed).fit(run_dir=f"{root}/{changed}")
        >>> found = ps.bisect(f"{root}/0.0", f"{root}/1.0", linear)
        >>> found.batch.position, [d.path for d in found.batch.differences], found.position
        (2, ["batch['x']"], 2)
        >>> found.operation().a.name, found.operation().inputs_equal
        ('aten.addmm', False)
    """
    records = opened(a), opened(b)
    others = (experiment_a, experiment_a if experiment_b is None else experiment_b)
    sides = [_Side(record, Experiments(record, makes)) for record, makes in zip(records, others, strict=True)]
    names = [side.record.name for side in sides]
    if names[0] == names[1]:
        names = [str(side.record.path) for side in sides]
    return _bisect(sides[0], sides[1], (names[0], names[1]))


@dataclasses.dataclass
class _Side:
    """One of two runs."""

    record: RunRecord
    experiments: Experiments

    @property
    def last(self) -> int:
        return max(self.record.snapshots, default=0)

    def state(self, at: int) -> Any:
        """Return the state at a snapshot, or the first one."""
        experiment = self.experiments.at(at)
        if at in self.record.snapshots:
            return stored(self.record, experiment, at)[0].train
        return experiment.state if at == 0 else None

    def kept(self, found: Replayed) -> Any:
        """Return the state of a step, so that it stays when the next step donates it."""
        donates = facts_of(self.experiments.at(found.position).step).donate
        return copied(found.state) if donates else found.state


def _bisect(a: _Side, b: _Side, names: tuple[str, str]) -> Bisection:
    start, end = _start(a, b), min(a.last, b.last)
    found = Bisection(names, start, end, threads=_threads(a.record, b.record))
    before = (a.state(start), b.state(start))
    if start == 0 and (leaves := tree.diff(*before, root="state")):
        return dataclasses.replace(found, position=0, leaves=leaves, before=before)
    if start >= end:
        return found
    with contextlib.ExitStack() as stack:
        for left, right in _both(stack, (a, b), start, end, found.threads):
            if found.batch is None:
                found = dataclasses.replace(found, batch=_first_batch(left, right))
            if left.digest != right.digest:
                return dataclasses.replace(
                    found,
                    position=left.position,
                    leaves=tree.diff(left.state, right.state, root="state"),
                    before=before,
                    batches=(left.data, right.data),
                    metrics=(left.metrics, right.metrics),
                    steps=(a.experiments.at(left.position).step, b.experiments.at(right.position).step),
                )
            before = (a.kept(left), b.kept(right))
    return dataclasses.replace(found, recorded=_recorded_apart(a.record, b.record))


def _both(
    stack: contextlib.ExitStack, sides: tuple[_Side, _Side], start: int, end: int, threads: tuple[int, int] | None
) -> Iterator[tuple[Replayed, Replayed]]:
    """Execute both a step at a time, each with its number of threads."""
    walks: list[tuple[Iterator[Replayed], int | None]] = []
    for side, count in zip(sides, _counts(threads), strict=True):
        with _computing_with(count):
            steps = contextlib.closing(replayed(side.record, side.experiments, start, end))
            walks.append((stack.enter_context(steps), count))
    for _ in range(start, end):
        found = []
        for walk, count in walks:
            with _computing_with(count):
                found.append(next(walk))
        yield found[0], found[1]


def _threads(a: RunRecord, b: RunRecord) -> tuple[int, int] | None:
    """Return how many threads both ran with, None where that is the same, unknown, or not to be changed here."""
    first, second = (record.environment.get("threads") for record in (a, b))
    if portable.mode() == "portable" or not isinstance(first, int) or not isinstance(second, int) or first == second:
        return None
    return first, second


def _counts(threads: tuple[int, int] | None) -> tuple[int | None, int | None]:
    return (None, None) if threads is None else threads


@contextlib.contextmanager
def _computing_with(threads: int | None) -> Iterator[None]:
    """Compute with so many threads inside; None leaves their number."""
    before = torch.get_num_threads()
    if threads is not None:
        torch.set_num_threads(threads)
    try:
        yield
    finally:
        if threads is not None:
            torch.set_num_threads(before)


def _recorded_apart(a: RunRecord, b: RunRecord) -> int | None:
    states = [{header.step: header.digests.get("state") for header in run.headers} for run in (a, b)]
    both = (step for step in states[0] if states[0][step] and states[1].get(step))
    return min((step for step in both if states[0][step] != states[1][step]), default=None)


def _first_batch(left: Replayed, right: Replayed) -> FirstBatch | None:
    differences = tree.diff(left.data, right.data, root="batch")
    if not differences:
        return None
    places, indices = ((left.epoch, left.batch), (right.epoch, right.batch)), (left.indices, right.indices)
    return FirstBatch(left.position, places, indices, differences, _differing_rows(left.data, right.data))


def _differing_rows(left: Any, right: Any) -> tuple[int, ...]:
    """Return along the leading dim of the tensors of two batches where they differ; () where there is no such dim."""
    pairs = list(zip(tree.leaves(left), tree.leaves(right), strict=False))
    if tree.paths(left) != tree.paths(right) or not all(isinstance(leaf, Tensor) for pair in pairs for leaf in pair):
        return ()
    if len({leaf.shape[:1] for pair in pairs for leaf in pair}) != 1 or any(a.shape != b.shape for a, b in pairs):
        return ()
    samples = pairs[0][0].shape[0] if pairs[0][0].dim() else 0
    return tuple(row for row in range(samples) if tree.diff([a[row] for a, _ in pairs], [b[row] for _, b in pairs]))


def _samples(found: FirstBatch) -> str:
    """Name the samples that differ: by their index where the data says it, else by their place in the batch."""
    named = [str(a) if a == b else f"{a} and {b}" for a, b in found.samples[:_LEAVES]]
    more = ", ..." if len(found.rows) > _LEAVES else ""
    if named:
        return f"{', '.join(named)}{more} of the data set"
    return f"{', '.join(map(str, found.rows[:_LEAVES]))}{more} of the batch"


def _start(a: _Side, b: _Side) -> int:
    equal = last_equal(a.record, b.record)
    if equal is not None:
        return equal
    for side in (a, b):
        if side.record.parent is not None:
            raise ConfigError(
                explain(
                    "there is no position at which both runs are equal",
                    where=f"{side.record.path}: forked from {side.record.parent.run} at {side.record.parent.at}",
                    why="what was before is not in its directory",
                    instead="bisect the run that it was forked from",
                )
            )
    return 0
