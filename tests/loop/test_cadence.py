import re

import pytest
from hypothesis import given
from hypothesis import strategies as st

import purestep as ps
from purestep.errors import ConfigError
from purestep.loop import Cursor, EpochDone, Horizon, LoopState, Status, StepsDone, View


def view(batches=0, epoch=0, elapsed=0.0, boundary=0.0):
    return View(LoopState(None, Cursor(epoch, 0, batches), status=Status(boundary=boundary), elapsed=elapsed), 10)


@pytest.mark.parametrize("n", [1, 3, 7])
def test_steps_are_due_at_multiples_and_announce_the_next(n):
    cadence = ps.every.steps(n)
    due = [b for b in range(1, 30) if cadence.due(StepsDone(1), view(b))]
    assert due == list(range(n, 30, n))
    for b in range(30):
        assert cadence.due(StepsDone(1), view(b + cadence.horizon(view(b)).batches))


def test_nothing_is_due_where_no_batch_was_consumed():
    assert not ps.every.steps(5).due(StepsDone(0), view(10))


def test_epochs_are_due_at_their_end():
    cadence = ps.every.epoch(2)
    assert [cadence.due(EpochDone(e), view()) for e in (1, 2, 3, 4)] == [False, True, False, True]
    assert not cadence.due(StepsDone(1), view(epoch=2))


def test_seconds_are_due_once_for_each_crossing():
    cadence = ps.every.seconds(10)
    assert not cadence.due(StepsDone(1), view(elapsed=9.9, boundary=2))
    assert cadence.due(StepsDone(1), view(elapsed=10.1, boundary=9.9))
    assert not cadence.due(StepsDone(1), view(elapsed=11, boundary=10.1))
    assert cadence.horizon(view(elapsed=11, boundary=10.1)) == Horizon(None, 20)


def test_either_of_two():
    cadence = ps.every.steps(4) | ps.every.epoch()
    assert cadence.due(StepsDone(1), view(4))
    assert cadence.due(EpochDone(1), view(3))
    assert cadence.horizon(view(3)) == Horizon(1)


def test_until_combines_with_or_and_and():
    either, both = ps.steps(5) | ps.epochs(2), ps.steps(5) & ps.epochs(2)
    for batches, epoch in ((4, 1), (5, 1), (4, 2), (5, 2)):
        assert either.reached(view(batches, epoch)) == (batches >= 5 or epoch >= 2)
        assert both.reached(view(batches, epoch)) == (batches >= 5 and epoch >= 2)
    assert str(ps.steps(5) | ps.seconds(1.5)) == "5 steps or 1.5 seconds"
    assert both.horizon(view(3)) == Horizon(2)
    assert both.horizon(view(7)) == Horizon()
    assert (ps.epochs(3) | ps.seconds(9)).epochs == 3


@pytest.mark.parametrize(
    "make",
    [ps.every.steps, ps.every.epoch, ps.every.seconds, ps.steps, ps.epochs, ps.seconds, ps.minutes, ps.hours],
    ids=lambda f: f.__name__,
)
@pytest.mark.parametrize("bad", [0, -1, "3", True, None, float("nan")])
def test_cadences_are_positive_numbers(make, bad):
    with pytest.raises(ConfigError, match="a cadence is a positive number"):
        make(bad)


@pytest.mark.parametrize("make", [ps.every.steps, ps.every.epoch, ps.steps, ps.epochs])
def test_counts_are_whole_numbers(make):
    with pytest.raises(ConfigError, match="whole number"):
        make(2.5)


# --- from text --------------------------------------------------------------------------------------------------------

ENDS = st.recursive(
    st.integers(1, 10**12).map(ps.steps)
    | st.integers(1, 10**12).map(ps.epochs)
    | st.floats(0, exclude_min=True, allow_nan=False).map(ps.seconds)
    | st.integers(1, 10**9).map(ps.minutes),
    lambda inner: st.builds(lambda a, b, either: a | b if either else a & b, inner, inner, st.booleans()),
    max_leaves=6,
)


@given(ENDS)
def test_an_end_prints_and_is_read_back(end):
    assert ps.until(str(end)) == end


@pytest.mark.parametrize(
    ("text", "end"),
    [
        ("5 epochs | 1000 steps", ps.epochs(5) | ps.steps(1000)),
        ("1 epoch", ps.epochs(1)),
        ("10_000 STEPS", ps.steps(10_000)),
        ("5epochs|2h", ps.epochs(5) | ps.hours(2)),
        ("1h30m", ps.minutes(90)),
        ("1 day 2 hours 3 min 4.5 s", ps.seconds(93784.5)),
        ("00:02:00", ps.minutes(2)),
        ("01:00:00:30", ps.seconds(86430)),
        ("1 step or 2 epochs and 3s", ps.steps(1) | (ps.epochs(2) & ps.seconds(3))),
        ("(1 step | 2 epochs) & 3s", (ps.steps(1) | ps.epochs(2)) & ps.seconds(3)),
        ("0.5h", ps.minutes(30)),
    ],
)
def test_words_of_a_command_line(text, end):
    assert ps.until(text) == end


@pytest.mark.parametrize(
    ("text", "place"),
    [
        ("", "at its end"),
        ("5", "at '5'"),
        ("5 parsecs", "at '5 parsecs'"),
        ("5 epochs |", "at its end"),
        ("5 epochs 3 steps", "at '3 steps'"),
        ("(5 epochs", "at its end"),
        ("| 3 steps", "at '| 3 steps'"),
        ("ps.epochs(5)", "at 'ps.epochs(5)'"),
    ],
)
def test_what_is_no_end_is_refused_with_its_place(text, place):
    with pytest.raises(
        ConfigError, match=f"this text is no end of a run\n  where:   text={re.escape(repr(text))}, {re.escape(place)}"
    ):
        ps.until(text)


@pytest.mark.parametrize(
    ("text", "message"), [("2.5 steps", "whole number"), ("0 epochs", "a cadence is a positive number")]
)
def test_numbers_of_a_text_are_checked_as_those_of_the_functions(text, message):
    with pytest.raises(ConfigError, match=message):
        ps.until(text)
