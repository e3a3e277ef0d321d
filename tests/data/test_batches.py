"""Batches are a value: defaults, limits, positions, and refusals in words."""

from __future__ import annotations

import dataclasses
import inspect
import pickle
import random as python_random
from pathlib import Path

import numpy as np
import pytest
import torch

from purestep import data, random, tree
from purestep.data.sampler import SampleShard
from purestep.errors import DataError


def test_defaults_shuffle_and_drop_the_last() -> None:
    train = data.batches(torch.arange(10), 4)
    assert (train.shuffle, train.drop_last, train.seed, train.num_workers) == (True, True, 0, 0)
    assert len(train) == train.length() == 2
    first, second = (torch.cat(list(train.epoch(e))) for e in range(2))
    assert not torch.equal(first, second)
    assert torch.equal(first, torch.cat(list(train)))  # iterating is epoch 0
    val = data.batches(torch.arange(10), 4, shuffle=False, drop_last=False)
    assert [b.tolist() for b in val] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


@pytest.mark.parametrize("shape", ["columns", "samples"])
@pytest.mark.parametrize(("shuffle", "drop_last"), [(True, True), (True, False), (False, False)])
def test_opening_anywhere_is_reading_to_there(sets, seed: int, shape: str, shuffle: bool, drop_last: bool) -> None:
    dataset = torch.randn(23, 2) if shape == "columns" else sets.Noisy(23)
    source = data.batches(dataset, 4, seed=seed, shuffle=shuffle, drop_last=drop_last)
    assert isinstance(source, data.Source)
    assert source.state() is None
    for epoch in range(3):
        whole = list(source.open(epoch, 0, None))
        assert len(whole) == source.length()
        for batch in range(source.length() + 1):
            assert tree.equal(list(source.open(epoch, batch, None)), whole[batch:])
            if batch < source.length() and shape == "samples":
                assert source.indices(epoch, batch).tolist() == whole[batch]["index"].tolist()


def test_seeds_give_other_orders_and_global_seeds_do_not() -> None:
    def read(s: int) -> list[int]:
        return torch.cat(list(data.batches(torch.arange(100), 10, seed=s))).tolist()

    a = read(0)
    torch.manual_seed(99)
    np.random.seed(99)
    python_random.seed(99)
    assert read(0) == a
    assert read(1) != a


def test_reading_leaves_the_global_generators_alone(sets) -> None:
    np.random.randn()

    def now():
        return python_random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()

    before = now()
    for source in (data.batches(sets.Noisy(9), 2, collate=sets.noisy_collate), data.batches(torch.ones(9), 2)):
        iterator = source.epoch(0)
        for _ in iterator:
            assert now() == before
    assert now() == before


def test_transform_gets_the_key_of_seed_epoch_and_index(sets) -> None:
    source = data.batches(sets.Noisy(7), 3, seed=5, transform=sets.keyed, drop_last=False)
    for epoch in range(2):
        for batch in source.epoch(epoch):
            for index, key in zip(batch["index"].tolist(), batch["key"], strict=True):
                assert torch.equal(key, random.fold_in(random.key(5), "augment", epoch, index))


def test_transform_of_columns_is_per_sample() -> None:
    source = data.batches({"x": torch.arange(4.0)}, 2, shuffle=False, transform=lambda s, key: {"y": s["x"] * 2})
    assert [b["y"].tolist() for b in source] == [[0.0, 2.0], [4.0, 6.0]]
    summed = data.batches(torch.arange(4.0), 2, shuffle=False, collate=sum)
    assert [b.item() for b in summed] == [1.0, 5.0]


def test_noise_depends_on_seed_epoch_and_index_only(sets) -> None:
    def noise(**arguments) -> dict:
        source = data.batches(sets.Noisy(12), drop_last=False, **arguments)
        found = {}
        for epoch in range(2):
            for b in source.epoch(epoch):
                for i, row, t in zip(b["index"].tolist(), b["noise"].tolist(), b["torch"].tolist(), strict=True):
                    found[epoch, i] = (*row, *t)
        return found

    a = noise(batch_size=5, seed=1)
    assert a == noise(batch_size=3, seed=1, shuffle=False)
    b = noise(batch_size=5, seed=2)
    assert all(a[k] != b[k] for k in a)
    assert len(set(a.values())) == 24


def test_random_collate_is_reproducible(sets) -> None:
    source = data.batches(sets.Noisy(12), 3, collate=sets.noisy_collate)
    whole = list(source.epoch(1))
    assert tree.equal(list(source.open(1, 2)), whole[2:])
    assert len({b["pick"] for b in whole}) == 4


def test_collate_does_not_draw_what_a_sample_drew(sets) -> None:
    def drawing(samples: list) -> float:
        return python_random.random()

    drawn = set(data.batches(list(range(12)), 3, collate=drawing).epoch(0))
    assert len(drawn) == 4
    by_samples = {row[0] for b in data.batches(sets.Noisy(12), 3).epoch(0) for row in b["noise"].tolist()}
    assert not by_samples & drawn


def test_take_and_overfit() -> None:
    source = data.batches(torch.arange(100), 10, seed=3)
    assert tree.equal(list(source.take(4).epoch(2)), list(source.epoch(2))[:4])
    assert [len(source.take(n)) for n in (0, 3, 99, 0.25, 1.0, 0.0, 1)] == [0, 3, 10, 2, 10, 0, 1]
    assert len(source.take(5).take(0.5)) == 2
    over = source.overfit(2)
    assert torch.cat(list(over.epoch(0))).tolist() == torch.cat(list(over.epoch(7))).tolist() == list(range(20))
    assert source.limit is None
    for wrong in (-1, -0.5, 1.5, True, "all", None, float("nan")):
        with pytest.raises(DataError, match="a limit is a number of batches or a fraction"):
            source.take(wrong)
    with pytest.raises(DataError, match="a fraction of an epoch is less than one batch"):
        source.take(0.01)


def test_it_prints_and_pickles(sets) -> None:
    source = data.batches(sets.Noisy(12), 3, seed=4, transform=sets.keyed, num_workers=2)
    assert (
        repr(source)
        == "Batches(Noisy of 12 samples, batch_size=3, seed=4, shuffle=True, transform=keyed, num_workers=2)"
    )
    plain = data.batches({"x": torch.arange(6)}, 2, seed=4)
    list(plain)
    assert tree.equal(list(pickle.loads(pickle.dumps(plain))), list(plain))


def test_it_is_frozen() -> None:
    source = data.batches(torch.arange(4), 2)
    with pytest.raises(AttributeError):
        source.batch_size = 3  # type: ignore[misc]
    assert source.replace(batch_size=1).length() == 4


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        ({"batch_size": 0}, "batch_size=0"),
        ({"batch_size": -3}, "batch_size=-3"),
        ({"batch_size": 2.0}, "batch_size=2.0"),
        ({"batch_size": True}, "batch_size=True"),
        ({"seed": "0"}, "seed='0'"),
        ({"seed": -1}, "seed=-1"),
        ({"seed": 2**64}, "an integer in [0, 2**64)"),
        ({"seed": torch.tensor([1, 2])}, "seed=tensor"),
        ({"num_workers": -1}, "num_workers=-1"),
        ({"num_workers": "many"}, "num_workers='many'"),
        ({"prefetch": 0}, "prefetch=0"),
        ({"worker_start": "fork"}, '"forkserver" or "spawn"'),
        ({"on_bad_sample": "ignore"}, '"raise" or "skip"'),
        ({"collate": 3}, "collate=3"),
        ({"transform": "flip"}, "transform='flip'"),
        (
            {"batch_size": 11},
            "the data set has fewer samples than one batch, and drop_last=True leaves out a smaller batch",
        ),
    ],
)
def test_arguments_that_make_no_sense(arguments: dict, text: str) -> None:
    with pytest.raises(DataError) as caught:
        data.batches(torch.arange(10), **{"batch_size": 2, **arguments})
    assert text in str(caught.value)
    assert "instead:" in str(caught.value)


def test_numpy_integers_are_integers() -> None:
    source = data.batches(torch.arange(10), np.int64(3), seed=np.uint8(4))
    assert (type(source.batch_size), type(source.seed)) == (int, int)


def test_datasets_that_cannot_be_read() -> None:
    for empty in ([], torch.zeros(0, 3), {"x": np.zeros((0, 2))}):
        with pytest.raises(DataError, match="the data set is empty"):
            data.batches(empty, 2)
    for path, state in (
        ("/no/such/place", "does not exist"),
        (Path(__file__), "exists"),
        (b"/no/such", "does not exist"),
    ):
        with pytest.raises(DataError, match=f"a path is no data set(.|\n)*which {state}"):
            data.batches(path, 2)
    with pytest.raises(DataError, match="needs __len__ and __getitem__"):
        data.batches(iter([1]), 2)

    class Endless(torch.utils.data.Dataset):
        def __len__(self) -> int:
            raise TypeError("no length")

    with pytest.raises(DataError, match="does not know its length"):
        data.batches(Endless(), 2)


@pytest.mark.parametrize(("epoch", "batch"), [(-1, 0), (0, -1), (0, 6)])
def test_places_that_do_not_exist(epoch: int, batch: int) -> None:
    with pytest.raises(DataError, match="the data has no such position"):
        data.batches(torch.arange(10), 2).open(epoch, batch)


def test_a_batch_larger_than_the_data_without_dropping() -> None:
    assert [len(b) for b in data.batches(torch.arange(3), 10, drop_last=False)] == [3]


def test_the_arguments_are_declared_once_and_stay_visible() -> None:
    parameters = inspect.signature(data.batches).parameters
    assert list(parameters)[:3] == ["dataset", "batch_size", "seed"]
    assert {name for name, p in parameters.items() if p.kind is p.KEYWORD_ONLY} == set(list(parameters)[2:])
    assert list(parameters) == [field.name for field in dataclasses.fields(data.Batches)]
    undocumented = [name for name in parameters if f"\n        {name}: " not in (data.batches.__doc__ or "")]
    assert not undocumented
    with pytest.raises(TypeError):
        data.batches(torch.arange(4), 2, 7)


def test_a_pickled_value_has_every_argument() -> None:
    shard = SampleShard(2, (1,))
    changed = data.batches(torch.arange(12), 4, seed=3, shuffle=False, drop_last=False, prefetch=5).replace(shard=shard)
    copied = pickle.loads(pickle.dumps(changed.take(2)))
    for field in dataclasses.fields(data.Batches)[1:]:
        assert getattr(copied, field.name) == getattr(changed.take(2), field.name), field.name
