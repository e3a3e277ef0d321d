"""Random histories of a run (trained, evaluated, saved, killed, resumed, its callbacks changed) against a reference.

The reference knows arithmetic only: which evaluations, rows and stops each batch owes under the callbacks of its
session. What a run that nobody touches computes at each batch (digest, losses) is tabulated once.
"""

from __future__ import annotations

import copy
import dataclasses
import math
import os
import shutil
import signal
import tempfile
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, precondition, rule
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps
from purestep import tree
from purestep.callbacks import Reducer
from purestep.loggers.csv import read_csv
from purestep.loop import Evaluated, Horizon, Save, StepsDone, Stopped
from purestep.loop.options import RunArguments
from purestep.loop.run import Run
from purestep.preflight import check

# Callbacks are changed from one session to the next, on purpose.
pytestmark = pytest.mark.filterwarnings("ignore::purestep.loop.RunChangedWarning")

EPOCH, END = 3, 15  # batches; the last one of an epoch is smaller
SIZES = (3, 3, 1)
_interrupt: list[bool] = []  # when it holds something, the next evaluation gets a SIGTERM


def table(n, seed):
    x = torch.randn(n, 4, generator=torch.Generator().manual_seed(seed))
    return {"x": x, "y": (x[:, 0] > 0).long()}


def make_model():
    return nn.Sequential(nn.Linear(4, 5), nn.Dropout(0.2), nn.Linear(5, 2))


def loss_fn(net, batch):
    return cross_entropy(net(batch["x"]), batch["y"])


def val_loss(net, batch):
    if _interrupt:
        _interrupt.clear()
        os.kill(os.getpid(), signal.SIGTERM)
    return loss_fn(net, batch)


TX = ps.optim.adamw(0.3)  # so much that the held-out loss goes up and down


@dataclasses.dataclass(frozen=True)
class OnDemand(Reducer):
    """Asks for a snapshot where the test says so, and for every batch to be a boundary."""

    wished: list[bool] = dataclasses.field(repr=False)
    name: str = "on_demand"

    def react(self, own, event, view):
        return own, ((Save(),) if isinstance(event, StepsDone) and self.wished and not self.wished.clear() else ())

    def horizon(self, view):
        return Horizon(1)


@dataclasses.dataclass(frozen=True)
class Setup:
    """The callbacks of a session; None leaves one out, and 0 evaluates at the end of an epoch."""

    evaluate: int | None = 0
    patience: int | None = 10**6
    log: int = 2
    save: int | None = None
    observed: bool = False

    @property
    def stops(self) -> int | None:
        """The patience that counts: without evaluations early stopping is refused, and left out here."""
        return None if self.evaluate is None else self.patience

    def evaluates(self, at: int) -> bool:
        return self.evaluate is not None and at % (self.evaluate or EPOCH) == 0

    def callbacks(self, wished: list[bool]) -> list[Any]:
        out: list[Any] = [OnDemand(wished), ps.callbacks.log(every=ps.every.steps(self.log))]
        if self.evaluate is not None:
            when = ps.every.steps(self.evaluate) if self.evaluate else ps.every.epoch()
            held_out = ps.data.batches(table(5, 1), 3, shuffle=False, drop_last=False)
            out.append(ps.callbacks.evaluate(val_loss, held_out, every=when))
        if self.stops is not None:
            out.append(ps.callbacks.early_stopping("val/loss", patience=self.stops))
        if self.save is not None:
            out.append(ps.callbacks.snapshots(every=ps.every.steps(self.save), keep=ps.snapshot.latest(2)))
        if self.observed:
            out.append(ps.callbacks.tap(lambda event, loop: None))
        return out


def start(setup, run_dir, *, wished, how="auto"):
    train = ps.data.batches(table(7, 0), 3, seed=5, drop_last=False)
    return Run(
        RunArguments(
            ps.make_step(loss_fn, TX),
            ps.init(make_model, TX, seed=0),
            train,
            until=ps.steps(END),
            callbacks=setup.callbacks(wished),
            run_dir=run_dir,
            resume=how,
        )
    )


@dataclasses.dataclass(frozen=True)
class Undisturbed:
    """What happens at each batch, whoever watches: by number of batches."""

    digests: dict[int, str]
    losses: dict[int, float]
    held_out: dict[int, float]


@pytest.fixture(scope="module", autouse=True)
def undisturbed():
    with pytest.MonkeyPatch.context() as patch:
        # The dry runs would take a third of the time, and are tested elsewhere.
        patch.setattr(check, "check_step", lambda *args: None)
        patch.setattr(check, "check_eval", lambda *args, **options: ("loss",))
        Machine.known = _undisturbed()
        yield


def _undisturbed():
    digests = {}
    with tempfile.TemporaryDirectory() as run_dir:
        run = start(Setup(evaluate=1, log=1), run_dir, wished=[])
        for event in run:
            if isinstance(event, StepsDone):
                digests[run.loop.cursor.batches] = tree.digest(run.loop.train)
        rows = read_csv(run_dir)
    known = Undisturbed(
        digests,
        dict(zip(rows["step"], rows["train/loss"], strict=True)),
        dict(zip(rows["step"], rows["val/loss"], strict=True)),
    )
    assert len(set(digests.values())) == len(known.held_out) == END
    return known


# --- the reference ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Model:
    """What a run has to have come to.

    Attributes:
        at: batches.
        owed: whether an evaluation is due and not done.
        evaluations: where the effective history has evaluated, once each.
        rows: of `metrics.csv`, by step.
        told: where the log has an evaluation that a session made after the snapshot which this history goes on from.
        since: batches that the next row of the log is the mean of.
        waiting: best value and checks without a better one; None without early stopping.
    """

    at: int = 0
    owed: bool = False
    evaluations: tuple[int, ...] = ()
    rows: dict[int, dict[str, float]] = dataclasses.field(default_factory=dict)
    since: tuple[int, ...] = ()
    waiting: tuple[float, int] | None = None
    told: tuple[int, ...] = ()

    def restored(self, rows: dict[int, dict[str, float]]) -> Model:
        """Return this model, given what the log has: a row of the same position stays, it is true of the same state."""
        model, row = copy.copy(self), rows.get(self.at, {})
        if "val/loss" in row.keys() - self.rows.get(self.at, {}).keys():
            model.rows = self.rows | {self.at: self.rows.get(self.at, {}) | row}
            model.told = (*self.told, self.at)
        return model

    def begin(self, setup: Setup) -> None:
        """A session begins: a new callback starts fresh, one that is gone is forgotten with what it wished."""
        self.owed = self.owed and setup.evaluate is not None
        self.waiting = None if setup.stops is None else self.waiting or (math.inf, 0)

    def batch(self, setup: Setup, known: Undisturbed) -> None:
        assert not self.owed, f"the evaluation at batch {self.at} was left out"
        self.at += 1
        self.since = (*self.since, self.at)
        if self.at % setup.log == 0:
            self._row({"train/loss": _mean(known.losses, self.since)})
            self.since = ()
        if self.at % EPOCH == 0:
            self._row({"train/loss_epoch": _mean(known.losses, range(self.at - EPOCH + 1, self.at + 1))})
        self.owed = setup.evaluates(self.at)

    def evaluated(self, value: float, known: Undisturbed) -> None:
        assert self.owed, f"an evaluation at batch {self.at} that nobody asked for"
        assert value == known.held_out[self.at]
        self.owed = False
        self.evaluations = (*self.evaluations, self.at)
        self._row({"val/loss": value})
        if self.waiting is not None:
            best, wait = self.waiting
            self.waiting = (value, 0) if value < best else (best, wait + 1)

    def stops(self, setup: Setup) -> bool:
        return setup.stops is not None and self.waiting is not None and self.waiting[1] >= setup.stops

    def _row(self, values: dict[str, float]) -> None:
        self.rows = self.rows | {self.at: self.rows.get(self.at, {}) | {"epoch": self.at // EPOCH} | values}


def _mean(losses, batches):
    weights = [SIZES[(b - 1) % EPOCH] for b in batches]
    return sum(losses[b] * w for b, w in zip(batches, weights, strict=True)) / sum(weights)


# --- the histories ------------------------------------------------------------------------------------------------

SETUPS = st.builds(
    Setup,
    evaluate=st.sampled_from([0, 0, 2, 5, None]),
    patience=st.sampled_from([1, 2, 10**6, None]),
    log=st.sampled_from([1, 2, 4]),
    save=st.sampled_from([None, None, 1, 3]),
    observed=st.booleans(),
)


class Machine(RuleBasedStateMachine):
    known: Undisturbed

    @initialize()
    def nothing_yet(self) -> None:
        self.root = Path(tempfile.mkdtemp(prefix="purestep-fuzz-"))
        self.run_dir, self.count = self.root / "0", 0
        self.run: Any = None
        self.setup, self.model = Setup(), Model()
        self.durable: dict[int, Model] = {}  # the model at each snapshot, by number

    def teardown(self) -> None:
        try:
            if hasattr(self, "root"):
                self.finish()
        finally:
            self.drop()
            shutil.rmtree(getattr(self, "root", ""), ignore_errors=True)

    # --- what can happen ----------------------------------------------------------------------------------------------

    @precondition(lambda self: self.run is None)
    @rule(setup=SETUPS)
    def resume(self, setup: Setup) -> None:
        self.begin(setup)

    @precondition(lambda self: self.run is None and len(ps.snapshot.steps(self.run_dir)) > 1)
    @rule(setup=SETUPS)
    def go_back(self, setup: Setup) -> None:
        self.begin(setup, how=ps.snapshot.steps(self.run_dir)[-2])

    @precondition(lambda self: self.run is not None)
    @rule(batches=st.integers(1, 5))
    def train(self, batches: int) -> None:
        self.advance(batches)

    @precondition(lambda self: self.run is not None)
    @rule()
    def save(self) -> None:
        self.wished.append(True)
        self.advance(2)

    @precondition(lambda self: self.run is not None)
    @rule()
    def kill(self) -> None:
        """What is on the disk now is all that is left. A save in flight has just come through: `testing.faults` kills
        inside of one."""
        self.run._saving.store.busy(60)
        self.run._outlets.flush()
        self.count += 1
        left, self.run_dir = self.run_dir, self.root / str(self.count)
        shutil.copytree(left, self.run_dir)
        self.drop()
        self.model = self._restored()

    @precondition(lambda self: self.run is not None)
    @rule(inside=st.booleans())
    def terminate(self, inside: bool) -> None:
        """SIGTERM, now or inside of the next evaluation."""
        if inside:
            _interrupt.append(True)
        else:
            os.kill(os.getpid(), signal.SIGTERM)
        self.advance(END)

    # --- how it is done -----------------------------------------------------------------------------------------------

    def begin(self, setup: Setup, *, how: Any = "auto") -> None:
        assert ps.snapshot.steps(self.run_dir)[-1:] == sorted(self.durable)[-1:]
        if how != "auto":
            self.durable = {n: m for n, m in self.durable.items() if n <= how}
        self.model = self._restored()
        self.setup, self.wished = setup, []
        self.run = start(setup, self.run_dir, wished=self.wished, how=how)
        next(self.run)
        self.model.begin(setup)
        assert self.run.loop.cursor.batches == self.model.at
        self.run._saving.store.save = self._saving(self.run._saving.store.save)

    def _restored(self) -> Model:
        return self.durable[max(self.durable)].restored(self.model.rows) if self.durable else Model()

    def _saving(self, save: Any) -> Any:
        def noted(number: int, loop: Any, **more: Any) -> None:
            save(number, loop, **more)
            kept = {n: m for n, m in self.durable.items() if n < number}
            self.durable = {**kept, number: copy.copy(self.model)}

        return noted

    def advance(self, batches: int) -> None:
        """Let so many batches happen, or less when the run ends."""
        for event in self.run:
            if isinstance(event, StepsDone):
                assert event.count == 1
                self.model.batch(self.setup, self.known)
                assert tree.digest(self.run.loop.train) == self.known.digests[self.model.at]
                batches -= 1
            elif isinstance(event, Evaluated):
                self.model.evaluated(event.row["val/loss"], self.known)
            elif isinstance(event, Stopped):
                self.stopped(event.reason)
                return
            if batches <= 0 and isinstance(event, StepsDone) and not event.epoch_end:
                return

    def stopped(self, reason: str) -> None:
        wanted = "early stopping" if self.model.stops(self.setup) else f"reached {END} steps"
        assert reason.startswith(wanted) or reason == "SIGTERM"
        assert reason == "SIGTERM" or not self.model.owed
        assert max(self.durable) == self.model.at
        self.drop()
        self.compare_rows()

    def drop(self) -> None:
        run, self.run = getattr(self, "run", None), None
        _interrupt.clear()
        if run is not None and run._events is not None:
            run._events.close()

    def compare_rows(self) -> None:
        columns = read_csv(self.run_dir)
        found = {
            step: {name: column[i] for name, column in columns.items() if name != "step" and column[i] is not None}
            for i, step in enumerate(columns["step"])
        }
        assert {s: set(r) for s, r in found.items()} == {s: set(r) for s, r in self.model.rows.items()}
        for step, row in self.model.rows.items():
            assert found[step] == pytest.approx(row, rel=1e-12)

    def finish(self) -> None:
        """To the end, without early stopping: nothing of what happened before may be seen."""
        if self.run is not None:
            self.kill()
        self.begin(Setup())
        self.advance(END + 1)
        assert self.run is None
        assert self.model.at == END
        assert len(set(self.model.evaluations)) == len(self.model.evaluations)
        logged = {s for s, r in self.model.rows.items() if "val/loss" in r}
        assert logged == {*self.model.evaluations, *self.model.told}


class TestHistories(Machine.TestCase):
    # A history is short enough to read as it is, and shrinking takes minutes.
    settings = settings(
        max_examples=6,
        stateful_step_count=14,
        deadline=None,
        phases=(Phase.reuse, Phase.generate),
        suppress_health_check=list(HealthCheck),
    )

    @pytest.fixture(autouse=True)
    def _quiet(self):
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            warnings.simplefilter("ignore", ps.loop.RunChangedWarning)
            yield


@pytest.mark.slow
class TestMoreHistories(TestHistories):
    settings = settings(TestHistories.settings, max_examples=20)


def test_what_was_evaluated_after_the_last_snapshot_stays_in_the_log():
    """A history that the fuzz once found: killed after an evaluation was made up for, gone on without evaluations."""
    machine = Machine()
    machine.nothing_yet()
    machine.resume(setup=Setup(log=1, patience=None))
    machine.terminate(inside=True)  # the evaluation of the epoch is owed from here on
    machine.resume(setup=Setup(evaluate=5, patience=None, log=1))
    machine.train(batches=5)
    machine.kill()
    machine.resume(setup=Setup(evaluate=None, log=4))
    assert machine.model.told == (EPOCH,)
    machine.save()
    machine.terminate(inside=False)
    machine.teardown()
