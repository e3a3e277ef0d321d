"""A sample that fails is named, or left out and counted, the same way wherever it is loaded."""

from __future__ import annotations

import warnings

import pytest
import torch

from purestep import data, tree
from purestep.errors import DataError

WORKERS = [0, 2]


@pytest.mark.parametrize("workers", WORKERS)
def test_a_bad_sample_is_named(sets, workers: int) -> None:
    source = data.batches(sets.Broken(9, bad=(5,)), 2, shuffle=False, num_workers=workers)
    iterator = source.epoch(3)
    assert [next(iterator).tolist() for _ in range(2)] == [[0, 1], [2, 3]]
    with pytest.raises(DataError) as caught:
        next(iterator)
    text = str(caught.value)
    assert text.startswith("a sample cannot be loaded\n  where:   sample 5 of Broken (epoch 3, batch 2)")
    assert "why:     OSError: image-5.png is truncated" in text
    assert 'on_bad_sample="skip"' in text
    assert 'raise OSError(f"image-{i}.png is truncated")' in text  # the traceback of the worker
    assert len(list(source.take(2).epoch(0))) == 2  # the value is as good as before


@pytest.mark.parametrize("workers", WORKERS)
def test_bad_samples_are_left_out_and_counted(sets, workers: int) -> None:
    source = data.batches(sets.Broken(9, bad=(1, 4, 5)), 3, shuffle=False, num_workers=workers, on_bad_sample="skip")
    iterator = source.epoch(0)
    with pytest.warns(data.BadSampleWarning) as caught:
        assert [b.tolist() for b in iterator] == [[0, 2], [3], [6, 7, 8]]
    assert iterator.skipped == [1, 4, 5]
    assert [str(w.message) for w in caught] == [
        "left out sample 1 of Broken: OSError: image-1.png is truncated",
        "left out samples [4, 5] of Broken: OSError: image-4.png is truncated",
    ]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        assert tree.equal(list(source.open(0, 1)), [torch.tensor([3]), torch.tensor([6, 7, 8])])


@pytest.mark.parametrize("workers", WORKERS)
def test_the_file_of_a_bad_sample_is_named_where_the_data_set_lists_them(sets, workers: int) -> None:
    part = torch.utils.data.Subset(sets.Listed(6, bad=(4,)), [0, 2, 4, 5])
    source = data.batches(part, 2, shuffle=False, num_workers=workers)
    with pytest.raises(DataError, match=r"sample 2 of Subset \(epoch 0, batch 1\): /pictures/4\.png\n"):
        list(source)
    with pytest.warns(data.BadSampleWarning, match=r"left out sample 2 of Subset, /pictures/4\.png: OSError"):
        list(source.replace(on_bad_sample="skip"))


def test_warnings_are_bounded_and_the_count_is_not(sets) -> None:
    source = data.batches(sets.Broken(100, bad=tuple(range(0, 100, 2))), 2, shuffle=False, on_bad_sample="skip")
    iterator = source.epoch(0)
    with pytest.warns(data.BadSampleWarning) as caught:
        list(iterator)
    assert len(caught) == 10
    assert iterator.skipped == list(range(0, 100, 2))


def test_a_batch_of_bad_samples_only_is_an_error(sets) -> None:
    source = data.batches(sets.Broken(6, bad=(2, 3)), 2, shuffle=False, on_bad_sample="skip")
    with pytest.raises(DataError) as caught:
        list(source)
    assert "no sample of a batch could be loaded" in str(caught.value)
    assert "samples [2, 3] of Broken (epoch 0, batch 1)" in str(caught.value)


def test_a_failing_transform_is_a_bad_sample() -> None:
    def transform(sample: int, key: torch.Tensor) -> float:
        return 1 / sample

    source = data.batches([1, 0], 1, shuffle=False, transform=transform)
    with pytest.raises(DataError, match=r"sample 1 of list[\s\S]*ZeroDivisionError"):
        list(source)


@pytest.mark.parametrize("workers", WORKERS)
def test_samples_that_cannot_be_collated(sets, workers: int) -> None:
    with pytest.raises(DataError) as caught:
        list(data.batches(sets.Ragged(6), 3, shuffle=False, num_workers=workers))
    assert "the samples of a batch cannot be collated" in str(caught.value)
    assert "samples [0, 1, 2] of Ragged (epoch 0, batch 0)" in str(caught.value)
    assert "stack expects each tensor to be equal size" in str(caught.value)


def test_a_dataset_shorter_than_it_says() -> None:
    class Short(list):
        def __len__(self) -> int:
            return 9

    short = type("Short", (), {"__len__": lambda self: 9, "__getitem__": lambda self, i: [1, 2, 3][i]})()
    with pytest.raises(DataError, match=r"sample 3 of Short[\s\S]*IndexError"):
        list(data.batches(short, 2, shuffle=False))
