"""The searches in memory: against all sizes by hand, with steps that refuse memory above a size that a test chooses."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

import purestep as ps
from purestep import metrics
from purestep.errors import ConfigError
from purestep.preflight import fit_memory


def loss_fn(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


TX = ps.optim.adam(0.1)
STEP = ps.make_step(loss_fn, TX)
STATE = ps.init(lambda: nn.Sequential(nn.Linear(3, 7), nn.Tanh(), nn.Linear(7, 1)), TX)


def make_data(size, samples=1000):
    return ps.data.batches({"x": torch.ones(samples, 3), "y": torch.ones(samples, 1)}, size)


class Refusing:
    """A step that has memory for batches of some size, and remembers what it was called with."""

    def __init__(self, most):
        self.most, self.sizes = most, []

    def __call__(self, state, batch):
        if batch["x"].device.type != "meta":
            self.sizes.append(metrics.sample_count(batch))
            if self.sizes[-1] > self.most:
                raise MemoryError("no memory")
        return STEP(state, batch)


@pytest.mark.parametrize("most", [1, 3, 11, 64, 10_000])
@pytest.mark.parametrize("start", [1, 24])
def test_it_finds_the_largest_that_the_step_has_memory_for(most, start):
    reach = min(most, 200)
    power = ps.tune.batch_size(Refusing(most), STATE, make_data, start=start, largest=200, steps_per_trial=1)
    sizes = [start * 2**k for k in range(9)] + [start // 2**k for k in range(1, 9)]
    assert power.size == max(size for size in sizes if 1 <= size <= reach)
    binary = ps.tune.batch_size(
        Refusing(most), STATE, make_data, mode="binary", start=start, largest=200, margin=0.0, steps_per_trial=1
    )
    assert binary.size == reach
    for found in (power, binary):
        sizes = [trial.size for trial in found.trials]
        assert len(sizes) == len(set(sizes)) <= 2 * math.ceil(math.log2(200)) + 2
        assert all(trial.fits == (trial.size <= most) for trial in found.trials)
        assert all((trial.seconds is not None) == trial.fits for trial in found.trials)


def test_the_margin_is_taken_off_and_the_state_stays():
    before, step = ps.digest(STATE), Refusing(100)
    found = ps.tune.batch_size(step, STATE, make_data, mode="binary", margin=0.25)
    assert (found.size, max(size for size in step.sizes if size <= 100)) == (75, 100)
    assert ps.digest(STATE) == before
    assert step.sizes.count(64) == 3  # steps of a trial
    assert {"batch", "size", "binary,", "margin", "25%", "out", "of", "memory", "fits", "samples/s"} <= set(
        str(found).split()
    )
    assert "<table" in found._repr_html_()


def test_an_estimate_that_is_too_large_is_not_tried():
    def beyond(size):
        return fit_memory.needed(wrapped, STATE, next(iter(make_data(size).open(0, 0, None)))).beyond

    step = Refusing(10_000)
    wrapped = ps.wrap_step(STEP, lambda inner, state, batch: step(state, batch))
    free = beyond(100)
    found = ps.tune.batch_size(wrapped, STATE, make_data, mode="binary", margin=0.0, free=free, largest=500)
    wanted = max(size for size in range(64, 129) if beyond(size) <= free)
    assert found.size == wanted
    assert max(step.sizes) <= wanted
    assert {trial.how for trial in found.trials if not trial.fits} == {"estimate"}


def test_the_data_are_an_end_too():
    found = ps.tune.batch_size(STEP, STATE, lambda size: make_data(size, 50), mode="binary", margin=0.0)
    assert found.size == 50
    assert {trial.how for trial in found.trials if not trial.fits} == {"data"}
    listed = ps.tune.batch_size(STEP, STATE, lambda size: [{"x": torch.ones(min(size, 21), 3), "y": torch.ones(1)}])
    assert listed.size == 16


def test_a_donating_step_leaves_the_state():
    state = ps.init(lambda: nn.Linear(3, 1), TX)
    before = ps.digest(state)
    assert ps.tune.batch_size(ps.donate(STEP), state, make_data, largest=8).size == 8
    assert ps.digest(state) == before


def wide(net, batch):
    """A loss that keeps more of each sample than the state takes."""
    return net(batch["x"]).expand(-1, 900).exp().tanh().mean()


@pytest.mark.parametrize("samples", [1, 5])
def test_the_fewest_microbatches_are_found_by_estimate(samples):
    batch, step = {"x": torch.ones(samples, 3)}, ps.make_step(wide, TX, microbatches="auto")
    needs = {count: fit_memory.needed(step, STATE, batch, count).beyond for count in range(1, samples + 1)}
    for free in set(needs.values()):
        wanted = next(count for count, size in needs.items() if size <= free)
        found = ps.tune.microbatches(step, STATE, batch, mode="binary", margin=0.0, free=free, steps_per_trial=1)
        # What is free to it is more than what it uses of that, which it rounds down.
        assert found.count == wanted == ps.loop.choose_microbatches(step, STATE, batch, free=free + 2)
        power = ps.tune.microbatches(step, STATE, batch, free=free, steps_per_trial=1)
        doubled = [2**k for k in range(8) if 2**k < samples] + [samples]
        assert power.count == next(count for count in doubled if needs[count] <= free)
    assert len(set(needs.values())) > samples // 2


def test_the_fewest_microbatches_are_tried_after_the_estimate():
    def refusing(net, batch):
        if len(batch["x"]) > 9 and batch["x"].device.type != "meta":
            raise MemoryError("no memory")
        return loss_fn(net, batch)

    batch = {"x": torch.ones(100, 3), "y": torch.ones(100, 1)}
    step = ps.make_step(refusing, TX)
    assert ps.tune.microbatches(step, STATE, batch).count == 16
    assert ps.tune.microbatches(step, STATE, batch, mode="binary", margin=0.0).count == 12
    found = ps.tune.microbatches(step, STATE, batch, mode="binary", margin=0.2)
    assert found.count == 15
    assert "microbatches" in str(found)


def fails(state, batch):
    if batch["x"].device.type == "meta":
        return STEP(state, batch)
    raise ValueError("not memory")


@pytest.mark.parametrize(
    ("call", "words"),
    [
        (lambda: ps.tune.batch_size(Refusing(0), STATE, make_data), ["not even one sample", "usable", "donate=True"]),
        (lambda: ps.tune.batch_size(STEP, STATE, make_data, free=1), ["not even one sample", "1 B usable"]),
        (lambda: ps.tune.batch_size(STEP, STATE, lambda size: []), ["the data have no batch", "make_data(1)"]),
        (
            lambda: ps.tune.batch_size(ps.make_step(loss_fn, TX, microbatches="auto"), STATE, make_data),
            ["microbatches='auto'", "microbatches=1"],
        ),
        (
            lambda: ps.tune.batch_size(ps.make_step(loss_fn, TX, plan=ps.sharding.ddp(1)), STATE, make_data),
            ["one process", "ps.tune.batch_size"],
        ),
        (lambda: ps.tune.microbatches(Refusing(9), STATE, {"x": torch.ones(4, 3)}), ["no number of microbatches"]),
        (
            lambda: ps.tune.microbatches(STEP, STATE, {"x": torch.ones(4, 3), "y": torch.ones(4, 1)}, free=1),
            ["no number of microbatches makes", "1 B usable"],
        ),
    ],
)
def test_it_says_why_there_is_nothing_to_find(call, words):
    with pytest.raises(ConfigError) as caught:
        call()
    for word in words:
        assert word in str(caught.value)


def test_another_error_of_a_trial_is_raised():
    with pytest.raises(ValueError, match="not memory"):
        ps.tune.batch_size(fails, STATE, make_data)
