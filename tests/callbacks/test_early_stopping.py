"""Early stopping means what it means in Lightning, and new settings win over stored ones."""

import math

import pytest

import purestep as ps
from purestep.errors import ConfigError, MetricError
from purestep.loop import Cursor, Evaluated, LoopState, Resumed, Status, Stop, View

VIEW = View(LoopState(None), 10)


def feed(callback, values, own=None):
    own, stops = callback.init() if own is None else own, []
    for value in values:
        own, effects = callback.react(own, Evaluated("val", {"val/loss": value}), VIEW)
        stops.append(bool(effects))
    return own, stops


@pytest.mark.parametrize(
    ("settings", "values", "expected"),
    [
        ({"patience": 2}, [3, 2, 2, 2], [0, 0, 0, 1]),
        ({"patience": 1}, [3, 3], [0, 1]),
        ({"patience": 2, "min_delta": 0.5}, [3, 2.6, 2.5, 2.4], [0, 0, 1, 0]),  # 2.5 is not better by *more* than 0.5
        ({"patience": 2, "mode": "max"}, [1, 2, 2, 1.5], [0, 0, 0, 1]),
        ({"stopping_threshold": 1.0}, [3, 1.0, 0.99], [0, 0, 1]),
        ({"mode": "max", "stopping_threshold": 1.0}, [0.5, 1.0, 1.01], [0, 0, 1]),
        ({"divergence_threshold": 5.0}, [3, 5.0, 5.1], [0, 0, 1]),
        ({"mode": "max", "divergence_threshold": 0.1}, [0.3, 0.1, 0.05], [0, 0, 1]),
        ({}, [1, math.nan], [0, 1]),
        ({}, [1, math.inf], [0, 1]),
        ({"check_finite": False, "patience": 3}, [1, math.nan, math.nan], [0, 0, 0]),
    ],
)
def test_semantics(settings, values, expected):
    assert feed(ps.callbacks.early_stopping("val/loss", **settings), values)[1] == [bool(e) for e in expected]


def test_not_before_holds_a_stop_back_and_forgets_it_when_the_metric_improves():
    callback = ps.callbacks.early_stopping("val/loss", patience=1, not_before=ps.steps(30) & ps.epochs(2))

    def at(own, value, batches, epoch=3):
        view = View(LoopState(None, Cursor(epoch, 0, batches)), 10)
        own, effects = callback.react(own, Evaluated("val", {"val/loss": value}), view)
        return own, bool(effects)

    own, stopped = at(callback.init(), 2.0, 10)
    own, stopped = at(own, 3.0, 20)
    assert (own.wait, stopped) == (1, False)
    assert at(own, 3.0, 30)[1]
    assert not at(own, 3.0, 30, epoch=1)[1]
    own, stopped = at(own, 1.0, 30)
    assert (own.wait, stopped) == (0, False)


def test_patience_counts_checks_and_an_improvement_starts_anew():
    own, _ = feed(ps.callbacks.early_stopping("val/loss", patience=9), [3, 4, 4, 2, 5])
    assert (own.best, own.wait, own.last) == (2, 1, 5)


def test_other_evaluations_do_not_count():
    callback = ps.callbacks.early_stopping("val/loss")
    own, effects = callback.react(callback.init(), Evaluated("test", {"test/loss": 1.0}), VIEW)
    assert (own, effects) == (callback.init(), ())


def test_a_wrong_name_is_an_error_with_the_right_ones():
    with pytest.raises(MetricError, match=r"'val/los', which is not evaluated[\s\S]*val/loss"):
        feed(ps.callbacks.early_stopping("val/los"), [1.0])


def test_new_settings_win_when_a_run_is_resumed():
    strict, patient = (ps.callbacks.early_stopping("val/loss", patience=n) for n in (2, 4))
    own, stops = feed(strict, [1, 2, 3])
    assert stops[-1]
    assert isinstance(strict.react(own, Resumed(3), VIEW)[1][0], Stop)
    assert patient.react(own, Resumed(3), VIEW) == (own, ())
    assert feed(patient, [4, 5], own)[1] == [False, True]


def test_an_evaluation_that_was_cut_off_speaks_before_a_new_setting_does():
    patient, strict = (ps.callbacks.early_stopping("val/loss", patience=n) for n in (9, 2))
    own, _ = feed(patient, [1, 2, 3])
    owed = View(LoopState(None, status=Status(due=("val",))), 10)
    assert strict.react(own, Resumed(3), owed) == (own, ())
    assert feed(strict, [0.5], own)[1] == [False]
    assert feed(strict, [4], own)[1] == [True]


@pytest.mark.parametrize("bad", [{"mode": "best"}, {"patience": 0}, {"min_delta": -1.0}])
def test_settings_out_of_range(bad):
    with pytest.raises(ConfigError, match="early stopping needs"):
        ps.callbacks.early_stopping("val/loss", **bad)


def test_the_reason_says_what_happened():
    callback = ps.callbacks.early_stopping("val/loss", patience=2)
    own, _ = feed(callback, [0.5, 1])
    _, (stop,) = callback.react(own, Evaluated("val", {"val/loss": 2.0}), VIEW)
    assert stop.reason == "early stopping: val/loss has not improved on 0.5 for 2 checks"
