from __future__ import annotations

import math

import pytest
from hypothesis import given
from hypothesis import strategies as st

from purestep.errors import ConfigError
from purestep.snapshot import Keep, all_, best, every_steps, latest
from purestep.snapshot.retention import ranking

metrics = st.dictionaries(st.sampled_from(["a", "b"]), st.floats(allow_nan=True, width=16))
histories = st.lists(metrics, max_size=12).map(lambda rows: [(3 * i, row) for i, row in enumerate(rows)])
policies = st.one_of(
    st.builds(latest, st.integers(1, 5)),
    st.builds(best, st.sampled_from(["a", "b"]), st.integers(1, 5), st.sampled_from(["min", "max"])),
    st.builds(every_steps, st.integers(1, 7)),
    st.just(all_()),
)


@given(histories, policies, policies)
def test_union_preserves_what_either_does(records, a: Keep, b: Keep):
    assert (a | b).select(records) == a.select(records) | b.select(records)
    assert (a | b).select(records) <= {step for step, _ in records}


@given(histories, st.sampled_from(["min", "max"]), st.integers(1, 4))
def test_best_is_the_head_of_a_sort_without_nan_and_missing(records, mode, n):
    candidates = [(step, m["a"]) for step, m in records if "a" in m and not math.isnan(m["a"])]
    oracle = sorted(candidates, key=lambda c: c[1] if mode == "min" else -c[1])  # stable: the earlier step of equals
    assert best("a", n, mode).select(records) == {step for step, _ in oracle[:n]}
    assert ranking(records, "a", mode) == [step for step, _ in oracle]


def test_policies_are_values_that_print():
    policy = best("val/loss", 2) | latest(1) | every_steps(10)
    assert policy == best("val/loss", 2) | (latest(1) | every_steps(10))
    assert repr(policy) == "best('val/loss', 2, 'min') | latest(1) | every_steps(10)"
    assert eval(repr(policy)) == policy
    assert hash(policy) == hash(eval(repr(policy)))


@pytest.mark.parametrize("make", [latest, every_steps, lambda n: best("a", n)])
@pytest.mark.parametrize("n", [0, -1, 1.5, True])
def test_counts_are_checked(make, n):
    with pytest.raises(ConfigError, match=r"at least 1\n  where:   n = "):
        make(n)


def test_mode_is_checked():
    with pytest.raises(ConfigError, match=r"mode is neither 'min' nor 'max'\n  where:   mode = 'smallest'"):
        best("a", 1, "smallest")
    with pytest.raises(TypeError):
        latest(1) | 3
