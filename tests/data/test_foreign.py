"""Every kind of foreign loader gives the same batches after a resume at any position, in a table of kinds."""

from __future__ import annotations

import itertools
import json
import random as python_random
import warnings
from collections.abc import Callable
from typing import Any

import grain.python as grain
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset
from torchdata.stateful_dataloader import StatefulDataLoader

from purestep import data, tree
from purestep.data.adapters import ReplayWarning
from purestep.errors import DataError

# torchdata 0.11 calls a function that torch 2.13 deprecates.
pytestmark = pytest.mark.filterwarnings("ignore:'set_vital' is deprecated:UserWarning")


class Noisy(Dataset):
    def __len__(self) -> int:
        return 22

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([i, torch.rand(()).item(), python_random.random(), np.random.rand()])


class Counting(IterableDataset):
    """Keeps its own state, as torchdata asks for."""

    def __init__(self) -> None:
        self.position = 0

    def __iter__(self):
        while self.position < 10:
            self.position += 1
            yield self.position
        self.position = 0

    def state_dict(self) -> dict:
        return {"position": self.position}

    def load_state_dict(self, state: dict) -> None:
        self.position = state["position"]


class Iterable:
    def __iter__(self):
        return (np.random.rand(2) for _ in range(4))


def generator_function():
    for _ in range(4):
        yield torch.rand(2)


def by_epoch(epoch: int):
    return iter([torch.tensor([epoch, i]) for i in range(4)])


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def grain_map() -> Any:
    return grain.MapDataset.range(20).shuffle(seed=1).map(float).batch(4)


def grain_loader() -> Any:
    sampler = grain.IndexSampler(20, shuffle=True, seed=0, num_epochs=1)
    return grain.DataLoader(data_source=list(range(20)), sampler=sampler, operations=[grain.Batch(4)])


EXACT: dict[str, Callable[[], Any]] = {
    "torchdata": lambda: StatefulDataLoader(torch.arange(22), 4, shuffle=True),
    "torchdata, generator": lambda: StatefulDataLoader(torch.arange(22), 4, shuffle=True, generator=seeded()),
    "torchdata, main process noise": lambda: StatefulDataLoader(Noisy(), 4, shuffle=True),
    "torchdata, stateful iterable": lambda: StatefulDataLoader(Counting(), 4),
    "grain loader": grain_loader,
    "grain iterable": lambda: grain_map().to_iter_dataset(),
    "grain map": grain_map,
    "grain iterator": lambda: iter(grain_map().to_iter_dataset()),
    "list": lambda: [torch.ones(2), torch.zeros(2)],
}
REPLAYED: dict[str, Callable[[], Any]] = {
    "loader": lambda: DataLoader(Noisy(), 4, shuffle=True),
    "loader, generator": lambda: DataLoader(Noisy(), 4, shuffle=True, generator=seeded()),
    "iterable": Iterable,
    "function": lambda: generator_function,
    "function of epoch": lambda: by_epoch,
}


def check_resumes(make: Callable[[], Any], epochs: int = 2) -> None:
    source = data.as_source(make())
    batches: list[list[Any]] = []
    states: list[list[Any]] = []
    for epoch in range(epochs):
        batches.append([])
        states.append([source.state()])
        for batch in source.open(epoch, 0, None):
            batches[-1].append(batch)
            states[-1].append(source.state())
    assert len(batches[0]) > 1
    for epoch in range(epochs):
        for position in range(len(batches[epoch]) + 1):
            resumed = data.as_source(make())
            rest = list(resumed.open(epoch, position, states[epoch][position]))
            assert tree.equal(rest, batches[epoch][position:])
            if epoch + 1 < epochs:
                assert tree.equal(list(resumed.open(epoch + 1, 0, None)), batches[epoch + 1])


@pytest.mark.parametrize("kind", EXACT)
def test_exact_resume_at_every_batch(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReplayWarning)
        check_resumes(EXACT[kind])


@pytest.mark.parametrize("kind", REPLAYED)
def test_replayed_resume_at_every_batch(kind: str) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ReplayWarning)
        check_resumes(REPLAYED[kind])


@pytest.mark.parametrize("kind", [*EXACT, *REPLAYED])
def test_reading_leaves_the_global_generators_alone(kind: str) -> None:
    loader = (EXACT | REPLAYED)[kind]()
    before = torch.get_rng_state().tolist(), python_random.getstate(), str(np.random.get_state())
    source = data.as_source(loader)
    for _ in source.open(0, 0, None):
        assert before == (torch.get_rng_state().tolist(), python_random.getstate(), str(np.random.get_state()))
    source.state()
    assert before == (torch.get_rng_state().tolist(), python_random.getstate(), str(np.random.get_state()))


@pytest.mark.slow
def test_torchdata_workers_resume() -> None:
    def make() -> Any:
        return StatefulDataLoader(torch.arange(8), 3, shuffle=True, num_workers=2, multiprocessing_context="forkserver")

    check_resumes(make, epochs=1)


def test_shuffling_loaders_shuffle_anew_each_epoch() -> None:
    for kind in ("torchdata", "torchdata, generator"):
        source = data.as_source(EXACT[kind]())
        orders = [torch.cat(list(source.open(e, 0, None))).tolist() for e in range(3)]
        assert len({tuple(o) for o in orders}) == 3
    own = torch.cat(list(DataLoader(torch.arange(22), 4, shuffle=True, generator=seeded())))
    source = data.as_source(DataLoader(torch.arange(22), 4, shuffle=True, generator=seeded()))
    assert sorted(torch.cat(list(source.open(0, 0, None))).tolist()) == sorted(own.tolist())
    other = DataLoader(torch.arange(22), 4, shuffle=True, generator=torch.Generator().manual_seed(6))
    assert [b.tolist() for b in data.as_source(other).open(0, 0, None)] != [
        b.tolist() for b in data.as_source(REPLAYED["loader, generator"]()).open(0, 0, None)
    ]


def test_noise_is_new_in_every_batch_and_epoch_and_owes_nothing_to_the_global_generators(seed: int) -> None:
    source = data.as_source(Iterable())
    drawn = [b.tolist() for e in range(3) for b in source.open(e, 0, None)]
    assert len({tuple(d) for d in drawn}) == 12
    np.random.seed(1)
    again = data.as_source(Iterable())
    assert [b.tolist() for e in range(3) for b in again.open(e, 0, None)] == drawn


def test_the_seed_of_the_source_changes_what_it_draws() -> None:
    a, b, c = (data.as_source(Iterable(), seed=s) for s in (0, 1, 1))
    first, second, third = (list(x.open(0, 0, None)) for x in (a, b, c))
    assert not tree.equal(first, second)
    assert tree.equal(second, third)


@pytest.mark.parametrize("kind", EXACT)
def test_states_are_plain(kind: str) -> None:
    source = data.as_source(EXACT[kind]())
    next(iter(source.open(0, 0, None)))
    state = source.state()
    for leaf in tree.leaves(state):
        assert leaf is None or isinstance(leaf, (bool, int, float, str, torch.Tensor))
    tree.digest(state)
    json.dumps(tree.map(lambda x: x.tolist() if isinstance(x, torch.Tensor) else x, state))


def test_replaying_warns_once_and_says_how() -> None:
    source = data.as_source(DataLoader(torch.arange(10), 2))
    with pytest.warns(ReplayWarning) as caught:
        rest = list(source.open(0, 3, None)) + list(source.open(1, 4, None))
    assert [b.tolist() for b in rest] == [[6, 7], [8, 9], [8, 9]]
    assert len(caught) == 1
    text = str(caught[0].message)
    assert "resuming inside an epoch reads its first 3 batches again and drops them" in text
    assert "StatefulDataLoader" in text


def test_going_on_where_reading_stopped_replays_nothing() -> None:
    source = data.as_source(DataLoader(torch.arange(10), 2))
    first = list(itertools.islice(source.open(0, 0, None), 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        rest = list(source.open(0, 2, source.state()))
    assert torch.cat(first + rest).tolist() == list(range(10))


def test_going_on_further_ahead_reads_on() -> None:
    source = data.as_source(DataLoader(torch.arange(10), 2))
    next(source.open(0, 0, None))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert torch.cat(list(source.open(0, 3, None))).tolist() == [6, 7, 8, 9]


def test_an_epoch_that_got_shorter() -> None:
    with (
        pytest.warns(ReplayWarning),
        pytest.raises(DataError, match="the epoch ended after 2 batches, but the run had read 5"),
    ):
        data.as_source(DataLoader(torch.arange(4), 2)).open(0, 5, None)


def test_a_loader_that_raises_says_where() -> None:
    def batches():
        yield 1
        raise OSError("the disk is gone")

    read = data.as_source(batches).open(2, 0, None)
    assert next(read) == 1
    with pytest.raises(OSError, match="the disk is gone") as caught:
        next(read)
    assert caught.value.__notes__ == ["while batch 1 of epoch 2 was read; data: builtins.function"]


def test_an_iterator_has_one_epoch() -> None:
    source = data.as_source(iter([1, 2, 3]))
    assert list(source.open(0, 0, None)) == [1, 2, 3]
    with pytest.raises(DataError) as caught:
        source.open(1, 0, None)
    assert "an iterator gives its batches once, and they are needed again" in str(caught.value)
    assert "read to batch 3 of epoch 0; asked for batch 0 of epoch 1" in str(caught.value)
    assert "lambda: make_batches()" in str(caught.value)
    half = data.as_source(iter([1, 2, 3]))
    next(half.open(0, 0, None))
    with pytest.raises(DataError, match="batch 1 of epoch 0"):
        half.open(0, 0, None)


def test_samplers_are_told_the_epoch() -> None:
    sampler = DistributedSampler(range(20), num_replicas=1, rank=0, shuffle=True)
    source = data.as_source(DataLoader(torch.arange(20), 5, sampler=sampler))
    orders = [torch.cat(list(source.open(e, 0, None))).tolist() for e in (0, 1, 0)]
    assert orders[0] == orders[2] != orders[1]
    assert sampler.epoch == 0


def test_a_state_of_another_loader_is_refused() -> None:
    first = data.as_source(EXACT["torchdata"]())
    next(iter(first.open(0, 0, None)))
    for kind in ("grain loader", "grain iterator"):
        with pytest.raises(DataError, match="the saved position is that of another kind of loader"):
            data.as_source(EXACT[kind]()).open(0, 1, first.state())


def test_a_state_that_a_wrapper_forwards_is_saved() -> None:
    """The loaders of Accelerate forward attributes so; a class is asked by `isinstance` of a protocol, they are not."""

    class Forwards:
        def __init__(self) -> None:
            self.inner = StatefulDataLoader(list(range(12)), 3)

        def __iter__(self) -> Any:
            return iter(self.inner)

        def __len__(self) -> int:
            return len(self.inner)

        def __getattr__(self, name: str) -> Any:
            return getattr(self.__dict__["inner"], name)

    source = data.as_source(Forwards())
    batches = source.open(0, 0, None)
    next(batches), next(batches)
    state = source.state()
    assert "state_dict" in state
    with warnings.catch_warnings():
        warnings.simplefilter("error", ReplayWarning)
        rest = list(data.as_source(Forwards()).open(0, 2, state))
    assert [batch.tolist() for batch in rest] == [[6, 7, 8], [9, 10, 11]]
