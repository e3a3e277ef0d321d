"""The identity of a run: each change between two calls, and what a resume says of it, strict or not."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import torch
from shared_marks import slow_but
from torch import nn
from torch.utils.data import DataLoader, Dataset

import purestep as ps
from purestep.errors import DataError, SnapshotError, TemplateMismatch
from purestep.loop import RunChangedWarning
from purestep.loop.stable_json import stable
from purestep.snapshot.manifest import DATA, seal, unseal

ANOTHER = "the run that goes on here is not the one that was saved"


def loss_fn(net, batch):
    return net(batch["x"]).square().mean()


def twin(number, smoothing=0.0):
    """Return loss functions of one name, as if the script had been edited between two calls."""

    def first():
        def loss(net, batch):
            return net(batch["x"]).square().mean() + smoothing

        return loss

    def commented():
        def loss(net, batch):
            # A comment, and a blank line.

            return net(batch["x"]).square().mean() + smoothing

        return loss

    def edited():
        def loss(net, batch):
            return net(batch["x"]).abs().mean() + smoothing

        return loss

    chosen = (first, commented, edited)[number]()
    chosen.__qualname__ = "loss"
    return chosen


def halved(sample, key):
    return {"x": sample["x"] / 2}


def doubled(sample, key):
    return {"x": sample["x"] * 2}


class Mean(Dataset):
    """A data set of samples."""

    def __init__(self, n=40):
        self.n = n

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        return {"x": torch.full((3,), float(index))}


def table(n=40, fill=None):
    x = torch.arange(3.0 * n).reshape(n, 3)
    return {"x": x if fill is None else torch.full_like(x, fill)}


def batches(dataset=None, batch_size=4, **options):
    return ps.data.batches(table() if dataset is None else dataset, batch_size, **{"seed": 3, **options})


def loader(n=40, batch_size=4, **options):
    return DataLoader(Mean(n), batch_size, **options)


def run(run_dir, until, *, data=None, loss=loss_fn, tx=None, callbacks=(), state_seed=0, **options):
    tx = ps.optim.adamw(1e-6) if tx is None else tx
    step = loss if options.pop("by_hand", False) else ps.make_step(loss, tx)
    state = ps.init(lambda: nn.Linear(3, 1), tx, seed=state_seed)
    train = batches() if data is None else data()
    return ps.fit(step, state, train, until=ps.steps(until), callbacks=callbacks, run_dir=run_dir, **options)


def stopping(patience=3):
    return ps.callbacks.early_stopping("train/loss_epoch", patience=patience)


def evaluation(data=None, every=2):
    return ps.callbacks.evaluate(loss_fn, data or batches(shuffle=False), every=ps.every.steps(every))


def chained(rate):
    return ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.sgd(ps.optim.cosine_decay_schedule(rate, 20)))


# Options of the first call, those of the second one, and what it says: nothing, or lines of a warning.
SILENT = {
    "nothing": ({}, {}),
    "another end and another seed of a state that is not used": ({}, {"state_seed": 7}),
    "how batches are fetched": ({}, {"data": lambda: batches(prefetch=5, pin_memory=True)}),
    "how a loader fetches them": (
        {"data": lambda: loader()},
        {"data": lambda: loader(pin_memory=torch.accelerator.is_available(), persistent_workers=False)},
    ),
    "batches that are fetched ahead": ({}, {"data": lambda: ps.data.prefetch(batches(), "cpu")}),
    "comments of the loss": ({"loss": twin(0)}, {"loss": twin(1)}),
    "loggers": ({}, {"loggers": []}),
    "callbacks that only look on": (
        {},
        {"callbacks": [ps.callbacks.tap(lambda event, loop: None), ps.callbacks.progress(refresh=9.0)]},
    ),
    "when and what is saved": (
        {"callbacks": [ps.callbacks.snapshots(every=ps.every.steps(5))]},
        {"callbacks": [ps.callbacks.snapshots(keep=ps.snapshot.latest(2))]},
    ),
    "a donating step": ({}, {"donate": True}),
}

WARNED = {
    "seed": ({}, {"data": lambda: batches(seed=4)}, ["data.seed: saved with 3, now 4", "at batch 7 of epoch 0"]),
    "order": ({}, {"data": lambda: batches(shuffle=False)}, ["data.shuffle: saved with True, now False"]),
    "a smaller batch": ({}, {"data": lambda: batches(batch_size=2)}, ["data.batch_size: saved with 4, now 2"]),
    "more samples": ({}, {"data": lambda: batches(table(60))}, ["data.samples: saved with 40, now 60"]),
    "content of small data": (
        {},
        {"data": lambda: batches(table(fill=1.0))},
        ["data.dataset.x: its content has changed (float32[40, 3])"],
    ),
    "drop_last": ({}, {"data": lambda: batches(drop_last=False)}, ["data.drop_last: saved with True, now False"]),
    "limit": ({}, {"data": lambda: batches().take(8)}, ["data.limit: saved with None, now 8"]),
    "transform": (
        {"data": lambda: batches(transform=halved)},
        {"data": lambda: batches(transform=doubled)},
        ["data.transform: saved with", "test_identity.halved, now", "test_identity.doubled"],
    ),
    "kind of data": ({}, {"data": lambda: [{"x": torch.ones(2, 3)}] * 9}, ["data: saved with Batches(", "now list("]),
    "a loader's order": (
        {"data": lambda: loader()},
        {"data": lambda: loader(shuffle=True)},
        ["data.sampler: saved with 'torch.utils.data.sampler.SequentialSampler', now 'torch.utils.data.sampler.Random"],
    ),
    "a loader's batch size": (
        {"data": lambda: loader()},
        {"data": lambda: loader(batch_size=5)},
        ["data.batch_size: saved with 4, now 5", "data.length: saved with 10, now 8"],
    ),
    "a loader's data set": (
        {"data": lambda: loader()},
        {"data": lambda: loader(50)},
        ["data.samples: saved with 40, now 50"],
    ),
    "a part of zipped data": (
        {"data": lambda: ps.data.concat(batches(), batches(seed=1))},
        {"data": lambda: ps.data.concat(batches(), batches(seed=2))},
        ["data.parts[1].seed: saved with 1, now 2"],
    ),
    "taken batches": (
        {"data": lambda: ps.data.take(loader(), 9)},
        {"data": lambda: ps.data.take(loader(), 8)},
        ["data.count: saved with 9, now 8"],
    ),
    "learning rate": ({}, {"tx": ps.optim.adamw(1e-5)}, ["step.tx.learning_rate: saved with 1e-06, now 1e-05"]),
    "a schedule in a chain": (
        {"tx": chained(0.1)},
        {"tx": chained(0.2)},
        ["step.tx.transforms[1].learning_rate.init_value: saved with 0.1, now 0.2"],
    ),
    "weight decay": (
        {},
        {"tx": ps.optim.adamw(1e-6, weight_decay=0.0)},
        ["step.tx.weight_decay: saved with 0.01, now 0.0"],
    ),
    "source of the loss": (
        {"loss": twin(0)},
        {"loss": twin(2)},
        ["step.loss_fn: the source of", "test_identity.loss has changed"],
    ),
    "a constant of the loss": (
        {"loss": twin(0)},
        {"loss": twin(0, smoothing=0.5)},
        ["step.loss_fn.smoothing: saved with 0.0, now 0.5"],
    ),
    "the loss function": (
        {},
        {"loss": twin(0)},
        ["step.loss_fn: saved with", "test_identity.loss_fn, now", "test_identity.loss\n"],
    ),
    "an argument of a callback": (
        {"callbacks": [stopping(3)]},
        {"callbacks": [stopping(4)]},
        ["callbacks.early_stopping.patience: saved with 3, now 4"],
    ),
    "a new callback": ({}, {"callbacks": [stopping()]}, ["callbacks.early_stopping: new, EarlyStopping(monitor="]),
    "a callback that is gone": (
        {"callbacks": [stopping()]},
        {},
        ["callbacks.early_stopping: saved with EarlyStopping(monitor=", "now without"],
    ),
    "data of an evaluation": (
        {"callbacks": [evaluation()]},
        {"callbacks": [evaluation(batches(batch_size=8, shuffle=False))]},
        ["callbacks.val.data.batch_size: saved with 4, now 8"],
    ),
    "cadence of an evaluation": (
        {"callbacks": [evaluation()]},
        {"callbacks": [evaluation(every=3)]},
        ["callbacks.val.every.n: saved with 2, now 3"],
    ),
}

# The position, batch 7 of epoch 0, is not in the data any more.
REFUSED = {
    "a larger batch": ({}, {"data": lambda: batches(batch_size=8)}, ["data.batch_size: saved with 4, now 8"], 5),
    "fewer samples": ({}, {"data": lambda: batches(table(20))}, ["data.samples: saved with 40, now 20"], 5),
    "a limit": ({}, {"data": lambda: batches().take(6)}, ["data.limit: saved with None, now 6"], 6),
    "another kind": ({}, {"data": lambda: [{"x": torch.ones(2, 3)}] * 3}, ["data: saved with Batches(", "list("], 3),
    "a loader's batch size": (
        {"data": lambda: loader()},
        {"data": lambda: loader(batch_size=20)},
        ["data.batch_size: saved with 4, now 20"],
        2,
    ),
}


def is_replay(caught):
    return issubclass(caught.category, ps.data.ReplayWarning)


@pytest.mark.parametrize("case", slow_but(SILENT, *list(SILENT)[::2]))
@pytest.mark.filterwarnings("ignore::purestep.data.ReplayWarning")
def test_what_does_not_make_it_another_run_is_not_told(case, tmp_path):
    first, second = SILENT[case]
    run(tmp_path, 7, **first)
    run(tmp_path, 8, **second)
    assert run(tmp_path, 9, **first, strict=True).loop.cursor.batches == 9


@pytest.mark.parametrize("case", slow_but(WARNED, *list(WARNED)[::3]))
def test_a_change_is_a_warning_and_with_strict_an_error(case, tmp_path):
    first, second, lines = WARNED[case]
    run(tmp_path, 7, **first)
    with pytest.raises(SnapshotError) as refused:
        run(tmp_path, 9, **second, strict=True)
    assert ps.snapshot.steps(tmp_path) == [7]  # nothing is lost
    with pytest.warns(UserWarning) as caught:  # noqa: PT030
        result = run(tmp_path, 9, **second)
    (warned,) = [w for w in caught if not is_replay(w)]
    assert warned.category is RunChangedWarning
    assert str(warned.message) == str(refused.value)
    for line in [ANOTHER, *lines]:
        assert line in str(warned.message)
    assert result.loop.cursor.batches == 9
    # From here on it is the run that goes on.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ps.data.ReplayWarning)
        run(tmp_path, 10, **second, strict=True)


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize("case", REFUSED)
def test_a_position_that_is_no_place_in_other_data_names_the_cause(case, strict, tmp_path):
    first, second, lines, length = REFUSED[case]
    run(tmp_path, 7, **first)
    with pytest.raises(DataError) as caught:
        run(tmp_path, 9, **second, strict=strict)
    text = str(caught.value)
    assert text.startswith("the position of the snapshot is no place in the data")
    for line in [*lines, "epoch 0, batch 7", f"an epoch has {length} batches now"]:
        assert line in text
    assert ps.snapshot.steps(tmp_path) == [7]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ps.data.ReplayWarning)
        run(tmp_path, 9, **first, strict=True)


def test_between_two_epochs_other_batches_are_a_defined_way_to_go_on(tmp_path):
    run(tmp_path, 10)
    with pytest.warns(RunChangedWarning, match=r"data\.batch_size: saved with 4, now 8") as caught:
        result = run(tmp_path, 15, data=lambda: batches(batch_size=8))
    assert "may miss samples" not in str(caught[0].message)
    assert (result.loop.cursor.epoch, result.loop.cursor.batch) == (2, 0)


def test_a_run_directory_that_was_moved_holds_the_same_run(tmp_path):
    run(tmp_path / "a", 7)
    (tmp_path / "a").rename(tmp_path / "b")
    run(tmp_path / "b", 9, strict=True)


@pytest.mark.parametrize(("field", "line"), [("python", "code.python: saved with '3.0.0', now"), ("purestep", "0.0.9")])
def test_code_of_another_version(field, line, tmp_path):
    run(tmp_path, 7)
    rewrite(tmp_path, lambda identity: identity["code"].update({field: "3.0.0" if field == "python" else "0.0.9"}))
    with pytest.warns(RunChangedWarning, match=f"code.{field}: saved with") as caught:
        run(tmp_path, 9)
    assert line in str(caught[0].message)


def test_conditions_and_changes_are_one_warning(tmp_path, monkeypatch):
    run(tmp_path, 7)
    monkeypatch.setattr(torch, "__version__", "0.0.1")
    with pytest.warns(RunChangedWarning, match=r"(?s)data.seed: saved with 3, now 4\n.*torch: saved under ") as caught:
        run(tmp_path, 9, data=lambda: batches(seed=4))
    assert len(caught) == 1
    assert f"pip install torch=={torch.version.__version__}" in str(caught[0].message)


@pytest.mark.filterwarnings("ignore::purestep.loop.not_finite.NotFiniteWarning")  # the other loss diverges
def test_a_step_written_by_hand_is_told_by_its_source(tmp_path):
    tx = ps.optim.sgd(0.1)

    def by_hand(inner):
        def step(state, batch):
            return inner(state, batch)

        return step

    one, other = (by_hand(ps.make_step(twin(number), tx)) for number in (0, 2))
    run(tmp_path, 7, loss=one, tx=tx, by_hand=True)
    run(tmp_path, 8, loss=one, tx=tx, by_hand=True, strict=True)
    # What it calls is not followed: only what decorates it is.
    run(tmp_path, 9, loss=other, tx=tx, by_hand=True, strict=True)


def test_another_optimizer_is_the_cause_that_is_named(tmp_path):
    run(tmp_path, 7)
    with pytest.raises(TemplateMismatch, match=r"step\.tx: saved with Adam\([\s\S]*now Sgd\("):
        run(tmp_path, 9, tx=ps.optim.sgd(0.1))


def test_going_back_compares_before_later_snapshots_are_deleted(tmp_path):
    keep = [ps.callbacks.snapshots(every=ps.every.steps(2), keep=ps.snapshot.latest(5))]
    run(tmp_path, 6, callbacks=keep)
    with pytest.raises(SnapshotError, match=r"data\.seed"):
        run(tmp_path, 8, callbacks=keep, data=lambda: batches(seed=4), resume=2, strict=True)
    assert ps.snapshot.steps(tmp_path) == [2, 4, 6]


# --- older and other snapshots ----------------------------------------------------------------------------------------


def rewrite(run_dir, change):
    """Change what a snapshot says of the identity of its run, and seal it again."""
    (file,) = Path(run_dir).glob(f"snapshots/*/{DATA}")
    head = unseal(file.read_bytes(), DATA)
    held = head["info"]
    new = change(held["identity"])
    if new is not None:
        held.update(new)
        held = {name: value for name, value in held.items() if value is not ...}
    file.write_bytes(seal({**head, "info": held}))


@pytest.mark.parametrize("strict", [False, True])
def test_a_snapshot_without_an_identity_resumes_without_a_word(strict, tmp_path):
    run(tmp_path, 7)
    rewrite(tmp_path, lambda identity: {"identity": ...})
    assert "identity" not in ps.snapshot.manifest(tmp_path, 7).info
    run(tmp_path, 9, data=lambda: batches(seed=4), strict=strict)
    assert ps.snapshot.manifest(tmp_path, 9).info["identity"]["data"]["seed"] == 4


def test_parts_that_a_snapshot_does_not_record_are_not_compared(tmp_path):
    run(tmp_path, 7)
    rewrite(tmp_path, lambda identity: {"identity": {"code": identity["code"]}})
    run(tmp_path, 9, data=lambda: batches(seed=4), strict=True)


@pytest.mark.parametrize("forged", [3, "text", [], {"data": 3}, {"data": {"class": []}}, {"step": [[[[[[[[]]]]]]]]}])
def test_an_identity_that_makes_no_sense_stops_no_run(forged, tmp_path):
    run(tmp_path, 7)
    rewrite(tmp_path, lambda identity: {"identity": forged})
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RunChangedWarning)
        assert run(tmp_path, 9).loop.cursor.batches == 9


def test_digests_do_not_know_of_it(tmp_path):
    run(tmp_path / "a", 7)
    run(tmp_path / "b", 7, loss=twin(0))
    one, other = (ps.snapshot.manifest(tmp_path / name, 7) for name in "ab")
    assert one.info["identity"] != other.info["identity"]
    assert one.digests == other.digests


# --- deterministic ----------------------------------------------------------------------------------------------------

PROCESS = """
import json, sys
sys.path[:0] = [sys.argv[1], sys.argv[1] + "/../shared"]
import test_identity as tests
from purestep.loop.identity import Identity
import purestep as ps
data = tests.batches(transform=tests.halved)
step = ps.make_step(tests.loss_fn, ps.optim.adamw(0.1, mask=lambda params: params))
names = {"one", "two", "three", "four"}
callbacks = [tests.evaluation(tests.loader()), ps.callbacks.transform(tests.halved, every=ps.every.epoch(), name="t")]
print(json.dumps([Identity(data, step, callbacks).plain, tests.stable([names, tests.Plain(names), object()])]))
"""


class Plain:
    def __init__(self, words, other=print):
        self.words, self.other = words, other


@pytest.mark.slow
def test_it_is_the_same_in_every_process():
    def described(hash_seed):
        environment = {**os.environ, "PYTHONHASHSEED": hash_seed}
        command = [sys.executable, "-c", PROCESS, str(Path(__file__).parent)]
        return subprocess.run(command, env=environment, text=True, capture_output=True, check=True, timeout=120).stdout

    one, other = described("1"), described("2")
    assert one == other
    assert "0x" not in one
    identity, odd = json.loads(one)
    assert set(identity) == {"data", "step", "callbacks", "code"}
    assert odd[0] == ["four", "one", "three", "two"]


def test_the_ranks_of_a_plan_have_the_identity_of_one_process():
    from purestep.data.sampler import SampleShard
    from purestep.data.sharded import shard_samples

    for source in (batches(), ps.data.as_source(loader())):
        assert stable(shard_samples(source, SampleShard(2, (1,)))) == stable(source)


@dataclasses.dataclass(frozen=True)
class Odd:
    """A callback that cannot be described."""

    name: str = "odd"

    def identity(self):
        raise RuntimeError

    def init(self):
        return None

    def react(self, own, event, view):
        return own, ()

    def horizon(self, view):
        return ps.loop.events.Horizon()


def test_what_cannot_be_described_is_its_class(tmp_path):
    run(tmp_path, 7, callbacks=[Odd()])
    found = ps.snapshot.manifest(tmp_path, 7).info["identity"]["callbacks"]["odd"]
    assert found == {"class": f"{Odd.__module__}.Odd"}
