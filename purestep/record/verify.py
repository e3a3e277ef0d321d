"""`verify`: the spans between the snapshots of a run, executed again and compared with what is stored."""

from __future__ import annotations

import collections
import dataclasses
import itertools
from collections.abc import Iterator
from pathlib import Path

from purestep import tree
from purestep.arguments import Count, checked
from purestep.errors import ConfigError, CorruptSnapshot, PurestepError
from purestep.record.experiment import Experiment, Makes
from purestep.record.replay import Experiments, Replayed, Which, begun, opened, positions
from purestep.record.run_record import RunRecord
from purestep.record.run_record import open as open_run
from purestep.views import Block, Note, Printed, Table


@dataclasses.dataclass(frozen=True, repr=False)
class Span(Printed):
    """What came of executing one span again.

    Attributes:
        first, last: its positions: from one snapshot to the next; equal for the place where a fork began.
        differences: of the train state that was computed now (left) from the stored one (right), by leaf.
        damage: what cannot be read, "" when all can.
        elsewhere: whether the states differ, but the one of the parent is not there any more to name the leaves.
    """

    first: int
    last: int
    differences: tree.Differences = dataclasses.field(default_factory=tree.Differences)
    damage: str = ""
    elsewhere: bool = False

    @property
    def equal(self) -> bool:
        return not (self.differences or self.damage or self.elsewhere)

    @property
    def found(self) -> str:
        """What was found, on one line."""
        if self.damage:
            return f"damaged: {self.damage.partition(chr(10))[0]}"
        if self.elsewhere:
            return "not the state of the parent"
        if not self.differences:
            return "the same bits"
        count = len(self.differences)
        return f"{count} {'leaf differs' if count == 1 else 'leaves differ'}: {self.differences[0]}"

    @property
    def steps(self) -> str:
        """Its positions, as text."""
        return f"{self.first} to {self.last}" if self.first < self.last else f"{self.first}, of the parent"

    def view(self) -> list[Block]:
        table = self.differences.view() if self.differences else []
        how = f"computed from {self.first}" if self.first < self.last else "where the fork began"
        return [Note(f"at {self.last}, {how}: {self.found}"), *table]


@dataclasses.dataclass(frozen=True, repr=False)
class Verification(Printed):
    """The result of `verify`.

    Attributes:
        path: of the run.
        spans: that were executed again, in order.
    """

    path: Path
    spans: tuple[Span, ...]

    @property
    def ok(self) -> bool:
        """Whether every span ended in the bits that are stored."""
        return all(span.equal for span in self.spans)

    @property
    def first(self) -> Span | None:
        """The first span that did not."""
        return next((span for span in self.spans if not span.equal), None)

    def _rows(self) -> list[list[object]]:
        return [[span.steps, span.found if span.equal else "DIFFERS"] for span in self.spans]

    def view(self) -> list[Block]:
        table = Table(["steps", self.path.name], self._rows())
        return [table, *([Note("verified")] if self.first is None else self.first.view())]


@checked(ConfigError)
def verify(run: Which, experiment: Makes, *, every: Count = 1) -> Verification:
    """Execute the spans between the snapshots of a run again, and compare the train states bit for bit.

    It finds what no checksum can: a bit that flipped in memory before it was saved, code or data that are not those of
    the run, a machine that computes otherwise. The span that ends at a snapshot begins at the one before, or at the
    beginning of the experiment, so the first span that differs is where it happened. A fork is compared with its parent
    at the position where it began.

    Args:
        run: a run, or its directory.
        experiment: what it was made of, or a function that makes it from the settings of the run. A run that was
            resumed under other settings is made with those of each span.
        every: execute one span out of so many, the last one among them.

    Examples:
        >>> import tempfile, torch
        >>> import purestep as ps
        >>> @ps.experiment
        ... def linear(lr=0.1):
        ...     tx = ps.optim.sgd(lr)
        ...     step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        ...     data = ps.data.batches({"x": torch.arange(16.0).reshape(8, 2)}, 4)
        ...     saving = ps.callbacks.snapshots(keep=ps.snapshot.all_())
        ...     state = ps.init(lambda: torch.nn.Linear(2, 1), tx)
        ...     return ps.Experiment(step, state, data, until=ps.epochs(2), callbacks=[saving])
        >>> run_dir = f"{tempfile.mkdtemp()}/linear"
        >>> _ = linear(0.01).fit(run_dir=run_dir)
        >>> ps.verify(run_dir, linear)
        steps   linear
        0 to 2  the same bits
        2 to 4  the same bits
        verified
    """
    record = opened(run)
    return Verification(record.path, tuple(_spans(record, Experiments(record, experiment), every)))


def _spans(record: RunRecord, experiments: Experiments, every: int) -> Iterator[Span]:
    if (root := _root(record, experiments)) is not None:
        yield root
    places = record.snapshots if record.parent is not None else sorted({0, *record.snapshots})
    spans = list(itertools.pairwise(places))
    warn = True
    for first, last in spans[(len(spans) - 1) % every :: every]:
        experiment = experiments.at(last)
        try:
            with begun(record, experiment, first, last, warn=warn) as replaying:
                (found,) = collections.deque(positions(replaying, last), maxlen=1)
                yield Span(first, last, _differences(record, experiment, found, last))
        except CorruptSnapshot as error:
            yield Span(first, last, damage=str(error))
        warn = False  # once is enough


def _differences(record: RunRecord, experiment: Experiment, found: Replayed, at: int) -> tree.Differences:
    if found.digest == record.header(at).digests.get("state"):
        return tree.Differences()
    return tree.diff(found.state, record.state(experiment.state, step=at), root="state")


def _root(record: RunRecord, experiments: Experiments) -> Span | None:
    """Compare where a fork began with its parent; None for a run that is no fork, or begins at a later snapshot."""
    parent = record.parent
    if parent is None or parent.at not in record.snapshots:
        return None
    experiment = experiments.at(parent.at)
    try:
        state = record.state(experiment.state, step=parent.at)
    except CorruptSnapshot as error:
        return Span(parent.at, parent.at, damage=str(error))
    if tree.digest(state) == parent.digest:
        return Span(parent.at, parent.at)
    try:
        original = open_run(parent.run).state(experiment.state, step=parent.at)
    except PurestepError:
        return Span(parent.at, parent.at, elsewhere=True)
    return Span(parent.at, parent.at, tree.diff(original, state, root="state"))
