"""Shares of a source: rows that are read by one rank each, batches in turns."""

import pytest
import torch

from purestep.data import as_source, batches
from purestep.data.sampler import BatchShard, SampleShard
from purestep.data.sharded import ShardedSource, rounds, shard_batches, shard_samples
from purestep.errors import DataError
from purestep.sharding.local_batches import LocalBatch, local_batch


class Samples(torch.utils.data.Dataset):
    def __init__(self, n):
        self.n, self.read = n, []

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.read.append(index)
        return {"x": torch.full((2,), float(index)), "y": index}


def noisy(sample, key):
    return {**sample, "key": key}


CUTS = [SampleShard(4, (0, 1)), SampleShard(4, (2, 3)), SampleShard(4, (1, 3)), SampleShard(6, (5,))]


def same(a, b):
    assert isinstance(a, LocalBatch)
    assert (a.samples, a.microbatches) == (b.samples, b.microbatches)
    assert a.data.keys() == b.data.keys()
    assert all(torch.equal(a.data[k], b.data[k]) for k in a.data)


@pytest.mark.parametrize("cut", CUTS)
@pytest.mark.parametrize("kind", ["samples", "columns"])
def test_rows_are_those_of_the_whole_batch_wherever_reading_begins(cut, kind, seed):
    data = Samples(23) if kind == "samples" else {"x": torch.randn(23, 3), "y": torch.arange(23)}
    source = batches(data, 5, seed=seed, drop_last=False, transform=noisy if kind == "samples" else None)
    shared = shard_samples(source, cut)
    for batch in (0, 3):
        whole = [local_batch(b, cut, cut.total) for b in source.open(2, batch)]
        found = list(shared.open(2, batch))
        assert len(found) == len(whole) == 5 - batch
        for a, b in zip(found, whole, strict=True):
            same(a, b)


def test_no_other_rows_are_read():
    data = Samples(24)
    list(shard_samples(batches(data, 8, seed=1), SampleShard(4, (1,))).open(0, 0, None))
    assert len(data.read) == 6


@pytest.mark.slow
def test_workers_load_the_same_rows():
    cut = SampleShard(4, (1, 3))
    source = batches({"x": torch.randn(20, 3)}, 6, seed=0, drop_last=False, collate=None, num_workers=1)
    shared = shard_samples(source, cut)
    try:
        for a, b in zip(shared.open(1, 1), source.replace(num_workers=0).open(1, 1), strict=True):
            same(a, local_batch(b, cut, 4))
        turns = shard_batches(source.replace(shuffle=False), BatchShard(1, 3))
        assert [b is None for b in rounds(turns, BatchShard(1, 3))] == [False, True]
        turns.close()
    finally:
        shared.close()


@pytest.mark.parametrize("count", [1, 2, 3, 7])
@pytest.mark.parametrize("length", ["known", "unknown"])
def test_turns_cover_every_batch_once_in_equal_rounds(count, length):
    whole = list(batches(torch.arange(23), 5, shuffle=False, drop_last=False))
    found = []
    for index in range(count):
        turns = BatchShard(index, count)
        made = batches(torch.arange(23), 5, shuffle=False, drop_last=False)
        source = made if length == "known" else as_source(lambda made=made: iter(made))
        found.append(list(rounds(shard_batches(source, turns), turns)))
    assert {len(f) for f in found} == {-(-5 // count)}
    ordered = [batch for column in zip(*found, strict=True) for batch in column]
    assert all(batch is None for batch in ordered[5:])
    assert all(torch.equal(a, b) for a, b in zip(ordered[:5], whole, strict=True))


def test_other_sources_are_cut_and_keep_their_state():
    source = shard_samples(as_source([torch.arange(6), torch.arange(6, 12)]), SampleShard(3, (2,)))
    assert isinstance(source, ShardedSource)
    assert (source.length(), source.state()) == (2, None)
    assert [b.data.tolist() for b in source.open(0, 1, None)] == [[10, 11]]


def test_skipping_is_refused_where_a_batch_is_shared():
    source = batches(Samples(8), 4, on_bad_sample="skip")
    assert shard_samples(source, SampleShard(2, (0, 1))).length() == 2
    with pytest.raises(DataError, match="does not work where several ranks read shards of one batch") as error:
        shard_samples(source, SampleShard(2, (0,)))
    assert "this rank reads microbatches 0 of 2" in str(error.value)
    assert "Subset(dataset, good)" in str(error.value)
