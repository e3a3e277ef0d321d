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
        ("train.csv", "there is nothing at this path", "np.load(path"),
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
