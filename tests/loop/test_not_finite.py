import math
import re
import warnings

import pytest
import torch
from torch import nn

import purestep as ps
from purestep import optim
from purestep.loop.not_finite import NotFiniteWarning
from purestep.precision import policy


def loss_fn(net, batch):
    return (net(batch["x"]) * batch["scale"]).mean()


def warned(bad, *, value=math.nan, tx=None, precision="32", count=30, **options):
    """The warnings of a run over `count` batches, of which those in `bad`, counted from 1, have a loss of `value`."""
    tx, chosen = tx or optim.sgd(0.1), policy(precision)
    state = chosen.apply(ps.init(lambda: nn.Linear(3, 1), tx, seed=0))
    step = ps.make_step(loss_fn, tx, policy=chosen)
    data = [
        {"x": torch.ones(2, 3), "scale": torch.full((2, 1), value if i in bad else 1.0)} for i in range(1, count + 1)
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ps.fit(step, state, data, until=ps.epochs(2), loggers=[], **options)
    return [str(w.message) for w in caught if w.category is NotFiniteWarning]


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_the_first_loss_that_is_no_number_is_told_once_with_its_batch(value):
    (text,) = warned({17, 18, 29}, value=value)
    assert re.match(r"the loss is (nan|-?inf) at batch 17\n", text)
    assert "terminate_on_nan()" in text


def test_a_batch_of_a_later_chunk_is_counted_over_the_run():
    log = ps.callbacks.log(every=ps.every.steps(7))
    (text,) = warned({23}, callbacks=[log])
    assert text.startswith("the loss is nan at batch 23\n")


def test_finite_losses_and_those_too_large_to_add_say_nothing():
    assert warned(set()) == []
    assert warned(set(range(1, 31)), value=3e37, tx=optim.sgd(0.0)) == []


@pytest.mark.parametrize("watcher", ["terminate_on_nan", "spike_detection"])
def test_a_callback_that_watches_the_loss_says_it_instead(watcher):
    assert warned({5}, callbacks=[getattr(ps.callbacks, watcher)()]) == []


def test_an_update_that_a_loss_scale_has_skipped_says_nothing():
    assert warned({1, 2}, value=math.inf, precision="16-mixed", count=6) == []
