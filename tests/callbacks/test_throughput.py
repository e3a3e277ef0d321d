"""Rates on a clock of the test, FLOPs against arithmetic; what is measured reaches loggers and no state."""

from __future__ import annotations

import csv
import itertools

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import StepError
from purestep.loop import Cursor, Evaluated, LoopState, Started, StepsDone, Ticked
from purestep.metrics import Mean, Sum

TX = ps.optim.sgd(0.1)


def rows(callback, events):
    """What the sink of a callback returns for (event, batches, seconds elapsed) in turn."""
    sink = callback.open_sink(None, None)
    found = [sink.receive(event, LoopState(None, Cursor(0, 0, n), elapsed=s)) for event, n, s in events]
    return [row for row in found if row is not None]


def steps(*sizes):
    return StepsDone(len(sizes), tuple({"loss": Mean(0.0, n), "tokens": Sum(7 * n)} for n in sizes))


def test_rates_are_of_the_time_of_training_alone():
    callback = ps.callbacks.throughput(every=ps.every.steps(4), tokens="tokens", flops=100.0, peak_flops=400.0)
    events = [
        (Started(), 0, 1.0),  # compiling before the run does not count
        (Ticked(3.0), 0, 3.0),
        (steps(8, 8), 2, 3.0),
        (Ticked(13.0), 2, 13.0),  # an evaluation of ten seconds
        (Evaluated("val", {}), 2, 13.0),
        (Ticked(15.0), 2, 15.0),
        (steps(8, 5), 4, 15.0),
        (Ticked(16.0), 4, 16.0),
        (steps(8, 8, 8, 8), 8, 16.0),
    ]
    first, second = rows(callback, events)
    assert first == {
        "throughput/batches_per_second": 1.0,
        "throughput/samples_per_second": 29 / 4,
        "throughput/tokens_per_second": 7 * 29 / 4,
        "throughput/flops_per_second": 100.0,
        "throughput/mfu": 0.25,
    }
    assert second["throughput/samples_per_second"] == 32.0
    assert second["throughput/mfu"] == 1.0


def test_a_cadence_in_seconds_works_too():
    callback = ps.callbacks.throughput(every=ps.every.seconds(2.0))
    events = [(Started(), 0, 0.0), *((steps(4), n, float(n)) for n in range(1, 7))]
    assert [row["throughput/samples_per_second"] for row in rows(callback, events)] == [4.0, 4.0, 4.0]


@pytest.mark.parametrize("every", [ps.every.steps(2), ps.every.epoch()])
def test_rows_reach_the_loggers_and_no_state(every, tmp_path):
    step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), TX)
    state = ps.init(lambda: nn.Linear(3, 1), TX)
    data = ps.data.batches({"x": torch.randn(20, 3)}, 5)
    both = [ps.callbacks.throughput(every=every), ps.callbacks.device_stats(every=every)]
    result = ps.fit(step, state, data, until=ps.epochs(2), callbacks=both, run_dir=tmp_path / "a")
    assert not any(name.startswith(("throughput", "device")) for name in result.metrics)
    with (tmp_path / "a" / "metrics.csv").open() as file:
        logged = [row for row in csv.DictReader(file) if row["throughput/samples_per_second"]]
    assert [int(row["step"]) for row in logged] == ([2, 4, 6, 8] if every == ps.every.steps(2) else [4, 8])
    assert all(float(row["throughput/samples_per_second"]) > 0 for row in logged)
    assert all(float(row["device/process_peak_bytes"]) > 2**24 for row in logged)
    plain = ps.fit(step, state, data, until=ps.epochs(2))
    ps.testing.assert_trees_equal(result.state, plain.state)


def test_a_metric_that_is_not_there_is_refused():
    step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), TX)
    data = ps.data.batches({"x": torch.randn(20, 3)}, 5)
    callback = ps.callbacks.throughput(tokens="tokens")
    with pytest.raises(ps.errors.PurestepError, match="train/tokens"):
        ps.fit(step, ps.init(lambda: nn.Linear(3, 1), TX), data, until=ps.steps(1), callbacks=[callback])


@pytest.mark.parametrize("microbatches", [1, 3])
def test_flops_are_those_of_the_arithmetic(microbatches):
    sizes, n = [7, 11, 5, 3], 6
    layers = [nn.Linear(a, b) for a, b in itertools.pairwise(sizes)]
    state = ps.init(nn.Sequential(*layers), TX)
    step = ps.make_step(lambda net, batch: net(batch).square().mean(), TX, microbatches=microbatches)
    products = [2 * n * a * b for a, b in itertools.pairwise(sizes)]
    # Forward, gradient of the weights, and of the inputs of all layers but the first.
    assert ps.callbacks.count_flops(step, state, torch.ones(n, 7)) == 3 * sum(products) - products[0]


def test_a_step_that_reads_values_is_not_counted():
    step = ps.make_step(lambda net, batch: net(batch).square().mean() * float(batch.sum()), TX)
    with pytest.raises(StepError, match="cannot run on tensors without memory"):
        ps.callbacks.count_flops(step, ps.init(lambda: nn.Linear(7, 1), TX), torch.ones(2, 7))


@pytest.mark.slow
def test_a_compiled_step_is_counted_as_what_it_was_compiled_of():
    step = ps.make_step(lambda net, batch: net(batch).square().mean(), TX)
    state, batch = ps.init(lambda: nn.Linear(7, 3), TX), torch.ones(5, 7)
    assert ps.callbacks.count_flops(ps.jit(step), state, batch) == ps.callbacks.count_flops(step, state, batch)
