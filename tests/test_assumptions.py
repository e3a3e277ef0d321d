"""The ten assumptions: each is checked, says what, where, why and what instead, and docs/assumptions.md has its words.

`CASES` makes every mistake of the page, and every message of a case stands in the row of its assumption.
"""

from __future__ import annotations

import contextlib
import dataclasses
import os
import re
import warnings
from collections import namedtuple
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import (
    ConfigError,
    DataError,
    DonatedStateError,
    MetricError,
    OptimError,
    OutOfMemory,
    PrecisionError,
    SnapshotError,
    StepError,
    TemplateMismatch,
)
from purestep.loop.lock import Lock
from purestep.preflight import check, fit_memory, memory
from purestep.preflight.dry_run import dry_run
from purestep.snapshot import free_space, writer
from purestep.step_protocol import resliced

PAGE = (Path(__file__).parents[1] / "docs" / "assumptions.md").read_text()


def model():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 3))


def loss_fn(net, batch):
    return nn.functional.cross_entropy(net(batch["x"]), batch["y"])


def batch(n=8, width=6):
    return {"x": torch.randn(n, width), "y": torch.zeros(n, dtype=torch.int64)}


def fit(*, step=None, tx=None, data=None, state=None, **options):
    tx = tx or ps.optim.adamw(1e-3)
    step = step or ps.make_step(loss_fn, tx)
    data = data or [batch() for _ in range(4)]
    return ps.fit(step, state or ps.init(model, tx), data, **{"until": ps.steps(len(data)), **options})


def counting(function):
    """A loss function that notes on which device it ran: a dry run is on `meta`."""
    devices = []

    def counted(net, batch):
        devices.append(next(iter(net.parameters())).device.type)
        return function(net, batch)

    return counted, devices


# --- every mistake of the page ----------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Case:
    """A mistake.

    Attributes:
        number: of the assumption.
        kind: what is raised; a warning class for what is only told.
        call: makes the mistake, given a directory and a `MonkeyPatch`.
    """

    number: int
    kind: type[Exception]
    call: Callable[[Path, pytest.MonkeyPatch], Any]


CASES: dict[str, Case] = {}


def case(number: int, kind: type[Exception], line: str) -> Callable[[Any], Any]:
    def add(call: Any) -> Any:
        CASES[line] = Case(number, kind, call)
        return call

    return add


def steps(number, kind, line, step):
    case(number, kind, line)(lambda place, patch: fit(step=step))


def losses(line, loss):
    case(1, StepError, line)(lambda place, patch: fit(step=ps.make_step(loss, ps.optim.adamw(1e-3))))


def call(number, kind, line):
    """For mistakes that need neither a directory nor a patch."""
    return lambda function: case(number, kind, line)(lambda place, patch: function())


steps(1, StepError, "a step takes a state and a batch", lambda state: (state, {}))
steps(1, StepError, "a step returns (state, metrics)", lambda s, b: s)
steps(
    1,
    StepError,
    "a step returns a state of the structure it was given",
    lambda s, b: (s.replace(params=list(s.params.values())), {}),
)
steps(
    1,
    StepError,
    "a step returns leaves of the shape and dtype it was given",
    lambda s, b: (s.replace(step=s.step.float()), {}),
)
losses(
    "a loss function returns a loss, or (loss, metrics): a 0-d floating tensor and a dict",
    lambda net, b: {"loss": loss_fn(net, b)},
)
losses("the loss does not depend on the parameters", lambda net, b: b["x"].mean())


steps(1, StepError, "the step calls its state as if it were a model", lambda net, b: net(b["x"]).mean())


class Counting(nn.Module):
    def __init__(self, weight):
        super().__init__()
        self.lin, self.weight, self.calls = nn.Linear(6, 3), weight, 0

    def forward(self, x):
        self.calls += 1
        return self.lin(x) * (1 + self.weight * self.calls)


@call(1, StepError, "the model changes an attribute of itself, and computes other numbers because of it")
def _():
    fit(state=ps.init(lambda: Counting(0.1), ps.optim.adamw(1e-3)))


@call(1, ps.loop.HiddenStateWarning, "the model changes an attribute of itself each time it is called")
def _():
    fit(state=ps.init(lambda: Counting(0.0), ps.optim.adamw(1e-3)))


@call(1, StepError, "the state holds no model to bind the params to")
def _():
    fit(state=model())


@call(1, ConfigError, "a step needs a gradient transformation")
def _():
    ps.make_step(loss_fn, torch.optim.AdamW)


@call(1, ConfigError, "a loss function takes the model and the batch")
def _():
    ps.make_step(lambda net: net.weight.sum(), ps.optim.sgd(0.1))


@call(2, StepError, "the first batch does not fit the model")
def _():
    fit(data=[batch(width=5)])


@call(2, StepError, "the first batch of the evaluation 'val' does not fit the model")
def _():
    fit(callbacks=[ps.callbacks.evaluate(loss_fn, [batch(width=5)])])


@call(2, StepError, "batch 2 of the run differs from the first one, and the step failed on it")
def _():
    fit(data=[batch(), batch(), batch(width=4), batch()])


@call(2, ps.loop.BatchChangeWarning, "a batch differs from the first one of this run")
def _():
    fit(data=[batch(), batch() | {"z": torch.ones(8)}])


@case(3, ps.loop.ThreadsWarning, "torch computes with more threads than there are CPUs for this process")
def _(place, patch):
    patch.setattr(check, "available_cpus", lambda: 2)
    patch.setattr(torch, "get_num_threads", lambda: 16)
    fit()


@call(4, PrecisionError, "float8 cannot multiply in a layer whose sizes are no multiples of 16")
def _():
    pytest.importorskip("torchao")
    tx, policy = ps.optim.sgd(0.1), ps.precision.policy("float8")
    fit(step=ps.make_step(loss_fn, tx, policy=policy), state=policy.apply(ps.init(model, tx)))


@case(5, SnapshotError, "the run directory cannot be made or written")
def _(place, patch):
    (place / "file").write_text("")
    fit(run_dir=place / "file")


@call(5, ConfigError, "snapshots need a place")
def _():
    fit(callbacks=[ps.callbacks.snapshots()])


@case(5, SnapshotError, "snapshots cannot be written here")
def _(place, patch):
    (place / "snapshots").write_text("")
    fit(run_dir=place)


def room(patch, megabytes):
    usage = namedtuple("usage", "total used free")
    patch.setattr(free_space.shutil, "disk_usage", lambda path: usage(0, 0, int(megabytes * 1e6)))


@case(5, SnapshotError, "the next snapshot does not fit here")
def _(place, patch):
    room(patch, 0.5)
    fit(run_dir=place)


@case(5, RuntimeWarning, "only 2 of the next 3 snapshots fit on the disk")
def _(place, patch):
    room(patch, 2.5)
    fit(run_dir=place, callbacks=[ps.callbacks.snapshots(keep=ps.snapshot.latest(2))])


@case(5, UserWarning, "the save of step 4 failed")
def _(place, patch):
    def full(*args, **options):
        raise OSError(28, "No space left on device")

    patch.setattr(writer, "write", full)
    fit(run_dir=place)


@case(5, ConfigError, "another process is running in this run directory")
def _(place, patch):
    def held(*args):
        raise BlockingIOError(11, "Resource temporarily unavailable")

    os.makedirs(place, exist_ok=True)
    (Path(place) / "lock").write_text(str(os.getpid()))
    patch.setattr("fcntl.flock", held)
    fit(run_dir=place)


@case(5, ConfigError, "another run of this very process uses this run directory")
def _(place, patch):
    with Lock(place):
        fit(run_dir=place)


steps(6, MetricError, "the name of a metric is a string", lambda s, b: (s, {3: 1.0}))
steps(6, MetricError, "metric 'a' has no value that can be merged over batches", lambda s, b: (s, {"a": "text"}))
steps(
    6,
    MetricError,
    "metric 'a' is neither one number nor one value a sample",
    lambda s, b: (s, {"a": torch.zeros(3)}),
)


@call(6, MetricError, "a step returned other metrics than the one before")
def _():
    seen = []

    def step(state, b):
        seen.append(1)
        return state, {"loss": b["x"].mean(), **({"extra": b["x"].sum()} if len(seen) > 2 else {})}

    fit(step=step)


@case(7, ps.loop.MemoryEstimateWarning, "the step may not fit in the memory of the device")
def _(place, patch):
    patch.setattr(memory, "free_memory", lambda device: 4000)
    fit(data=[batch(512)])


@call(7, OutOfMemory, "the step ran out of memory")
def _():
    def hungry(net, b):
        if b["x"].device.type != "meta" and len(b["x"]) > 8:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return loss_fn(net, b)

    fit(step=ps.make_step(hungry, ps.optim.adamw(1e-3)), data=[batch(), batch(64)])


@call(7, ConfigError, "no number of microbatches makes the step fit in memory")
def _():
    tx = ps.optim.sgd(0.1)
    step = ps.make_step(loss_fn, tx, microbatches="auto")
    ps.loop.choose_microbatches(step, ps.init(model, tx), batch(), free=10)


@call(7, ConfigError, "the number of microbatches is not settled yet")
def _():
    tx = ps.optim.sgd(0.1)
    ps.make_step(loss_fn, tx, microbatches="auto")(ps.init(model, tx), batch())


@call(7, ConfigError, "microbatches='auto' and a plan do not go together")
def _():
    ps.make_step(loss_fn, ps.optim.sgd(0.1), microbatches="auto", plan=ps.sharding.ddp())


class Pictures:
    """Four samples, of which some are bad."""

    def __init__(self, *bad):
        self.bad, self.paths = bad, [f"/pictures/{i}.png" for i in range(4)]

    def __len__(self):
        return 4

    def __getitem__(self, i):
        if i in self.bad:
            raise OSError("image file is truncated")
        return torch.zeros(2)


@call(9, DataError, "a path is no data set")
def _():
    ps.data.batches("/data/train", 4)


@call(9, DataError, "the data set is empty")
def _():
    ps.data.batches([], 4)


@call(9, DataError, "the data set has fewer samples than one batch, and drop_last=True leaves out a smaller batch")
def _():
    ps.data.batches(Pictures(), 8)


@call(9, DataError, "the training data has no batches")
def _():
    ps.fit(lambda s, b: (s, {}), {}, [], until=ps.steps(1))


@call(9, DataError, "the evaluation 'val' has no batches")
def _():
    fit(callbacks=[ps.callbacks.evaluate(loss_fn, [])])


@call(9, DataError, "a sample cannot be loaded")
def _():
    list(ps.data.batches(Pictures(3), 2, shuffle=False))


@call(9, DataError, "no sample of a batch could be loaded, so the batch is empty")
def _():
    list(ps.data.batches(Pictures(2, 3), 2, shuffle=False, on_bad_sample="skip"))


@call(9, DataError, "the samples of a batch cannot be collated")
def _():
    list(ps.data.batches([torch.zeros(2), torch.zeros(3)], 2))


@call(9, ps.data.BadSampleWarning, "left out sample 3 of Pictures, /pictures/3.png: OSError: image file is truncated")
def _():
    list(ps.data.batches(Pictures(3), 2, shuffle=False, on_bad_sample="skip"))


@call(10, StepError, "the optimizer state of the state was not made by the tx of the step")
def _():
    fit(tx=ps.optim.adamw(1e-3), state=ps.init(model, ps.optim.sgd(0.1, momentum=0.9)))


@call(10, StepError, "the tensors do not fit the module Sequential")
def _():
    tx = ps.optim.adamw(1e-3)
    other = ps.init(lambda: nn.Linear(6, 3), tx)
    fit(tx=tx, state=ps.init(model, tx).replace(params=other.params, opt_state=other.opt_state))


@call(10, DonatedStateError, "this TrainState was consumed by Step")
def _():
    tx = ps.optim.adamw(1e-3)
    step, state = ps.jit(ps.make_step(loss_fn, tx), donate=True, backend="eager"), ps.init(model, tx)
    step(state, batch())
    step(state, batch())


def callbacks(line, *given):
    call(10, ConfigError, line)(lambda: fit(callbacks=given))


@case(10, TemplateMismatch, "the run directory holds a run of another state")
def _(place, patch):
    fit(run_dir=place)
    sgd = ps.optim.sgd(0.1)
    fit(run_dir=place, tx=sgd, state=ps.init(model, sgd), until=ps.steps(9))


@case(10, SnapshotError, "the run that goes on here is not the one that was saved")
def _(place, patch):
    fit(run_dir=place)
    fit(run_dir=place, tx=ps.optim.adamw(1e-2), until=ps.steps(9), strict=True)


@case(10, DataError, "the position of the snapshot is no place in the data, which are not those it was saved with")
def _(place, patch):
    fit(run_dir=place, until=ps.steps(3))
    fit(run_dir=place, data=[batch(), batch()], until=ps.steps(9))


@call(10, ConfigError, "callbacks= is a list")
def _():
    fit(callbacks=ps.callbacks.log())


@call(10, ConfigError, "this is not a logger")
def _():
    fit(loggers=[ps.loggers.csv])


callbacks("every= says when something recurs", dataclasses.replace(ps.callbacks.log(), every=100))


@call(
    10,
    ConfigError,
    "early stopping watches a metric of an evaluation, or the mean of one of training over an epoch",
)
def _():
    ps.callbacks.early_stopping("val_loss")


@call(10, MetricError, "'early_stopping' watches 'val/accuracy', which is not among the metrics of 'val'")
def _():
    fit(callbacks=[ps.callbacks.evaluate(loss_fn, [batch()]), ps.callbacks.early_stopping("val/accuracy")])


@case(10, MetricError, "'snapshots' watches 'val/los', which is not among the metrics of 'val'")
def _(place, patch):
    keep = ps.callbacks.snapshots(keep=ps.snapshot.best("val/los") | ps.snapshot.latest(1))
    fit(run_dir=place, callbacks=[ps.callbacks.evaluate(loss_fn, [batch()]), keep])


callbacks("two callbacks are named 'val'", *[ps.callbacks.evaluate(loss_fn, [batch()]) for _ in range(2)])
callbacks("this is not a callback", ps.callbacks.log)
callbacks("an evaluation clashes with the metrics of training", ps.callbacks.evaluate(loss_fn, [], name="train"))
callbacks(
    "'early_stopping' watches 'test/loss', which no callback evaluates",
    ps.callbacks.evaluate(loss_fn, [batch()]),
    ps.callbacks.early_stopping("test/loss"),
)


# --- the page and the mistakes say the same ---------------------------------------------------------------------------


def message(one: Case, place: Path, patch: pytest.MonkeyPatch) -> str:
    """Make a mistake; return what is said, with a directory that anybody could have."""
    if issubclass(one.kind, Warning):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            with contextlib.suppress(OSError):
                one.call(place, patch)
        texts = [str(w.message) for w in caught if issubclass(w.category, one.kind)]
        assert texts, [str(w.message) for w in caught]
        text = texts[0]
    else:
        with pytest.raises(one.kind) as raised:
            one.call(place, patch)
        text = str(raised.value)
    return re.sub(r", process \d+", ", process 4711", text.replace(str(place), "/runs/digits")).rstrip()


def rows() -> dict[int, list[str]]:
    """The messages of the table at the top of the page, by number of the assumption."""
    found = {}
    for line in PAGE.splitlines():
        cells = [cell.strip() for cell in line.strip("|").split("|")]
        if line.startswith("|") and cells[0].isdigit():
            found[int(cells[0])] = re.findall(r"`([^`]+)`", cells[-1])
    return found


@pytest.mark.parametrize("line", CASES)
def test_every_mistake_is_told_in_the_words_of_its_row(line, tmp_path, monkeypatch):
    text = message(CASES[line], tmp_path, monkeypatch)
    assert text.splitlines()[0] == line
    assert line in rows()[CASES[line].number]
    # What happened, where, and why or what instead.
    if not line.startswith("left out"):
        assert "\n  where:   " in text
        assert "\n  why:     " in text or "\n  instead: " in text


def test_the_page_has_ten_rows_and_no_word_that_nothing_says():
    found = rows()
    assert sorted(found) == list(range(1, 11))
    assert [int(n) for n in re.findall(r"^## (\d+)\.", PAGE, re.MULTILINE)] == list(range(1, 11))
    for number, lines in found.items():
        assert sorted(lines) == sorted(line for line, one in CASES.items() if one.number == number)


def test_the_whole_messages_of_the_page_are_those_that_are_raised(tmp_path, monkeypatch):
    """Each block of the page is a message to its end, but for the words of torch and of the traceback."""
    blocks = re.findall(r"^```text\n(.*?)^```", PAGE, re.DOTALL | re.MULTILINE)
    assert {CASES[block.splitlines()[0]].number for block in blocks} >= {1, 2, 3, 4, 5, 6, 7, 9, 10}
    for number, block in enumerate(blocks):
        place = tmp_path / str(number)
        place.mkdir()
        with monkeypatch.context() as patch:
            text = message(CASES[block.splitlines()[0]], place, patch).split("\n\nTraceback")[0]
        text = text.replace(f"donated in {__file__}:", "donated in train.py:")
        text = re.sub(r"(train\.py):\d+", r"\1:12", text)
        foreign = re.compile(r"^  why: +RuntimeError: .*", re.MULTILINE)
        assert foreign.sub("", text) == foreign.sub("", block.rstrip())


# --- 1. the contract of a step ----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("loss", "where"),
    [
        (lambda net, b: {"loss": loss_fn(net, b)}, "{'loss': float32[]}"),
        (lambda net, b: net(b["x"]), "float32[8, 3]"),
        (lambda net, b: b["y"].sum(), "int64[]"),
        (lambda net, b: None, "NoneType"),
    ],
)
def test_a_loss_of_another_kind_is_refused_without_a_real_step(loss, where):
    counted, devices = counting(loss)
    with pytest.raises(StepError, match="a loss function returns a loss, or") as caught:
        fit(step=ps.make_step(counted, ps.optim.adamw(1e-3)))
    assert where in str(caught.value)
    assert devices == ["meta"]


def test_an_evaluation_is_checked_before_the_first_step():
    evaluate = ps.callbacks.evaluate(lambda net, b: net(b["x"]), [batch()], every=ps.every.epoch())
    counted, devices = counting(loss_fn)
    with pytest.raises(StepError, match="a loss function returns a loss"):
        fit(step=ps.make_step(counted, ps.optim.adamw(1e-3)), callbacks=[evaluate])
    assert set(devices) == {"meta"}
    with pytest.raises(ConfigError, match="a loss function takes the model and the batch"):
        ps.callbacks.evaluate(lambda net: net.weight.sum(), iter([]))
    averaged = ps.callbacks.evaluate(loss_fn, [batch()], of=ps.optim.averaged)
    counted, devices = counting(loss_fn)
    with pytest.raises(OptimError):  # this state keeps no averages
        fit(step=ps.make_step(counted, ps.optim.adamw(1e-3)), callbacks=[averaged])
    assert set(devices) == {"meta"}


def test_a_step_that_reads_values_runs_as_before():
    tx = ps.optim.sgd(0.1)
    inner = ps.make_step(loss_fn, tx)

    def reads(state, batch):
        new, metrics = inner(state, batch)
        return new, {"loss": float(metrics["loss"]), "step": int(new.step)}

    result = fit(step=reads, tx=tx)
    assert int(result.state.step) == 4


def test_a_dry_run_leaves_nothing_behind():
    class Caching(nn.Module):
        def __init__(self):
            super().__init__()
            self.linear = nn.Linear(6, 3)

        def forward(self, x):
            if not hasattr(self, "table"):
                self.table = torch.ones(3, device=x.device)
            return self.linear(x) + self.table

    tx = ps.optim.sgd(0.1)
    data, state = [batch(), batch()], ps.init(Caching, tx)
    before, numpy_before = torch.random.get_rng_state(), np.random.get_state()[1].copy()
    result = fit(tx=tx, state=state, data=data)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert (np.random.get_state()[1] == numpy_before).all()
    assert all(p.device.type == "cpu" for p in result.state.params.values())


# --- 2. batches -------------------------------------------------------------------------------------------------------


def test_the_first_batch_names_module_operation_and_shapes():
    counted, devices = counting(loss_fn)
    with pytest.raises(StepError, match="the first batch does not fit the model") as caught:
        fit(step=ps.make_step(counted, ps.optim.adamw(1e-3)), data=[batch(width=5)])
    text = str(caught.value)
    assert "model.0 (Linear), in linear" in text
    assert "expected float32[..., 6], given float32[8, 5]" in text
    assert "['x'] float32[8, 5]" in text
    assert devices == ["meta"]


def test_a_hand_written_step_is_checked_too():
    net, tx = model(), ps.optim.sgd(0.1)

    def step(state, batch):
        def loss_of(params):
            return ps.apply(net, params, {}, batch["x"])[0].square().mean()

        grads, loss = ps.grad_and_value(loss_of)(state.params)
        return state.apply_gradients(tx, grads), {"loss": loss}

    with pytest.raises(StepError, match=re.escape("model.0 (Linear), in linear")):
        fit(step=step, state=ps.init(net, tx), data=[batch(width=7)])


@pytest.mark.parametrize("compiled", [False, True])
def test_a_later_batch_that_does_not_fit_is_named_with_its_index(compiled):
    tx = ps.optim.sgd(0.1)
    step = ps.make_step(loss_fn, tx)
    data = [batch(), batch(), batch(width=4), batch()]
    with pytest.raises(StepError, match="batch 2 of the run differs from the first one") as caught:
        fit(tx=tx, step=ps.jit(step, backend="eager") if compiled else step, data=data)
    text = str(caught.value)
    assert "batch['x'] was float32[n, 6], now float32[n, 4]" in text
    assert "in linear" in text


def test_a_later_batch_of_another_dtype_or_structure_is_named_once():
    def loss(net, b):
        return nn.functional.cross_entropy(net(b["x"].float()), b["y"])

    odd = {**batch(), "x": batch()["x"].double()}
    with pytest.warns(
        ps.loop.BatchChangeWarning, match=r"batch 1 of the run: batch\['x'\] was float32, now float64"
    ) as w:
        fit(step=ps.make_step(loss, ps.optim.adamw(1e-3)), data=[batch(), odd, {**odd, "z": torch.ones(8)}])
    assert len([x for x in w if x.category is ps.loop.BatchChangeWarning]) == 1


def test_shapes_may_change_where_the_step_can_take_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(data=[batch(8), batch(5), {"y": batch()["y"], "x": batch()["x"]}])


@pytest.mark.parametrize("dtype", [torch.float64, torch.uint8])
def test_inputs_of_another_dtype_are_found_without_a_real_step(dtype):
    """The kernels without memory do not compare dtypes, and a real product does."""
    counted, devices = counting(loss_fn)
    odd = [{**batch(), "x": torch.ones(8, 6, dtype=dtype)}] * 2
    with pytest.raises(StepError, match="the first batch does not fit the model") as caught:
        fit(step=ps.make_step(counted, ps.optim.adamw(1e-3)), data=odd)
    assert f"expected float32[..., 6], given {str(dtype)[6:]}[8, 6]" in str(caught.value)
    assert devices == ["meta"]
    policy = ps.precision.policy("bf16-mixed").replace(autocast=True, rules=())
    tx = ps.optim.adamw(1e-3)
    fit(step=ps.make_step(loss_fn, tx, policy=policy), state=policy.apply(ps.init(model, tx)), tx=tx)


def test_labels_that_do_not_go_with_the_scores_are_told_so():
    for y in (torch.zeros(8), torch.zeros(7, dtype=torch.int64)):
        with pytest.raises(StepError, match="in cross_entropy") as caught:
            fit(data=[{**batch(), "y": y}])
        assert "expected labels int64[8] for these scores, given labels" in str(caught.value)
        assert "instead: compare what goes together" in str(caught.value)


def test_what_else_a_step_raises_has_a_note_of_the_batch():
    cases = [
        (lambda net, b: net(b["image"]).mean(), KeyError, "batch 0 of the run: ['x'] float32[8, 6], ['y'] int64[8]"),
        (lambda net, b: loss_fn(net, {**b, "y": b["y"] + 12}), IndexError, "labels count from 0"),
        (lambda net, b: loss_fn(net, {**b, "y": b["y"].int()}), RuntimeError, 'batch["y"].long()'),
    ]
    for loss, kind, note in cases:
        with pytest.raises(kind) as caught:
            fit(step=ps.make_step(loss, ps.optim.adamw(1e-3)))
        (said,) = caught.value.__notes__
        assert said.startswith("the step failed\n  where:   batch 0 of the run: ")
        assert note in said

    class Odd(nn.Linear):
        def forward(self, x):
            if x.device.type != "meta":
                raise ValueError("odd")
            return super().forward(x)

    with pytest.raises(ValueError, match="odd") as caught:
        fit(state=ps.init(lambda: nn.Sequential(nn.Identity(), Odd(6, 3)), ps.optim.adamw(1e-3)))
    assert "where:   model.1 (Odd)\n           batch 0 of the run" in caught.value.__notes__[0]


# --- 3. CPUs ----------------------------------------------------------------------------------------------------------


def test_threads_are_told_only_where_there_are_too_many(monkeypatch):
    for cpus, threads, device, told in ((2, 2, "cpu", 0), (2, 3, "cpu", 1), (2, 3, "meta", 0), (1, 1, "cpu", 0)):
        monkeypatch.setattr(check, "available_cpus", lambda cpus=cpus: cpus)
        monkeypatch.setattr(torch, "get_num_threads", lambda threads=threads: threads)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            check.check_threads(torch.device(device))
        assert len(caught) == told


# --- 7. memory --------------------------------------------------------------------------------------------------------


def test_the_estimate_counts_what_is_kept_for_the_backward_pass():
    tx = ps.optim.adamw(1e-3)
    step, state = ps.make_step(loss_fn, tx), ps.init(model, tx)
    for n in (32, 57):
        found = memory.estimate(step, state, batch(n), dry_run(step, state, batch(n)))
        assert found.params == 4 * (6 * 16 + 16 + 16 * 3 + 3)
        assert found.gradients == found.params
        # relu's output (which the next layer keeps too) and the log-probabilities, besides a few numbers
        assert n * 4 * (16 + 3) <= found.activations <= n * 4 * (16 + 3) + 64


@pytest.mark.parametrize("donate", [False, True])
def test_memory_that_is_near_to_what_is_free_is_counted_as_by_step_memory(donate):
    tx = ps.optim.adamw(1e-3)
    step, state = ps.make_step(loss_fn, tx, microbatches=3), ps.init(model, tx)
    step = ps.donate(step) if donate else step
    least = memory.estimate(step, state, batch(57), dry_run(step, state, batch(57)))
    found = memory.careful(step, state, batch(57), least, 4 * least.beyond)
    assert memory.careful(step, state, batch(57), least, 1000 * least.beyond) is least
    account = ps.step_memory(step, state, batch(57))
    assert found.state + found.beyond == account.nbytes
    assert found.state == ps.tree.nbytes(state)
    assert fit_memory.needed(step, state, batch(57), 3) == found
    assert found.beyond > least.beyond
    around = ps.wrap_step(step, lambda inner, state, batch: inner(state, batch))
    assert fit_memory.needed(around, state, batch(57), 3) == found
    # Of a function that is no step of make_step only what is needed at least is known.
    assert fit_memory.needed(lambda state, batch: step(state, batch), state, batch(57)).update is None


def test_running_out_of_memory_says_what_would_fit():
    def hungry(net, b):
        if b["x"].device.type != "meta" and len(b["x"]) > 8:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return loss_fn(net, b)

    for microbatches, wanted in ((1, 2), (3, 6)):
        step = ps.make_step(hungry, ps.optim.adamw(1e-3), microbatches=microbatches)
        with pytest.raises(OutOfMemory) as caught:
            fit(step=step, data=[batch(), batch(64)])
        text = str(caught.value)
        assert "batch 1 of the run: ['x'] float32[64, 6]" in text
        assert "tried to allocate 20 GiB" in text
        assert f"microbatches={wanted} " in text


@pytest.mark.slow
def test_auto_takes_the_smallest_number_that_fits_and_keeps_it(tmp_path, monkeypatch):
    tx = ps.optim.sgd(0.1)
    step, state = ps.make_step(loss_fn, tx, microbatches="auto"), ps.init(model, tx)
    data = batch(61)
    found = [ps.loop.choose_microbatches(step, state, data, free=free) for free in (10**9, 4500, 3400)]
    assert found[0] == 1
    assert 1 < found[1] < found[2]
    for free, count in zip((4500, 3400), found[1:], strict=True):
        available = int(memory.USABLE * int(free / memory.USABLE))
        for parts, fits in ((count, True), (count - 1, False)):
            cut = resliced(step, parts)
            needed = fit_memory.needed(cut, state, data).beyond
            assert (needed <= available) == fits
    monkeypatch.setattr(memory, "free_memory", lambda device: 4500 / memory.USABLE)
    fit(tx=tx, step=step, data=[data] * 3, until=ps.steps(2), run_dir=tmp_path)
    assert ps.snapshot.manifest(tmp_path, 2).info["step"]["microbatches"] == found[1]
    monkeypatch.setattr(memory, "free_memory", lambda device: 10**9)
    fit(tx=tx, step=step, data=[data] * 3, until=ps.steps(3), run_dir=tmp_path)
    assert ps.snapshot.manifest(tmp_path, 3).info["step"]["microbatches"] == found[1]


def test_free_memory_respects_the_cgroup(tmp_path):
    for name, text in {
        "proc/meminfo": "MemTotal: 100 kB\nMemAvailable:    50 kB\n",
        "proc/self/cgroup": "0::/job\n",
        "sys/fs/cgroup/job/memory.max": "30000\n",
        "sys/fs/cgroup/job/memory.current": "10000\n",
    }.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    assert memory.free_memory(torch.device("cpu"), root=tmp_path) == 20000
    (tmp_path / "sys/fs/cgroup/job/memory.max").write_text("max\n")
    assert memory.free_memory(torch.device("cpu"), root=tmp_path) == 50 * 1024
