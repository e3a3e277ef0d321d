"""Loaders of every kind, cut at every batch: the straight run and the resumed one see the same batches."""

from __future__ import annotations

import os
import runpy
import signal
import warnings
from pathlib import Path

import pytest
import torch
from shared_marks import slow_but

import purestep as ps
from purestep.data import UnsavedStateWarning
from purestep.errors import DataError

SCRIPT = Path(__file__).with_name("loader_kinds.py")
KINDS = runpy.run_path(str(SCRIPT))
OF_SNAPSHOTS = [
    "stream",
    "stream, length",
    "map, sampler with state",
    "nodes",
    "loader, data set keeps numpy's",
    "zip, cycle",
]

pytestmark = [
    pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning"),  # torchdata calls it
    pytest.mark.filterwarnings("ignore::purestep.data.adapters.ReplayWarning"),
]


@pytest.mark.parametrize("kind", slow_but(KINDS["KINDS"], *list(KINDS["KINDS"])[::5]))
def test_a_run_cut_anywhere_sees_the_batches_of_the_straight_one(kind):
    # The threads of grain take their time.
    cuts = [(5,), (7,), (3, 5, 8)] if "grain" in kind else KINDS["all_cuts"](12)
    assert KINDS["differing"](KINDS["KINDS"][kind], 12, cuts) == []


@pytest.mark.parametrize("kind", ["stream", "stream, length", "nodes", "own", "loader, stream keeps, length"])
def test_a_run_sees_the_batches_of_a_plain_loop(kind):
    loader = KINDS["KINDS"][kind]()
    plain = [batch for _ in range(3) for batch in loader]
    assert ps.tree.equal(KINDS["read"](KINDS["KINDS"][kind], (5,), 15), plain)


@pytest.mark.slow
def test_loaders_with_workers(zygote):
    done = zygote.run(SCRIPT, preload="torchdata.stateful_dataloader torchdata.nodes grain.python", timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [f"{kind}: []" for kind in KINDS["WITH_WORKERS"]]


# --- snapshots ------------------------------------------------------------------------------------------------------


def loss_fn(net, batch):
    x = ps.tree.leaves(batch)[0].double().reshape(-1, 1)
    return (net(x) - x.cos()).square().mean()


def run(make, run_dir, *stops, **options):
    """Run to each of the stops, with a new loader each time, and return the last result."""
    tx = ps.optim.sgd(0.1)
    step = ps.make_step(loss_fn, tx)
    for stop in stops:
        state = ps.init(lambda: torch.nn.Linear(1, 1).double(), tx, seed=0)
        result = ps.fit(step, state, make(), until=ps.steps(stop), run_dir=run_dir, loggers=(), **options)
    return result


@pytest.mark.parametrize("kind", slow_but(OF_SNAPSHOTS, "stream", "nodes", "zip, cycle"))
def test_a_run_resumed_at_the_ends_of_its_epochs_has_the_digest_of_the_straight_one(kind, tmp_path):
    make = KINDS["KINDS"][kind]
    saves = [ps.callbacks.snapshots(every=ps.every.epoch())]
    straight = run(make, tmp_path / "straight", 11, callbacks=saves)
    resumed = run(make, tmp_path / "resumed", 5, 8, 10, 11, callbacks=saves)
    assert ps.tree.digest(resumed.loop.train) == ps.tree.digest(straight.loop.train)


@pytest.mark.filterwarnings("ignore::purestep.loop.RunChangedWarning")  # the evaluation that stops the run is another
def test_a_snapshot_that_is_taken_again_before_anything_was_read_keeps_the_state(tmp_path):
    """An evaluation that was cut off is made up for after the resume, and the position is saved with its row."""
    make, val = KINDS["KINDS"]["stream"], [torch.ones(1)]

    def cut(net, batch):
        os.kill(os.getpid(), signal.SIGTERM)
        return loss_fn(net, batch)

    def evaluate(loss):
        return [ps.callbacks.evaluate(loss, val, name="val", every=ps.every.steps(4))]

    straight = run(make, None, 9)
    assert run(make, tmp_path, 7, callbacks=evaluate(cut)).reason == "SIGTERM"
    assert run(make, tmp_path, 4, callbacks=evaluate(loss_fn)).metrics["val/loss"] > 0
    resumed = run(make, tmp_path, 9, callbacks=evaluate(loss_fn))
    assert ps.tree.digest(resumed.loop.train) == ps.tree.digest(straight.loop.train)


def older(state):
    """The state as it was written before places were."""
    return {name: value for name, value in state.items() if name in ("generators", "state_dict", "get_state")}


@pytest.mark.parametrize("kind", ["map", "map, generator", "stream", "own", "iterators with the loader's generator"])
def test_snapshots_of_older_versions_resume_inside_of_an_epoch_and_warn_at_its_end(kind):
    make = KINDS["KINDS"][kind]
    source = ps.data.as_source(make())
    read = list(source.open(0, 0, None))
    first = ps.data.as_source(make())
    batches = first.open(0, 0, None)
    for _ in range(3):
        next(batches)
    again = ps.data.as_source(make())
    assert ps.tree.equal(list(again.open(0, 3, older(first.state()))), read[3:])
    with pytest.warns(UnsavedStateWarning, match=r"(?s)at the end of epoch 0: an older version wrote this snapshot"):
        assert len(list(ps.data.as_source(make()).open(1, 0, older(source.state())))) == len(read)


# --- what cannot be saved -------------------------------------------------------------------------------------------


class Counts:
    """Batches that depend on a number which goes on from epoch to epoch."""

    def __init__(self) -> None:
        self.calls = 0

    def __iter__(self):
        for _ in range(5):
            self.calls += 1
            yield torch.tensor([float(self.calls)])


def test_a_number_that_goes_on_from_epoch_to_epoch_is_told_of(tmp_path):
    with pytest.warns(UnsavedStateWarning) as caught:
        run(Counts, tmp_path, 5, 6)
    assert len(caught) == 1
    assert "the loader continues without a part of its state" in str(caught[0].message)
    assert "Counts, loader.calls" in str(caught[0].message)


def test_in_the_first_epoch_it_is_read_up_to_again():
    first = ps.data.as_source(Counts())
    read = list(first.open(0, 0, None))
    batches = (first := ps.data.as_source(Counts())).open(0, 0, None)
    next(batches)
    assert ps.tree.equal(list(ps.data.as_source(Counts()).open(0, 1, first.state())), read[1:])


def test_it_is_told_of_again_by_the_next_resume():
    first = ps.data.as_source(Counts())
    list(first.open(0, 0, None))
    second = ps.data.as_source(Counts())
    with pytest.warns(UnsavedStateWarning):
        second.open(1, 0, first.state())
    with pytest.warns(UnsavedStateWarning, match=r"loader\.calls"):
        ps.data.as_source(Counts()).open(1, 0, second.state())


class Resident:
    """As a DataLoader with workers that stay."""

    num_workers, persistent_workers = 2, True

    def __iter__(self):
        return iter([torch.zeros(1)] * 3)


def test_workers_that_stay_are_told_of():
    with warnings.catch_warnings():
        warnings.simplefilter("error", UnsavedStateWarning)
        assert len(list(ps.data.as_source(Resident()).open(0, 1, None))) == 2
    with pytest.warns(UnsavedStateWarning, match="the state that its workers keep from one epoch to the next"):
        ps.data.as_source(Resident()).open(1, 0, None)


class Unsavable(Counts):
    """Its state is of a kind that no snapshot can hold."""

    def __len__(self):
        return 5

    def state_dict(self):
        return {"object": self}

    def load_state_dict(self, state):
        raise AssertionError


def test_a_state_that_cannot_be_saved_is_an_error_where_it_would_be_saved(tmp_path):
    assert run(Unsavable, None, 12).loop.cursor.epoch == 2
    with pytest.raises(DataError, match="which a snapshot cannot hold"):
        run(Unsavable, tmp_path, 5)
