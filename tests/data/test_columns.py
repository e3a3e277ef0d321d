"""The fast path reads what torch's indexing reads, from tensors, arrays and files, and refuses what does not fit."""

from __future__ import annotations

import collections
import pickle
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import TensorDataset

from purestep import data, tree
from purestep.data.columns import Columns, as_columns
from purestep.errors import DataError


@pytest.mark.parametrize(
    "dtype",
    ["bool", "uint8", "int16", "int64", "float16", "float32", "float64", "complex64", "uint16", "uint32", "uint64"],
)
def test_arrays_of_every_dtype(dtype: str, seed: int) -> None:
    array = (np.random.rand(23, 3) * 50).astype(dtype)
    indices = torch.randint(0, 23, (7,))
    for column in (
        array,
        torch.from_numpy(array),
        array[::-1],
        np.asfortranarray(array),
        array.astype(array.dtype.newbyteorder(">")),
    ):
        got = Columns({"x": column}).take(indices)["x"]
        expected = np.asarray(column)[indices.numpy()].astype(dtype)
        assert got.dtype == torch.from_numpy(array).dtype
        assert np.array_equal(got.numpy(), expected)


def test_structure_is_kept() -> None:
    Pair = collections.namedtuple("Pair", "x y")
    table = {"b": Pair(torch.arange(5), np.arange(5.0)), "a": [torch.ones(5, 2)]}
    got = Columns(table).take(torch.tensor([1]))
    assert list(got) == ["b", "a"]
    assert isinstance(got["b"], Pair)
    assert isinstance(got["a"], list)


def test_batches_do_not_share_memory_with_the_data_set() -> None:
    x = torch.arange(8)
    for shuffle in (True, False):
        for batch in data.batches(x, 4, shuffle=shuffle):
            batch += 100
    assert torch.equal(x, torch.arange(8))


def test_a_column_that_requires_grad_gives_batches_that_do_not() -> None:
    assert not Columns(torch.ones(4, requires_grad=True)).take(torch.tensor([0])).requires_grad


def test_memory_maps_stay_on_disk(tmp_path: Path) -> None:
    path = tmp_path / "x.npy"
    np.save(path, np.arange(40.0).reshape(20, 2))
    mapped = np.load(path, mmap_mode="r")
    columns = Columns({"x": mapped})
    assert torch.equal(
        columns.take(torch.tensor([3, 1]))["x"], torch.tensor([[6.0, 7.0], [2.0, 3.0]], dtype=torch.float64)
    )
    assert len(pickle.dumps(columns)) < 2000
    # The map is read when a batch is, not before.
    writer = np.load(path, mmap_mode="r+")
    writer[3] = -1
    for reader in (columns, pickle.loads(pickle.dumps(columns))):
        assert reader.take(torch.tensor([3]))["x"].tolist() == [[-1.0, -1.0]]


@pytest.mark.parametrize("view", [lambda m: m[5:], lambda m: m[:, :1], lambda m: m.T])
def test_views_of_memory_maps_travel_with_their_values(tmp_path: Path, view) -> None:
    np.save(tmp_path / "x.npy", np.arange(36.0).reshape(6, 6))
    part = view(np.load(tmp_path / "x.npy", mmap_mode="r"))
    copy = pickle.loads(pickle.dumps(Columns(part)))
    index = torch.arange(len(part))
    assert np.array_equal(copy.take(index).numpy(), np.asarray(part))


def test_fortran_ordered_map_travels(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.asfortranarray(np.arange(12.0).reshape(3, 4)))
    mapped = np.load(tmp_path / "x.npy", mmap_mode="r")
    copy = pickle.loads(pickle.dumps(Columns(mapped)))
    assert np.array_equal(copy.take(torch.arange(3)).numpy(), np.arange(12.0).reshape(3, 4))


def test_what_is_columns_and_what_is_samples() -> None:
    x, y = torch.zeros(6, 2), torch.zeros(6, dtype=torch.int64)
    for table in (x, (x, y), {"x": x, "y": y.numpy()}, [x, y], TensorDataset(x, y)):
        assert len(as_columns(table)) == 6
    for samples in ([1, 2], [(x, 1), (x, 2)], [x, x, x], ((x, 1), (x, 2)), [np.zeros(3), np.zeros(4)], range(5)):
        assert as_columns(samples) is None
    assert isinstance(next(iter(data.batches(TensorDataset(x, y), 2))), list)
    assert len(data.batches([x, x, x], 1)) == 3


def message(dataset: object, **arguments: object) -> str:
    with pytest.raises(DataError) as caught:
        data.batches(dataset, **{"batch_size": 2, **arguments})
    return str(caught.value)


def test_columns_that_do_not_fit_together() -> None:
    text = message({"image": torch.zeros(5, 3), "label": np.zeros(4, np.int64)})
    assert "the columns of a data set do not have the same leading dim" in text
    assert "dataset['image']: float32[5, 3]" in text
    assert "dataset['label']: int64[4]" in text
    assert "dataset['scale']: float32[]" in message({"x": torch.zeros(5), "scale": torch.tensor(2.0)})
    text = message({"x": torch.zeros(5), "names": ["a", "b"]})
    assert "has a leaf that is not a tensor or array" in text
    assert "dataset['names'][0]: str 'a'" in text
    assert "dtype <U1 cannot become a tensor" in message({"x": np.array(["a", "b"])})
    assert "dataset: {}" in message({})
    assert "for columns write a tuple" in message([torch.zeros(9), torch.zeros(9)], batch_size=4)


def test_the_fast_path_equals_the_slow_one(seed: int) -> None:
    table = {"x": torch.randn(23, 3), "y": np.arange(23)}
    rows = [{"x": table["x"][i], "y": int(table["y"][i])} for i in range(23)]
    for drop in (True, False):
        fast = data.batches(table, 4, seed=seed, drop_last=drop)
        slow = data.batches(rows, 4, seed=seed, drop_last=drop)
        for epoch in range(3):
            assert tree.equal(list(fast.epoch(epoch)), list(slow.epoch(epoch)))
