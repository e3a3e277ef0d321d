"""Shares of a data set, of which each rank opens its own: the same batches on any number of ranks."""

import random
import threading
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, DistributedSampler

import purestep as ps
from purestep.data import SampleShard, Shardable, Share, as_source, per_rank
from purestep.data.per_rank import join
from purestep.data.sharded import ShardedSource, shard_samples
from purestep.errors import DataError
from purestep.loop.stable_json import stable
from purestep.sharding.local_batches import LocalBatch, local_batch

N = 120


class Stream:
    """A loader of its own kind: a shuffle that goes on from epoch to epoch, and a state."""

    def __init__(self, share, size=2, drop=0):
        self.data = list(range(N))[share.slice]
        self.size, self.draws, self.at, self.drop = size, random.Random(share.index), 0, drop
        self.order = []

    def __len__(self):
        return 12 // self.size - self.drop

    def __iter__(self):
        if self.at == 0:
            self.order = self.draws.sample(self.data, 12)
        while self.at < 12 - self.drop * self.size:
            self.at += self.size
            yield {"x": torch.tensor(self.order[self.at - self.size : self.at]), "scale": torch.tensor(0.5)}
        self.at = 0

    def state_dict(self):
        version, words, gauss = self.draws.getstate()
        return {"draws": [version, list(words), gauss], "at": self.at, "order": list(self.order)}

    def load_state_dict(self, state):
        version, words, gauss = state["draws"]
        self.draws.setstate((version, tuple(words), gauss))
        self.at, self.order = state["at"], list(state["order"])


class Ranks:
    """The sources of several ranks, whose collective calls run in a thread for each rank."""

    def __init__(self, make_source, shards):
        self.values = [None] * len(shards)
        self.barrier = threading.Barrier(len(shards))
        self.sources = self.together(
            lambda rank: shard_samples(make_source(rank), shards[rank], lambda value: self.gather(rank, value))
        )

    def together(self, call):
        with ThreadPoolExecutor(len(self.values)) as threads:
            return list(threads.map(call, range(len(self.values))))

    def gather(self, rank, value):
        self.values[rank] = value
        self.barrier.wait()
        heard = list(self.values)
        self.barrier.wait()
        return heard

    def state(self):
        states = self.together(lambda rank: self.sources[rank].state())
        assert len({ps.digest(state) for state in states}) == 1
        return states[0]


def shards_of(ranks, total, turns=False):
    each = total // ranks
    return [
        SampleShard(total, tuple(range(r, total, ranks)) if turns else tuple(range(r * each, (r + 1) * each)))
        for r in range(ranks)
    ]


def read(iterator, n):
    return [next(iterator) for _ in range(n)]


@pytest.mark.parametrize(
    ("shares", "ranks", "turns"), [(2, 1, False), (2, 4, False), (4, 4, False), (4, 2, True), (8, 2, True)]
)
def test_rows_are_those_of_one_process_from_any_position(ranks, turns, shares):
    total = 4
    whole, alone = [], per_rank(Stream, shares)
    for epoch in range(2):
        whole.append(list(alone.open(epoch, 0, alone.state())))
    many = Ranks(lambda rank: per_rank(Stream, shares), shards_of(ranks, total, turns))
    local = [source.open(0, 0, None) for source in many.sources]
    for number in range(4):
        for shard, stream in zip(shards_of(ranks, total, turns), local, strict=True):
            found, expected = next(stream), local_batch(whole[0][number], shard, total)
            assert isinstance(found, LocalBatch)
            assert ps.digest(found) == ps.digest(expected)
            assert found.samples == 2 * shares
    # Another number of ranks goes on with the rest, into the next epoch.
    state = many.state()
    others = Ranks(lambda rank: per_rank(Stream, shares), shards_of(2, total))
    ends = [source.open(0, 4, state) for source in others.sources]
    for number in (4, 5):
        for shard, stream in zip(shards_of(2, total), ends, strict=True):
            assert ps.digest(next(stream)) == ps.digest(local_batch(whole[0][number], shard, total))
    for shard, source in zip(shards_of(2, total), others.sources, strict=True):
        found = next(source.open(1, 0, others.state()))
        assert ps.digest(found) == ps.digest(local_batch(whole[1][0], shard, total))


def test_a_rank_opens_no_shares_but_its_own():
    opened = []

    def make(share):
        opened.append((share.index, share.count))
        return Stream(share)

    source = per_rank(make, 8)
    assert opened == []
    shard_samples(source, SampleShard(4, (1, 3)))
    assert opened == [(2, 8), (3, 8), (6, 8), (7, 8)]
    assert stable(source)["shares"] == 8
    assert isinstance(source, Shardable)
    assert isinstance(ps.data.batches(torch.arange(3), 1), Shardable)


def test_an_epoch_is_as_long_as_the_shortest_share_of_any_rank():
    def make(share):
        return Stream(share, drop=share.index)

    assert len(list(per_rank(make, 3).open(0, 0))) == per_rank(make, 3).length() == 4
    many = Ranks(lambda rank: per_rank(make, 2), shards_of(2, 2))
    assert [source.length() for source in many.sources] == [5, 5]
    assert [len(list(source.open(0, 0))) for source in many.sources] == [5, 5]


def test_shares_do_not_draw_the_same_numbers():
    """Global generators, which a third-party loader draws from, are seeded for each share."""

    def make(share):
        return DataLoader(torch.arange(40)[share.slice], 4, shuffle=True, collate_fn=lambda x: torch.stack(x) // 2)

    first, second = next(per_rank(make, 2, seed=3).open(0, 0)).split(4)
    assert first.tolist() != second.tolist()
    again = next(per_rank(make, 2, seed=3).open(0, 0))
    assert torch.equal(again, torch.cat([first, second]))
    assert not torch.equal(again, next(per_rank(make, 2, seed=4).open(0, 0)))


class Short(Stream):
    def __len__(self):
        return 100


class Endless:
    def __iter__(self):
        return iter(lambda: torch.zeros(2), None)


WRONG = {
    "not known": (lambda share: Endless(), "share 0 of per_rank"),
    "has no batches": (lambda share: [], "share 0 of per_rank"),
    "ended before the others": (Short, "share 0 of per_rank(Short, shares=2), after 6 of 100 batches"),
    "differ in their number": (lambda share: [torch.zeros(2 + share.index)], "share 0: 2 samples, share 1: 3 samples"),
    "cannot be joined": (lambda share: [{"x": torch.zeros(2), "n": share.index}], "a leaf of 2 shares"),
}


@pytest.mark.parametrize("why", WRONG)
def test_wrong_shares_are_refused(why):
    make, where = WRONG[why]
    with pytest.raises(DataError, match=why) as error:
        list(per_rank(make, 2).open(0, 0))
    assert where in str(error.value)


def test_a_microbatch_that_reaches_into_another_rank_is_refused():
    source = shard_samples(per_rank(lambda share: [torch.arange(3)], 2), SampleShard(4, (0, 1)))
    with pytest.raises(DataError, match="reaches into a share that another rank reads") as error:
        next(source.open(0, 0))
    assert "a multiple of 4 samples" in str(error.value)


def test_arrays_are_joined_and_a_limit_reads_shares_too():
    joined = join({0: (np.zeros(2), "a"), 1: (np.ones(1), "a")})
    assert joined[0].tolist() == [0.0, 0.0, 1.0]
    with pytest.raises(DataError, match="cannot be joined"):
        join({0: np.zeros(2, np.float32), 1: np.zeros(2)})
    limited = ps.data.take(per_rank(Stream, 2), 3)
    shared = shard_samples(limited, SampleShard(2, (1,)))
    assert not isinstance(shared, ShardedSource)
    assert len(list(shared.open(0, 0))) == shared.length() == 3


# --- loaders with a sampler per rank ----------------------------------------------------------------------------------

DATA = torch.arange(48)


def sampled(rank, ranks=2, size=4, shuffle=True):
    return as_source(DataLoader(DATA, size, sampler=DistributedSampler(DATA, ranks, rank, shuffle=shuffle, seed=5)))


def test_a_distributed_sampler_is_read_as_it_is():
    many = Ranks(sampled, shards_of(2, 4))
    for epoch in range(2):
        for rank, source in enumerate(many.sources):
            own = DistributedSampler(DATA, 2, rank, seed=5)
            own.set_epoch(epoch)
            rows = torch.tensor(list(own)).split(4)
            found = list(source.open(epoch, 0, None))
            assert [batch.data.tolist() for batch in found] == [part.tolist() for part in rows]
            assert {(batch.samples, batch.microbatches) for batch in found} == {(8, 4)}
    assert stable(many.sources[0])["ranks"] == 2
    assert stable(many.sources[0]) == stable(many.sources[1])


@pytest.mark.parametrize(("of", "ranks"), [(lambda rank: 0, 2), (lambda rank: rank, 3)])
def test_a_sampler_for_other_ranks_is_refused(of, ranks):
    with pytest.raises(DataError, match="for other ranks than those that share a batch") as error:
        Ranks(lambda rank: sampled(of(rank), ranks), shards_of(2, 2)).sources[0].length()
    assert "num_replicas=2" in str(error.value)


def test_samples_that_do_not_divide_into_microbatches_are_refused():
    many = Ranks(lambda rank: sampled(rank, size=3), shards_of(2, 4))
    with pytest.raises(DataError, match="do not divide into its microbatches") as error:
        next(many.sources[0].open(0, 0, None))
    assert "3 samples, 2 microbatches on each of 2 ranks" in str(error.value)


def test_share_says_what_to_read():
    assert [list(range(7))[Share(i, 3).slice] for i in range(3)] == [[0, 3, 6], [1, 4], [2, 5]]
