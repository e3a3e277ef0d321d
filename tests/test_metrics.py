"""Metrics: monoid laws, exact weighted means, scikit-learn's meaning, and the text of refusals."""

from __future__ import annotations

import functools
import itertools
import math
from typing import Any

import numpy as np
import pytest
import sklearn.metrics
import torch
from hypothesis import given
from hypothesis import strategies as st

from purestep import metrics, tree
from purestep.errors import MetricError
from purestep.metrics import (
    Confusion,
    Last,
    Max,
    Mean,
    Min,
    Sum,
    accuracy,
    as_metrics,
    confusion,
    mean,
    sample_count,
    to_host,
)
from purestep.metrics.recorder import BLOCK

INTS = st.integers(-1000, 1000)
KINDS = {
    "Mean": lambda a, b: Mean(a, abs(b)),
    "Sum": lambda a, b: Sum(a),
    "Min": lambda a, b: Min(a),
    "Max": lambda a, b: Max(a),
    "Last": lambda a, b: Last(a),
    "Confusion": lambda a, b: Confusion(torch.tensor([[abs(a), abs(b)], [0, 1]])),
    "Perplexity": lambda a, b: metrics.Perplexity(a, abs(b)),
    "RootMean": lambda a, b: metrics.RootMean(a, abs(b)),
}


@pytest.mark.parametrize("name", KINDS)
@given(st.lists(st.tuples(INTS, INTS), min_size=3, max_size=3), st.booleans())
def test_merging_is_associative_on_the_host_and_as_tensors(name, values, tensors):
    def make(a, b):
        return KINDS[name](torch.tensor(a), torch.tensor(b)) if tensors and name != "Confusion" else KINDS[name](a, b)

    a, b, c = (make(*v) for v in values)
    before = tree.digest([a, b, c])
    assert tree.equal(a.merge(b).merge(c), a.merge(b.merge(c)))
    assert tree.digest([a, b, c]) == before
    assert type(a.merge(b)) is type(a)
    if name != "Last":
        assert tree.equal(a.merge(b), b.merge(a))


@given(st.lists(st.lists(st.integers(-99, 99), min_size=1, max_size=9), min_size=1, max_size=9))
def test_a_mean_over_uneven_batches_is_the_mean_over_the_samples(batches):
    total = None
    for batch in batches:
        values = torch.tensor(batch, dtype=torch.float64)
        one = {
            "a": mean(values),
            "b": mean(values.mean(), len(batch)),
            **as_metrics({"c": values.mean(), "d": values}, len(batch)),
        }
        total = one if total is None else metrics.merge(total, one)
    everything = [v for batch in batches for v in batch]
    row = metrics.compute(total)
    for name in "abcd":
        assert row[name] == pytest.approx(sum(everything) / len(everything), abs=1e-12)
    hosted = to_host([total])[0]
    assert all(isinstance(leaf, float) for leaf in tree.leaves(hosted))


def test_a_value_on_each_metric():
    assert float(mean(3)) == 3.0
    assert float(Sum(torch.tensor(2)).merge(Sum(torch.tensor(5)))) == 7
    assert f"{mean(torch.tensor([1.0, 2.0])):.2f}" == "1.50"
    assert Mean(0.0, 0.0).compute() != Mean(0.0, 0.0).compute()
    assert torch.isnan(mean(torch.tensor(1.0), 0).compute())


@pytest.mark.parametrize(
    "dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64, torch.int64, torch.bool]
)
def test_sums_are_kept_in_float32_at_least(dtype):
    ones = torch.ones(70_000).to(dtype)
    m = mean(ones)
    assert m.total.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    assert float(m.total) == 70_000
    assert float(mean(torch.tensor(0.5).to(dtype), 70_001).weight) == 70_001


def test_weights_mask_and_broadcast_and_a_nan_of_weight_zero_does_not_count():
    x = torch.tensor([[1.0, 2.0], [float("nan"), 4.0]])
    assert float(mean(x, torch.tensor([[1, 1], [0, 1]]))) == pytest.approx(7 / 3)
    assert float(mean(x[:, 1], torch.tensor(2.0))) == 3.0
    assert float(mean(torch.tensor(float("nan")), 0).merge(mean(torch.tensor(2.0), 3))) == 2.0
    assert math.isnan(float(mean(torch.tensor(float("nan")), 1).merge(mean(torch.tensor(2.0), 3))))
    weight = torch.tensor(2.0, requires_grad=True)
    assert not any(t.requires_grad for t in tree.leaves(mean(weight * 3, weight)))


@pytest.mark.parametrize("kind", [Min, Max])
@pytest.mark.parametrize("make", [float, lambda v: torch.tensor(float(v))])
def test_a_nan_stays(kind, make):
    for order in ((1, "nan"), ("nan", 1)):
        a, b = (kind(make(float(v))) for v in order)
        assert math.isnan(float(a.merge(b)))
    assert float(kind(make(1)).merge(kind(make(2)))) == (1 if kind is Min else 2)


# --- classification ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed_", range(4))
def test_accuracy_and_confusion_are_those_of_sklearn(seed_):
    g = torch.Generator().manual_seed(seed_)
    classes, n = 3 + seed_, 57
    logits, labels = torch.randn(n, classes, generator=g), torch.randint(0, classes - seed_ % 2, (n,), generator=g)
    predicted = logits.argmax(-1)
    assert float(accuracy(logits, labels)) == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))
    for k in range(1, classes):
        wanted = sklearn.metrics.top_k_accuracy_score(labels, logits, k=k, labels=range(classes))
        assert float(accuracy(logits, labels, top_k=k)) == pytest.approx(wanted)
    merged = confusion(logits[:20], labels[:20]).merge(confusion(logits[20:], labels[20:]))
    assert merged.counts.tolist() == sklearn.metrics.confusion_matrix(labels, predicted, labels=range(classes)).tolist()
    options = {"average": "macro", "zero_division": 0}
    wanted = sklearn.metrics.precision_recall_fscore_support(labels, predicted, **options)[:3]
    row = merged.compute()
    assert [row["precision"], row["recall"], row["f1"]] == pytest.approx(list(wanted))
    assert row["accuracy"] == pytest.approx(sklearn.metrics.accuracy_score(labels, predicted))


def batched(function, cuts, *columns):
    """Merge a metric over uneven batches, read to the host as the loop does."""
    steps = [{"m": function(*(c[i:j] for c in columns))} for i, j in itertools.pairwise(cuts)]
    return metrics.fold({}, to_host(steps))["m"]


@pytest.mark.parametrize("seed_", range(3))
def test_scores_over_uneven_batches_are_those_of_sklearn_on_all_samples(seed_):
    g = torch.Generator().manual_seed(seed_)
    classes, n, cuts = 2 + 2 * seed_, 61, [0, 1, 14, 40, 61]
    logits = torch.randn(n, classes, generator=g)
    labels = torch.randint(0, max(classes - seed_, 2), (n,), generator=g)
    for name, sklearn_name in (("precision", "precision_score"), ("recall", "recall_score"), ("f1", "f1_score")):
        for average in ("macro", "micro", "weighted", *(["binary"] if classes == 2 else [])):
            oracle = getattr(sklearn.metrics, sklearn_name)
            wanted = oracle(labels, logits.argmax(-1), average=average, zero_division=0)
            made = functools.partial(getattr(metrics, name), average=average, ignore_index=-1)
            found = batched(made, cuts, logits, labels)
            assert float(found) == pytest.approx(wanted), (name, average)
            ignored = batched(
                made, [0, 30, 70], torch.cat([logits, logits[:9]]), torch.cat([labels, labels[:9] * 0 - 1])
            )
            assert float(ignored) == pytest.approx(wanted)
        wanted = oracle(labels, logits.argmax(-1), average=None, labels=range(classes), zero_division=0)
        assert found.by_class().tolist() == pytest.approx(list(wanted))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_perplexity_and_moments_over_uneven_batches_are_those_of_all_samples(dtype):
    g = torch.Generator().manual_seed(0)
    logits, tokens = torch.randn(23, 6, 9, generator=g).to(dtype), torch.randint(0, 9, (23, 6), generator=g)
    tokens[3, 2:] = -100
    cuts, exact = [0, 4, 5, 23], {torch.float32: 1e-5, torch.float64: 1e-10, torch.bfloat16: 1e-5}[dtype]
    loss = torch.nn.functional.cross_entropy(logits.double().reshape(-1, 9), tokens.reshape(-1))
    found = batched(lambda x, y: metrics.perplexity(x, y, ignore_index=-100), cuts, logits, tokens)
    assert float(found) == pytest.approx(math.exp(loss), rel=exact)
    with pytest.raises(IndexError):
        metrics.perplexity(logits, tokens)  # -100 is a label like others, and there is no such class
    # A large mean: differences of sums of squares would have no digits left.
    offset = 0 if dtype is torch.bfloat16 else 1000
    x = (offset + torch.randn(23, generator=g)).to(dtype).to(torch.promote_types(dtype, torch.float32))
    y = x + torch.randn(23, generator=g).to(x.dtype)
    x64, y64 = x.double().numpy(), y.double().numpy()
    loose = max(exact, 1e-9) * 100
    assert float(batched(metrics.r2, cuts, x, y)) == pytest.approx(sklearn.metrics.r2_score(y64, x64), rel=loose)
    assert float(batched(metrics.pearson, cuts, x, y)) == pytest.approx(float(np.corrcoef(x64, y64)[0, 1]), rel=loose)
    for name, wanted in (
        ("mse", sklearn.metrics.mean_squared_error(y64, x64)),
        ("mae", sklearn.metrics.mean_absolute_error(y64, x64)),
        ("rmse", sklearn.metrics.root_mean_squared_error(y64, x64)),
    ):
        assert float(batched(getattr(metrics, name), cuts, x, y)) == pytest.approx(wanted, rel=loose), name


def test_ignored_labels_do_not_count():
    logits, labels = torch.randn(5, 7, 4), torch.randint(0, 4, (5, 7))
    ignored = torch.rand(5, 7) < 0.4
    masked = labels.masked_fill(ignored, -100)
    wanted = (logits.argmax(-1) == labels)[~ignored].double().mean()
    m = accuracy(logits, masked, ignore_index=-100)
    assert float(m) == pytest.approx(float(wanted))
    assert float(m.weight) == int((~ignored).sum())
    kept = confusion(logits[~ignored], labels[~ignored])
    assert tree.equal(confusion(logits, masked, ignore_index=-100), kept)
    assert math.isnan(confusion(logits, torch.full((5, 7), -1), ignore_index=-1).compute()["accuracy"])
    assert confusion(logits, labels.to(torch.int32)).counts.sum() == 35


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (
            lambda: accuracy(torch.zeros(4, 3), torch.zeros(5)),
            r"one label for each row(.|\n)*float32\[4, 3\], labels: float32\[5\]",
        ),
        (lambda: accuracy(torch.zeros(4, 3, 8, 8), torch.zeros(4, 8, 8)), r"logits\.movedim\(1, -1\)"),
        (
            lambda: accuracy(torch.zeros(4, 3), torch.zeros(4), top_k=4),
            r"top_k lies between 1 and the number of classes",
        ),
        (
            lambda: metrics.precision(torch.zeros(4, 3), torch.zeros(4), average="binary"),
            r"average='binary' is the score of class 1 of two(.|\n)*float32\[4, 3\]",
        ),
        (lambda: metrics.f1(torch.zeros(4, 3), torch.zeros(4), average=None), r"average is 'micro'(.|\n)*by_class\(\)"),
        (lambda: metrics.recall(torch.zeros(4, 3), torch.zeros(5)), r"recall needs one label for each row"),
        (lambda: metrics.perplexity(torch.zeros(4, 3), torch.zeros(5)), r"perplexity needs one label for each row"),
        (
            lambda: metrics.r2(torch.zeros(4, 1), torch.zeros(4)),
            r"r2 compares numbers of one shape(.|\n)*float32\[4, 1\], target: float32\[4\](.|\n)*squeeze",
        ),
        (lambda: as_metrics([1], 2), r"metrics are a dict of names to values, not list"),
        (lambda: as_metrics({1: 2.0}, 2), r"the name of a metric is a string(.|\n)*1 of type int"),
        (lambda: as_metrics({"": 2.0}, 2), r"the name of a metric is a string"),
        (
            lambda: as_metrics({"a": torch.zeros(3)}, 2),
            r"'a' is neither one number nor one value a sample(.|\n)*float32\[3\], samples in the batch: 2",
        ),
        (
            lambda: as_metrics({"a": "text"}, 2),
            r"'a' has no value that can be merged(.|\n)*str(.|\n)*ps\.metrics\.Mean",
        ),
        (lambda: as_metrics({"a": None}, 2), r"'a' has no value that can be merged"),
        (
            lambda: metrics.merge({"a": Sum(1), "b": Sum(1)}, {"a": Sum(1), "c": Sum(1)}),
            r"other metrics than(.|\n)*new: c; missing: b",
        ),
        (lambda: to_host([{"a": Sum(1)}, {"b": Sum(1)}]), r"other metrics than the one before"),
        (lambda: to_host([{"a": Sum(1)}, {"a": Last(1)}]), r"a metric changed its type"),
        (
            lambda: metrics.compute({"a": Last(torch.zeros(3))}),
            r"'a' computes to more than one number(.|\n)*float32\[3\]",
        ),
        (
            lambda: sample_count({"a": torch.tensor(1), "b": 2}),
            r"number of samples is unknown(.|\n)*batch\['a'\]: int64\[\], batch\['b'\]: int 2",
        ),
    ],
)
def test_what_is_no_metric_is_refused(call, text):
    with pytest.raises(MetricError, match=text):
        call()


# --- dicts of them ----------------------------------------------------------------------------------------------------


def test_a_metric_of_the_users_own_is_one():
    @tree.pytree
    class Range:
        low: Any
        high: Any

        def merge(self, other):
            return Range(torch.minimum(self.low, other.low), torch.maximum(self.high, other.high))

        def compute(self):
            return {"low": self.low, "high": self.high}

    def make(a, b):
        return as_metrics({"r": Range(torch.tensor(a, requires_grad=True) * 1, torch.tensor(b))}, 3)

    m = metrics.merge(make(1.0, 2.0), make(0.5, 1.5))
    assert not m["r"].low.requires_grad
    assert metrics.compute(m, "val/") == {"val/r/low": 0.5, "val/r/high": 2.0}


def test_plain_values_are_means_over_samples():
    m = as_metrics({"a": 2, "b": torch.tensor(3.0), "c": torch.tensor([1.0, 3.0, 5.0, 7.0]), "d": True}, 4)
    assert {k: float(v) for k, v in m.items()} == {"a": 2, "b": 3, "c": 4, "d": 1}
    assert all(float(v.weight) == 4 for v in m.values())
    assert metrics.are_plain({"a": 1.0})
    assert not metrics.are_plain(m)


def test_reading_many_steps_at_once():
    steps = [
        {"a": mean(torch.tensor(float(i)), i + 1), "c": confusion(torch.eye(2), torch.tensor([0, i % 2]))}
        for i in range(5)
    ]
    hosted = to_host(steps)
    assert [float(h["a"]) for h in hosted] == [0, 1, 2, 3, 4]
    assert hosted[3]["a"].weight == 4.0
    assert all(torch.equal(h["c"].counts, s["c"].counts) for h, s in zip(hosted, steps, strict=True))
    assert list(to_host([])) == []
    assert list(to_host([{}, {}])) == [{}, {}]
    # Sums of what was read are float64: a float32 sum of this many would stop growing.
    big = to_host([{"n": Sum(torch.tensor(2.0**24))}, {"n": Sum(torch.tensor(1.0))}])
    assert float(metrics.merge(*big)["n"]) == 2**24 + 1


VALUES = {
    "tensor": lambda v: torch.tensor(float(v)),
    "integers": lambda v: torch.tensor(v),
    "bfloat16": lambda v: torch.tensor(float(v)).bfloat16(),
    "numbers": float,
    "some numbers": lambda v: float(v) if v % 2 else torch.tensor(float(v)),
    "some with a dim": lambda v: torch.tensor([float(v)]) if v % 3 == 2 else torch.tensor(float(v)),
    "long ones": lambda v: torch.full((3,), float(v)),
}


@pytest.mark.parametrize("kind", VALUES)
@given(st.lists(st.integers(-99, 99), max_size=30), st.lists(st.integers(0, 30), max_size=4))
def test_what_is_recorded_does_not_depend_on_when_it_is_asked_for(kind, values, cuts):
    made = [{"a": Sum(VALUES[kind](v)), "b": Mean(VALUES["tensor"](v), torch.tensor(1.0))} for v in values]
    bounds = sorted({0, len(made), *(min(cut, len(made)) for cut in cuts)})
    pieces = [to_host(made[i:j]) for i, j in itertools.pairwise(bounds)]
    got = [step for piece in pieces for step in piece]
    assert len(got) == len(made)
    for before, after in zip(made, got, strict=True):
        value, read = before["a"].value, after["a"].value
        if isinstance(value, torch.Tensor) and value.ndim:
            assert torch.equal(read, value)
        else:
            expected = value.item() if isinstance(value, torch.Tensor) else value
            assert (type(read), read) == (type(expected), expected)
        assert after["b"].total == float(before["b"].total)
    if kind in ("tensor", "numbers") and values:
        whole, parts = metrics.fold({}, to_host(made)), {}
        for piece in pieces:
            parts = metrics.fold(parts, piece)
        assert tree.digest(whole) == tree.digest(parts)


def test_sums_of_metrics_with_several_numbers_are_new_tensors():
    steps = to_host([{"loss": Sum(torch.full((3,), float(i)))} for i in (1, 2, 4)])
    first = metrics.fold({}, steps)
    second = metrics.fold(first, steps)
    expanded = metrics.fold({}, to_host([{"loss": Sum(torch.ones(()).expand(3))}] * 2))  # as vmap returns constants
    assert [float(steps[i]["loss"].value[0]) for i in range(3)] == [1, 2, 4]
    assert [s["loss"].value.tolist() for s in (first, second, expanded)] == [[7] * 3, [14] * 3, [2] * 3]


def test_what_lies_on_a_device_is_read_only_when_it_is_asked_for():
    """On the meta device there is nothing to read: any look at a value raises."""
    recorder = metrics.Recorder()
    for _ in range(30):
        recorder.add({"here": Sum(torch.tensor(1.0)), "there": Sum(torch.tensor(1.0, device="meta"))})
    assert len(recorder) == 30
    with pytest.raises((RuntimeError, NotImplementedError)):
        recorder.series()


@pytest.mark.parametrize("number", [1, 2, BLOCK - 1, BLOCK, BLOCK + 1, 200])
def test_a_recorder_refuses_what_does_not_go_on(number):
    recorder = metrics.Recorder()
    for _ in range(number):
        recorder.add({"a": Sum(torch.tensor(1.0))})
    for odd, text in (
        ({"a": Last(1)}, "a metric changed its type between two steps\n  where:   a: Sum and Last"),
        ({"b": Sum(1)}, r"other metrics than the one before\n  where:   new: b; missing: a"),
        ({"a": Sum(1), "b": Sum(1)}, r"other metrics than the one before\n  where:   new: b"),
        ({}, r"other metrics than the one before\n  where:   missing: a"),
    ):
        with pytest.raises(MetricError, match=text):
            to_host([*[{"a": Sum(torch.tensor(1.0))}] * number, odd])
    assert len(recorder.series()) == number


def test_samples_of_a_batch():
    assert sample_count((torch.tensor(1), torch.zeros(5, 2))) == 5
    assert sample_count(None) == 1
    assert sample_count({"x": [torch.zeros(3).numpy()]}) == 3
