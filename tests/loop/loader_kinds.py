"""Loaders of every kind, and a way to read them in several processes' worth of turns: what `test_loader_kinds` runs.

As a script it reads the kinds that start workers, which must not be forked from a process that has saved a snapshot.
"""

from __future__ import annotations

import json
import random
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import grain.python as grain
import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset, IterableDataset, get_worker_info
from torchdata.nodes import Batcher, IterableWrapper, Loader
from torchdata.stateful_dataloader import StatefulDataLoader
from torchdata.stateful_dataloader.sampler import StatefulDistributedSampler

from purestep import data, tree
from purestep.data.sampler import SampleShard
from purestep.data.sharded import shard_samples
from purestep.loop.events import Cursor
from purestep.loop.input import Feed

# --- data sets ------------------------------------------------------------------------------------------------------


class Stream(IterableDataset):
    """Shuffles with a generator of its own, which goes on from epoch to epoch."""

    def __init__(self, n: int = 20, seed: int = 5) -> None:
        self.n, self.i, self.rng = n, 0, random.Random(seed)

    def __iter__(self) -> Iterator[Any]:
        while self.i < self.n:
            self.i += 1
            yield torch.tensor([self.rng.random()])
        self.i = 0

    def state_dict(self) -> dict:
        return {"i": self.i, "rng": self.rng.getstate()}

    def load_state_dict(self, state: dict) -> None:
        self.i = state["i"]
        self.rng.setstate(state["rng"])


class Sized(Stream):
    def __len__(self) -> int:
        return self.n


class Endless(Stream):
    def __iter__(self) -> Iterator[Any]:
        while True:
            yield torch.tensor([self.rng.random()])


class Shards(Stream):
    """Each worker has samples of its own; the first has `n - uneven`."""

    def __init__(self, n: int = 10, uneven: int = 0) -> None:
        super().__init__(n)
        self.uneven = uneven

    def __iter__(self) -> Iterator[Any]:
        worker = get_worker_info().id
        while self.i < (self.n if worker else self.n - self.uneven):
            self.i += 1
            yield torch.tensor([worker + self.rng.random()])
        self.i = 0


class Orders(IterableDataset):
    """Draws its order when the iteration begins, not when the first sample is asked for."""

    def __init__(self) -> None:
        self.rng, self.order, self.i = random.Random(2), None, 0

    def __iter__(self) -> Iterator[Any]:
        if self.order is None:
            self.order = self.rng.sample(range(20), 20)
        return self._rest()

    def _rest(self) -> Iterator[Any]:
        while self.i < 20:
            self.i += 1
            yield torch.tensor([self.order[self.i - 1]])
        self.order, self.i = None, 0

    def state_dict(self) -> dict:
        return {"rng": self.rng.getstate(), "order": self.order, "i": self.i}

    def load_state_dict(self, state: dict) -> None:
        self.rng.setstate(state["rng"])
        self.order, self.i = state["order"], state["i"]


class OrdersSized(Orders):
    def __len__(self) -> int:
        return 20


class Augmented(Dataset):
    """Samples by index, with noise from a numpy generator of its own that it saves."""

    def __init__(self, n: int = 20) -> None:
        self.n, self.rng = n, np.random.default_rng(3)

    def __len__(self) -> int:
        return self.n

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([i + self.rng.random()])

    def state_dict(self) -> dict:
        return {"rng": json.dumps(self.rng.bit_generator.state)}

    def load_state_dict(self, state: dict) -> None:
        self.rng.bit_generator.state = json.loads(state["rng"])


class Buffered(Stream):
    """Its state is a tensor that it writes into."""

    def __init__(self) -> None:
        super().__init__()
        self.buffer = torch.arange(4.0)

    def __iter__(self) -> Iterator[Any]:
        while self.i < 20:
            self.i += 1
            self.buffer[self.i % 4] += self.buffer.sum() % 7
            yield self.buffer[self.i % 4].clone()
        self.i = 0

    def state_dict(self) -> dict:
        return {"i": self.i, "buffer": self.buffer}

    def load_state_dict(self, state: dict) -> None:
        self.i, self.buffer = state["i"], state["buffer"]


class Sampler:
    """Draws its order from a generator that goes on from epoch to epoch, and saves it."""

    def __init__(self) -> None:
        self.rng, self.order, self.i = random.Random(4), [], 0

    def __iter__(self) -> Iterator[int]:
        if not self.order:
            self.order = self.rng.sample(range(20), 20)
        while self.i < 20:
            self.i += 1
            yield self.order[self.i - 1]
        self.order, self.i = [], 0

    def __len__(self) -> int:
        return 20

    def state_dict(self) -> dict:
        return {"rng": self.rng.getstate(), "order": list(self.order), "i": self.i}

    def load_state_dict(self, state: dict) -> None:
        self.rng.setstate(state["rng"])
        self.order, self.i = list(state["order"]), state["i"]


# --- loaders --------------------------------------------------------------------------------------------------------


class Own:
    """A loader of one's own that goes on where it was stopped; an ended epoch has nothing left."""

    def __init__(self) -> None:
        self.rng, self.epoch, self.batch = random.Random(6), 0, 0

    def __len__(self) -> int:
        return 5

    def __iter__(self) -> Iterator[Any]:
        while self.batch < 5:
            self.batch += 1
            yield torch.tensor([self.epoch + self.rng.random()])
        self.batch = 0

    def state_dict(self) -> dict:
        return {"rng": self.rng.getstate(), "epoch": self.epoch, "batch": self.batch}

    def load_state_dict(self, state: dict) -> None:
        self.rng.setstate(state["rng"])
        self.epoch, self.batch = state["epoch"], state["batch"]


class OwnTold(Own):
    def set_epoch(self, epoch: int) -> None:
        self.epoch = epoch


class Rolling(Own):
    """Takes the state of the end of an epoch for the start of the next one."""

    def __iter__(self) -> Iterator[Any]:
        if self.batch == 5:
            self.epoch, self.batch = self.epoch + 1, 0
        return self._rest()

    def _rest(self) -> Iterator[Any]:
        while self.batch < 5:
            self.batch += 1
            yield torch.tensor([self.epoch + self.rng.random()])


class RollingUnsized(Rolling):
    __len__ = None


class SharedRng:
    """Its iterators save their state, and the generator that they share is that of the loader."""

    def __init__(self) -> None:
        self.rng = random.Random(7)

    def __iter__(self) -> Any:
        return _SharedRngIterator(self.rng)


class _SharedRngIterator:
    def __init__(self, rng: random.Random) -> None:
        self.rng, self.i = rng, 0

    def __iter__(self) -> Any:
        return self

    def __next__(self) -> Any:
        if self.i == 5:
            raise StopIteration
        self.i += 1
        return torch.tensor([self.rng.random()])

    def get_state(self) -> dict:
        return {"i": self.i, "rng": self.rng.getstate()}

    def set_state(self, state: dict) -> None:
        self.i = state["i"]
        self.rng.setstate(state["rng"])


def generator_function() -> Iterator[Any]:
    return (torch.rand(2) for _ in range(5))


def seeded() -> torch.Generator:
    return torch.Generator().manual_seed(5)


def stream(kind: type = Stream, batch_size: Any = 4, **options: Any) -> StatefulDataLoader:
    return StatefulDataLoader(kind(), batch_size, **options)


def grain_map() -> Any:
    return grain.MapDataset.range(20).shuffle(seed=1).map(float).batch(4)


def grain_iterable(endless: bool = False) -> Any:
    made = grain_map().repeat() if endless else grain_map()
    return made.to_iter_dataset(grain.ReadOptions(num_threads=1, prefetch_buffer_size=1))


def shuffled() -> data.Batches:
    return data.batches(torch.arange(20), 4, seed=1)


def distributed() -> StatefulDataLoader:
    sampler = StatefulDistributedSampler(range(20), num_replicas=1, rank=0, shuffle=True)
    return StatefulDataLoader(torch.arange(20), 4, sampler=sampler)


class Keeps:
    """A data set, or an iterable of batches, that keeps a generator and does not save it."""

    def __init__(self, rng: Any, draw: Callable[[Any], float]) -> None:
        self.rng, self.draw = rng, draw

    def __len__(self) -> int:
        return 20

    def __getitem__(self, i: int) -> torch.Tensor:
        return torch.tensor([i + self.draw(self.rng)])


class KeepsNested(Keeps):
    def __init__(self) -> None:
        self.transforms = [None, Keeps(np.random.default_rng(4), np.random.Generator.random)]

    def __getitem__(self, i: int) -> torch.Tensor:
        return self.transforms[1][i]


class KeepsStream(IterableDataset):
    def __init__(self) -> None:
        self.rng = random.Random(8)

    def __iter__(self) -> Iterator[Any]:
        for _ in range(20):
            yield torch.tensor([self.rng.random()])
        self.rng.random()


class KeepsStreamSized(KeepsStream):
    def __len__(self) -> int:
        return 20


class KeepsBatches:
    def __init__(self) -> None:
        self.rng = random.Random(8)

    def __iter__(self) -> Iterator[Any]:
        return (torch.tensor([self.rng.random()]) for _ in range(5))


class KeepsLonger(KeepsBatches):
    def __len__(self) -> int:
        return 4


def closure() -> Callable[[], Any]:
    rng = np.random.RandomState(9)
    return lambda: (torch.tensor([rng.normal()]) for _ in range(5))


def bound() -> Callable[[], Any]:
    keeps = KeepsBatches()
    return keeps.__iter__


def keeping(kind: str) -> Keeps:
    if kind == "python":
        return Keeps(random.Random(3), random.Random.random)
    if kind == "torch":
        return Keeps(torch.Generator().manual_seed(3), lambda rng: torch.rand((), generator=rng).item())
    return KeepsNested()


KINDS: dict[str, Callable[[], Any]] = {
    "map": lambda: StatefulDataLoader(torch.arange(20), 4, shuffle=True),
    "map, generator": lambda: StatefulDataLoader(torch.arange(20), 4, shuffle=True, generator=seeded()),
    "map, sampler told the epoch": distributed,
    "map, data set with state": lambda: StatefulDataLoader(Augmented(), 4, shuffle=True),
    "map, sampler with state": lambda: StatefulDataLoader(torch.arange(20), 4, sampler=Sampler()),
    "stream": stream,
    "stream, length": lambda: stream(Sized),
    "stream, smaller last batch": lambda: stream(batch_size=6),
    "stream, length, smaller last batch": lambda: stream(Sized, batch_size=6),
    "stream, no batch size": lambda: stream(lambda: Stream(5), batch_size=None),
    "stream that draws at the start": lambda: stream(Orders),
    "stream with a tensor it writes into": lambda: stream(Buffered),
    "endless": lambda: stream(Endless),
    "endless, take": lambda: data.take(stream(Endless), 5),
    "endless, stream": lambda: data.stream(stream(Endless), 5),
    "nodes": lambda: Loader(Batcher(IterableWrapper(Sized()), 4)),
    "own": Own,
    "own, told the epoch": OwnTold,
    "own, rolls over": Rolling,
    "own, rolls over, no length": RollingUnsized,
    "iterators with the loader's generator": SharedRng,
    "grain map": grain_map,
    "grain iterable": grain_iterable,
    "grain endless": lambda: data.stream(grain_iterable(endless=True), 5),
    "list": lambda: [torch.tensor([float(i)]) for i in range(5)],
    "batches": shuffled,
    "loader": lambda: DataLoader(torch.arange(20), 4, shuffle=True),
    "loader, generator": lambda: DataLoader(torch.arange(20), 4, shuffle=True, generator=seeded()),
    "loader, data set keeps python's": lambda: DataLoader(keeping("python"), 4, shuffle=True),
    "loader, data set keeps torch's": lambda: DataLoader(keeping("torch"), 4, shuffle=True),
    "loader, data set keeps numpy's": lambda: DataLoader(keeping("numpy"), 4, shuffle=True),
    "loader, stream with state": lambda: DataLoader(Stream(), 4),
    "loader, stream with state, length": lambda: DataLoader(Sized(), 6),
    "loader, stream keeps": lambda: DataLoader(KeepsStream(), 4),
    "loader, stream keeps, length": lambda: DataLoader(KeepsStreamSized(), 4),
    "map, data set keeps": lambda: StatefulDataLoader(keeping("numpy"), 4, shuffle=True),
    "stream keeps": lambda: stream(KeepsStream),
    "iterable keeps": KeepsBatches,
    "iterable keeps, longer than its length": KeepsLonger,
    "function": lambda: generator_function,
    "function keeps": closure,
    "method keeps": bound,
    "take of what keeps": lambda: data.take(DataLoader(KeepsStream(), 4), 3),
    "prefetch of what keeps": lambda: data.prefetch(DataLoader(KeepsStream(), 4), "cpu"),
    "zip": lambda: data.zip((stream(Sized), shuffled())),
    "zip, no length": lambda: data.zip((stream(Endless), stream())),
    "zip, shortest second": lambda: data.zip((stream(lambda: Sized(28)), stream(Sized))),
    "zip, pad": lambda: data.zip((stream(lambda: Sized(8)), stream(Sized), shuffled()), mode="pad"),
    "zip, cycle": lambda: data.zip((stream(lambda: Augmented(8)), DataLoader(keeping("numpy"), 4)), mode="cycle"),
    "zip, cycle, whole passes": lambda: data.zip((stream(lambda: Sized(4)), stream(Sized)), mode="cycle"),
    "concat": lambda: data.concat(stream(lambda: Sized(8)), data.take(shuffled(), 2), stream(lambda: Stream(8))),
    "concat, length": lambda: data.concat(stream(lambda: Sized(8)), [torch.ones(1)], stream(lambda: Sized(8, 6))),
    "concat, samplers that have ended": lambda: data.concat(distributed(), stream(OrdersSized)),
    "take": lambda: data.take(stream(Sized), 3),
    "take of all": lambda: data.take(stream(Sized), 9),
    "a rank's samples": lambda: shard_samples(data.as_source(stream()), SampleShard(2, (1,))),
    "a rank's samples, length": lambda: shard_samples(data.as_source(stream(Sized)), SampleShard(2, (1,))),
    "prefetch": lambda: data.prefetch(stream(), "cpu"),
    "prefetch, length": lambda: data.prefetch(stream(Sized), "cpu"),
    "take of prefetch": lambda: data.take(data.prefetch(stream(Sized), "cpu"), 4),
    "stream of prefetch": lambda: data.stream(data.prefetch(stream(Endless), "cpu"), 5),
    "zip of prefetch and own": lambda: data.zip({"a": data.prefetch(stream(), "cpu", depth=3), "b": Own()}),
}

FORK: dict[str, Any] = {"num_workers": 2, "multiprocessing_context": "fork"}
WITH_WORKERS: dict[str, Callable[[], Any]] = {
    "map": lambda: StatefulDataLoader(torch.arange(20), 4, shuffle=True, **FORK),
    "map, sampler with state": lambda: StatefulDataLoader(torch.arange(20), 4, sampler=Sampler(), **FORK),
    "map, workers stay": lambda: StatefulDataLoader(torch.arange(20), 4, shuffle=True, persistent_workers=True, **FORK),
    "shards": lambda: StatefulDataLoader(Shards(), 4, **FORK),
    "shards, uneven": lambda: StatefulDataLoader(Shards(uneven=8), 2, **FORK),
    "loader": lambda: DataLoader(torch.arange(20), 4, shuffle=True, **FORK),
    "loader, workers stay": lambda: DataLoader(torch.arange(20), 4, shuffle=True, persistent_workers=True, **FORK),
}


# --- reading --------------------------------------------------------------------------------------------------------


def saved(state: Any) -> Any:
    """What a snapshot makes of a state: other tensors of the same content, and what JSON makes of the rest."""
    leaves, structure = tree.flatten(state)
    plain = json.loads(json.dumps([None if isinstance(leaf, torch.Tensor) else leaf for leaf in leaves]))
    back = [leaf.clone() if isinstance(leaf, torch.Tensor) else p for leaf, p in zip(leaves, plain, strict=True)]
    return tree.unflatten(structure, back)


def read(make: Callable[[], Any], cuts: tuple[int, ...], total: int, *, burst: int = 1000) -> list[Any]:
    """Return the batches of a run that is cut after so many, each time with a new loader, as in a new process.

    With a `burst` the state is looked at after so many batches, as periodic snapshots do.
    """
    seen: list[Any] = []
    cursor = Cursor()
    for end in (*cuts, total):
        feed = Feed(data.as_source(make()), torch.device("cpu"))
        feed.begin(cursor.loader)
        while cursor.batches < end:
            left = burst if feed.length is None else min(burst, feed.length - cursor.batch)
            n = min(left, end - cursor.batches)
            got = tree.map(torch.as_tensor, list(feed.take(cursor, n)))
            seen += got
            assert got or cursor.batch, f"an epoch without batches after {cursor}"
            cursor = cursor.replace(batch=cursor.batch + len(got), batches=cursor.batches + len(got))
            if feed.at_end(cursor.batch, len(got) < n):
                feed.end_epoch()
                cursor = cursor.replace(epoch=cursor.epoch + 1, batch=0)
            if burst < 1000:
                feed.loader_state()
        cursor = cursor.replace(loader=saved(feed.loader_state()))
        feed.close()
    return seen


def differing(make: Callable[[], Any], total: int, cuts: list[tuple[int, ...]]) -> list[tuple[int, ...]]:
    """Return the cuts after which a run has other batches than the straight one."""
    straight = read(make, (), total)
    assert len(straight) == total
    assert len({tree.digest(batch) for batch in straight}) > 4
    looked = [] if tree.equal(read(make, (), total, burst=1), straight) else [("looked at",)]
    return looked + [cut for cut in cuts if not tree.equal(read(make, cut, total), straight)]


def all_cuts(total: int) -> list[tuple[int, ...]]:
    """Every cut; and every cut with more after it: at once, after one batch and after some."""
    every = range(1, total)
    return [(a,) for a in every] + [tuple(b for b in (a, a, a + 1, a + 4) if b < total) for a in every]


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    for name, make in WITH_WORKERS.items():
        print(f"{name}: {differing(make, 12, [(5,), (6,), (2, 5, 8), (10, 11)])}")
