"""The ten assumptions: each is checked, says what, where, why and what instead, and docs/assumptions.md shows the
words."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import (
    ConfigError,
    DataError,
    DonatedStateError,
    MetricError,
    OutOfMemory,
    PrecisionError,
    SnapshotError,
    StepError,
    explain,
)
from purestep.loop import fitting, memory
from purestep.loop.dry import dry_run

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


def documented(error):
    """The message without what differs between machines and torch versions is a block of the page."""
    text = re.sub(r" of the run:.*|0x[0-9a-f]+", "", str(error)).splitlines()[0]
    assert text in PAGE, f"docs/assumptions.md does not show: {text}"
    assert "  where:" in str(error)


def counting(function):
    """A loss function that notes on which device it ran: a dry run is on `meta`."""
    devices = []

    def counted(net, batch):
        devices.append(next(iter(net.parameters())).device.type)
        return function(net, batch)

    return counted, devices


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
    with pytest.raises(StepError) as caught:
        fit(step=ps.make_step(counted, ps.optim.adamw(1e-3)))
    documented(caught.value)
    assert where in str(caught.value)
    assert devices == ["meta"]


def test_a_loss_without_a_graph():
    with pytest.raises(StepError, match="the loss does not depend on the parameters") as caught:
        fit(step=ps.make_step(lambda net, b: b["x"].mean(), ps.optim.adamw(1e-3)))
    documented(caught.value)


@pytest.mark.parametrize(
    ("step", "message"),
    [
        (lambda state: (state, {}), "a step takes a state and a batch"),
        (lambda s, b: s, "a step returns (state, metrics)"),
        (lambda s, b: (s.replace(params=list(s.params.values())), {}), "a step returns a state of the structure"),
        (lambda s, b: (s.replace(step=s.step.float()), {}), "a step returns leaves of the shape and dtype"),
    ],
)
def test_a_step_of_another_kind(step, message):
    with pytest.raises(StepError, match=re.escape(message)) as caught:
        fit(step=step)
    documented(caught.value)


def test_an_evaluation_is_checked_before_the_first_step():
    evaluate = ps.callbacks.evaluate(lambda net, b: net(b["x"]), [batch()], every=ps.every.epoch())
    counted, devices = counting(loss_fn)
    with pytest.raises(StepError, match="a loss function returns a loss"):
        fit(step=ps.make_step(counted, ps.optim.adamw(1e-3)), callbacks=[evaluate])
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
    before = torch.random.get_rng_state()
    result = fit(tx=tx, state=state, data=data)
    assert torch.equal(torch.random.get_rng_state(), before)
    assert all(p.device.type == "cpu" for p in result.state.params.values())


# --- 2. batches -------------------------------------------------------------------------------------------------------


def test_the_first_batch_names_module_operation_and_shapes():
    counted, devices = counting(loss_fn)
    with pytest.raises(StepError) as caught:
        fit(step=ps.make_step(counted, ps.optim.adamw(1e-3)), data=[batch(width=5)])
    documented(caught.value)
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
    assert "differs from the first one, and the step failed on it" in PAGE


def test_a_later_batch_of_another_dtype_or_structure_is_named_once():
    def loss(net, b):
        return nn.functional.cross_entropy(net(b["x"].float()), b["y"])

    odd = {**batch(), "x": batch()["x"].double()}
    with pytest.warns(
        ps.loop.BatchChangeWarning, match=r"batch 1 of the run: batch\['x'\] was float32, now float64"
    ) as w:
        fit(step=ps.make_step(loss, ps.optim.adamw(1e-3)), data=[batch(), odd, {**odd, "z": torch.ones(8)}])
    assert len([x for x in w if x.category is ps.loop.BatchChangeWarning]) == 1
    assert str(w[0].message).splitlines()[0] in PAGE


def test_shapes_may_change_where_the_step_can_take_them():
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        fit(data=[batch(8), batch(5), {"y": batch()["y"], "x": batch()["x"]}])


# --- 4., 6., 9., 10. --------------------------------------------------------------------------------------------------


def test_float8_and_metrics_and_data():
    from purestep.precision.float8 import _check_sizes

    cases = [
        (PrecisionError, lambda: _check_sizes("0", nn.Linear(6, 16))),
        (MetricError, lambda: fit(step=lambda s, b: (s, {3: 1.0}))),
        (MetricError, lambda: fit(step=lambda s, b: (s, {"a": "text"}))),
        (DataError, lambda: ps.data.batches([], 4)),
        (DataError, lambda: list(ps.data.batches(_Corrupt(), 2, shuffle=False).epoch(0))),
    ]
    for kind, call in cases:
        with pytest.raises(kind) as caught:
            call()
        documented(caught.value)
    calls = []

    def changing(state, b):
        calls.append(1)
        return state, {"loss": b["x"].mean(), **({"extra": b["x"].sum()} if len(calls) > 2 else {})}

    with pytest.raises(MetricError, match="new: extra") as caught:
        fit(step=changing)
    documented(caught.value)


class _Corrupt(list):
    def __len__(self):
        return 4

    def __getitem__(self, index):
        raise OSError(f"image-{index}.png is truncated")


def test_what_can_still_be_misused_names_itself(tmp_path):
    tx = ps.optim.adamw(1e-3)
    state = ps.init(model, ps.optim.sgd(0.1, momentum=0.9))
    with pytest.raises(StepError, match="was not made by the tx of the step") as caught:
        fit(tx=tx, state=state)
    documented(caught.value)
    other = ps.init(lambda: nn.Linear(6, 3), tx)
    with pytest.raises(StepError, match="do not fit the module") as caught:
        fit(tx=tx, state=ps.init(model, tx).replace(params=other.params, opt_state=other.opt_state))
    assert "the tensors do not fit the module" in PAGE
    step = ps.jit(ps.make_step(loss_fn, tx), donate=True, backend="eager")
    given = ps.init(model, tx)
    step(given, batch())
    with pytest.raises(DonatedStateError) as caught:
        step(given, batch())
    documented(caught.value)
    val = ps.callbacks.evaluate(loss_fn, [batch()])
    for callbacks in (
        [val, val],
        [ps.callbacks.log],
        [ps.callbacks.evaluate(loss_fn, [batch()], name="train")],
        [val, ps.callbacks.early_stopping("test/loss")],
    ):
        with pytest.raises(ConfigError) as caught:
            fit(callbacks=callbacks)
        assert str(caught.value).splitlines()[0] in PAGE


def test_snapshots_are_refused_where_they_cannot_be(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises((SnapshotError, ConfigError, OSError)):
        fit(run_dir=tmp_path / "file")


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


def test_a_step_that_may_not_fit_is_told_with_numbers(monkeypatch):
    monkeypatch.setattr(memory, "free_memory", lambda device: 4000)
    with pytest.warns(ps.loop.MemoryEstimateWarning, match=r"more are needed, 4\.0 kB are free") as caught:
        fit(data=[batch(512)])
    assert "microbatches" in str(caught[0].message)
    assert str(caught[0].message).splitlines()[0] in PAGE


def test_running_out_of_memory_says_what_would_fit():
    def hungry(net, b):
        if b["x"].device.type != "meta" and len(b["x"]) > 8:
            raise torch.OutOfMemoryError("tried to allocate 20 GiB")
        return loss_fn(net, b)

    with pytest.raises(OutOfMemory) as caught:
        fit(step=ps.make_step(hungry, ps.optim.adamw(1e-3)), data=[batch(), batch(64)])
    documented(caught.value)
    text = str(caught.value)
    assert "batch 1 of the run: ['x'] float32[64, 6]" in text
    assert "tried to allocate 20 GiB" in text
    assert "microbatches=2" in text


def test_auto_takes_the_smallest_number_that_fits_and_keeps_it(tmp_path, monkeypatch):
    tx = ps.optim.sgd(0.1)
    step, state = ps.make_step(loss_fn, tx, microbatches="auto"), ps.init(model, tx)
    data = batch(61)
    found = [ps.loop.choose_microbatches(step, state, data, free=free) for free in (10**9, 4500, 2500)]
    assert found[0] == 1
    assert 1 < found[1] < found[2]
    for free, count in zip((4500, 2500), found[1:], strict=True):
        room = int(memory.USABLE * int(free / memory.USABLE))
        for parts, fits in ((count, True), (count - 1, False)):
            cut = fitting.with_microbatches(step, parts)
            needed = memory.estimate(cut, state, data, dry_run(cut, state, data)).beyond
            assert (needed <= room) == fits
    with pytest.raises(ConfigError, match="no number of microbatches") as caught:
        ps.loop.choose_microbatches(step, state, data, free=10)
    documented(caught.value)
    with pytest.raises(ConfigError, match="not settled yet"):
        step(state, data)
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


def test_every_assumption_has_a_row():
    assert [int(n) for n in re.findall(r"^## (\d+)\.", PAGE, re.MULTILINE)] == list(range(1, 11))
    assert explain("x", where="y") == "x\n  where:   y"
