"""What a run accepts as data, and what it says about the rest."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset

from purestep import data
from purestep.errors import DataError


class Samples(Dataset):
    def __len__(self) -> int:
        return 3

    def __getitem__(self, i: int) -> int:
        return i


class Endless(IterableDataset):
    def __iter__(self):
        return iter(range(3))


def test_sources_stay_what_they_are() -> None:
    source = data.batches(torch.arange(4), 2)
    assert data.as_source(source) is source
    other = data.as_source([1, 2])
    assert data.as_source(other) is other


@pytest.mark.parametrize(
    ("given", "text", "instead"),
    [
        (Samples(), "a data set gives samples", "ps.data.batches(dataset, batch_size=32)"),
        (torch.zeros(3), "a data set gives samples", "ps.data.batches(dataset, batch_size=32)"),
        (np.zeros(3), "a data set gives samples", "ps.data.batches(dataset, batch_size=32)"),
        ({"x": torch.zeros(3)}, "a data set gives samples", "ps.data.batches(dataset, batch_size=32)"),
        (Endless(), "a data set gives samples", "torch.utils.data.DataLoader(dataset, batch_size=32)"),
        ("train.csv", "which does not exist", "np.load(path"),
        (None, "this cannot be iterated", "ps.data.batches(dataset, batch_size=32)"),
        (7, "this cannot be iterated", "ps.data.batches(dataset, batch_size=32)"),
    ],
)
def test_what_gives_no_batches_is_refused(given: object, text: str, instead: str) -> None:
    with pytest.raises(DataError) as caught:
        data.as_source(given)
    assert text in str(caught.value)
    assert instead in str(caught.value)


def test_lengths() -> None:
    assert data.as_source(DataLoader(Samples(), 2)).length() == 2
    assert data.as_source(DataLoader(Endless(), 2)).length() is None
    assert data.as_source((1, 2, 3)).length() == 3
    assert data.as_source(lambda: iter([1])).length() is None
    assert data.as_source(iter([1])).length() is None


@pytest.mark.parametrize(
    "function",
    [lambda: [1, 2], lambda epoch: [1, 2], lambda e: [1, 2], lambda e, scale=1: iter([1, 2]), lambda *, epoch: (1, 2)],
)
def test_a_function_stands_for_data_whatever_it_calls_its_epoch(function):
    source = data.as_source(function)
    assert [list(source.open(epoch, 0, source.state())) for epoch in (0, 1)] == [[1, 2], [1, 2]]


def test_a_function_that_returns_no_batches_is_told():
    with pytest.raises(DataError, match=r"returned NoneType[\s\S]*lambda epoch: iter"):
        list(data.as_source(lambda: None).open(0, 0, None))
