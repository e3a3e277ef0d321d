"""A wait for a metric that never comes is refused, and nothing else is."""

import dataclasses

import pytest

import purestep as ps
from purestep.errors import ConfigError, MetricError
from purestep.loop.checks import check_names, check_sets


def stopping(name):
    return ps.callbacks.early_stopping(name)


def keeping(name):
    return ps.callbacks.snapshots(keep=ps.snapshot.latest(1) | ps.snapshot.best(name, 2))


def evaluating(name="val"):
    return ps.callbacks.evaluate(lambda net, batch: net, [], name=name)


@dataclasses.dataclass(frozen=True)
class Own(ps.callbacks.Reducer):
    name: str = "own"


KNOWN = {"train": ("loss", "accuracy"), "val": ("loss", "classes"), "test": None}


@pytest.mark.parametrize(
    "callback",
    [
        stopping("val/loss"),
        stopping("val/classes/precision"),  # one of the numbers that a metric computes to
        stopping("test/anything"),  # nothing is known of it
        stopping("train/loss_epoch"),
        keeping("train/loss"),
        keeping("train/accuracy_epoch"),
        keeping("learning_rate"),  # a row of another callback
        keeping("val/loss"),
        ps.callbacks.terminate_on_nan("accuracy"),
        ps.callbacks.snapshots(keep=ps.snapshot.all_() | ps.snapshot.every_steps(2)),
        ps.callbacks.log(),
        Own(),
    ],
)
def test_what_will_come_is_let_through(callback):
    check_sets([evaluating(), evaluating("test"), callback])
    check_names([callback], KNOWN)


@pytest.mark.parametrize(
    ("callback", "instead"),
    [
        (stopping("val/los"), "val/loss"),
        (stopping("val/loss_epoch"), "val/loss"),
        (stopping("train/acuracy_epoch"), "train/accuracy_epoch"),
        (keeping("val/class"), "val/classes"),
        (ps.callbacks.terminate_on_nan("los"), "train/loss"),
    ],
)
def test_a_name_that_never_comes_is_refused_with_the_nearest(callback, instead):
    with pytest.raises(MetricError, match="which is not among the metrics of") as caught:
        check_names([callback], KNOWN)
    assert str(caught.value).endswith(f"instead: {instead}")


def test_ranks_are_not_checked_where_a_callback_of_the_user_may_log_anything():
    check_names([keeping("val/score"), Own()], KNOWN)
    with pytest.raises(MetricError):
        check_names([stopping("val/score"), Own()], KNOWN)


@pytest.mark.parametrize("others", [(), (evaluating("test"),)])
def test_a_set_that_nothing_evaluates_is_refused(others):
    with pytest.raises(ConfigError, match="'early_stopping' watches 'val/loss', which no callback evaluates") as caught:
        check_sets([*others, stopping("val/loss")])
    assert f"evaluated: {'test/...' if others else 'nothing'}" in str(caught.value)


@pytest.mark.parametrize(("name", "instead"), [("val_loss", "'val/loss'"), ("train/loss", "'train/loss_epoch'")])
def test_early_stopping_says_what_it_can_watch(name, instead):
    with pytest.raises(ConfigError, match="early stopping watches a metric of an evaluation") as caught:
        stopping(name)
    assert str(caught.value).endswith(f"instead: {instead}")
