"""Spikes are found at their batch, however the run is cut into chunks, and a resumed run goes on behind one."""

from __future__ import annotations

import math
import random

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError
from purestep.loop import Cursor, LoopState, StepsDone, Stop, View
from purestep.metrics import Mean

TX = ps.optim.sgd(0.0)


def fed(callback, values, chunks):
    """The own state, and the reasons to stop, after values in chunks of some lengths."""
    own, stops, done = callback.init(), [], 0
    for size in chunks:
        chunk = values[done : done + size]
        done += len(chunk)
        event = StepsDone(len(chunk), tuple({"loss": Mean(v, 1.0)} for v in chunk))
        own, effects = callback.react(own, event, View(LoopState(None, Cursor(0, 0, done))))
        stops += [effect.reason for effect in effects if isinstance(effect, Stop)]
    return own, stops


def test_chunks_do_not_matter(seed):
    values = [random.uniform(0.9, 1.1) for _ in range(60)]
    values[17], values[40], values[41] = 9.0, math.nan, 4.0
    callback = ps.callbacks.spike_detection(window=6, warmup=3, rtol=1.5)
    straight, stops = fed(callback, values, [60])
    assert straight.spikes == (18, 41, 42)
    assert stops == ["loss jumps at batch 18, 41, 42"]
    for size in (1, 7, 25):
        own, _ = fed(callback, values, [size] * 60)
        assert own == straight


@pytest.mark.parametrize(
    ("options", "values", "spikes"),
    [
        ({}, [1.0, 2.9, 1.0, 9.0], (4,)),  # 3 times the mean is the limit
        ({"rtol": 0.5}, [1.0, 1.4, 1.9, 1.0], (3,)),
        ({"atol": 10.0}, [1.0, 9.0, 11.9, 90.0], (4,)),
        ({"warmup": 3}, [1.0, 50.0, 1.0, 2.0, 90.0], (5,)),
        ({"warmup": 2}, [math.inf, math.nan, 5.0, math.inf], (4,)),
        ({"mode": "max", "rtol": 0.5}, [0.8, 0.9, 0.3, 5.0], (3,)),
        ({"window": 1, "rtol": 1.0}, [1.0, 1.9, 3.7, 8.0], (4,)),
    ],
)
def test_what_a_spike_is(options, values, spikes):
    assert fed(ps.callbacks.spike_detection(**options), values, [len(values)])[0].spikes == spikes


@pytest.fixture
def train():
    x = torch.ones(40, 1)
    x[17] = 100.0
    return ps.data.batches({"x": x}, 1, shuffle=False)


def test_a_run_stops_and_goes_on_behind_the_spike(train, tmp_path):
    step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), TX)
    state = ps.init(lambda: nn.Linear(1, 1), TX, seed=3)

    def fit(on="stop"):
        found = [ps.callbacks.spike_detection(on=on), ps.callbacks.log(every=ps.every.steps(5))]
        snapshots = ps.callbacks.snapshots()
        return ps.fit(step, state, train, until=ps.epochs(1), callbacks=[*found, snapshots], run_dir=tmp_path / on)

    first = fit()
    assert first.reason == "loss jumps at batch 18"
    assert first.loop.cursor.batches == 20
    second = fit()
    assert (second.reason, second.loop.cursor.batches) == ("reached 1 epochs", 40)
    assert second.loop.callbacks["spike_detection"].spikes == (18,)
    logged = fit("log")
    assert logged.reason == "reached 1 epochs"
    assert logged.metrics["spike_detection/spikes"] == 1.0


def test_arguments():
    for wrong in ({"mode": "less"}, {"on": "skip"}, {"window": 0}, {"rtol": -1.0}):
        with pytest.raises(ConfigError, match=next(iter(wrong))):
            ps.callbacks.spike_detection(**wrong)
