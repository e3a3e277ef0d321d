"""The shard of a source that one rank reads: samples of every batch for training, every n-th batch for evaluation.

Owns the choice between reading the shard only (a `Shardable` source, a loader whose sampler shards by rank) and reading
global batches and dropping what other ranks compute (every other source). The loop calls it when a step has a plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from purestep.data.batches import Batches
from purestep.data.rank_samplers import rank_sampler, read_own_share, refuse_rank_sampler
from purestep.data.sampler import BatchShard, SampleShard
from purestep.data.source import Gather, Shardable, Source, close
from purestep.sharding.local_batches import LocalBatch, local_batch


class ShardedSource:
    """A source whose batches are read in full and sharded afterwards; see `shard_samples`.

    Attributes:
        last: the global batch that was read last; ranks compare it.
    """

    def __init__(self, source: Source, shard: SampleShard) -> None:
        self.source, self.shard = source, shard
        self.last: Any = None

    def length(self) -> int | None:
        """Return the number of batches of an epoch."""
        return self.source.length()

    def open(self, epoch: int, batch: int, state: object = None) -> Iterator[LocalBatch]:
        """Return an iterator over local batches, from number `batch` on."""
        return self._local(self.source.open(epoch, batch, state))

    def _local(self, batches: Iterator[Any]) -> Iterator[LocalBatch]:
        for self.last in batches:
            yield local_batch(self.last, self.shard, self.shard.total)

    def state(self) -> object:
        """Return the state of the source."""
        return self.source.state()

    def identity(self) -> Source:
        """Return the source: its batches are the same on any number of ranks."""
        return self.source

    def close(self) -> None:
        """Close the source."""
        close(self.source)

    def __repr__(self) -> str:
        return repr(self.source)


def alone(value: Any) -> list[Any]:
    """Return the values of all ranks, where there is one."""
    return [value]


def shard_samples(source: Source, shard: SampleShard, gather: Gather = alone) -> Source:
    """Return a source of `LocalBatch`es: the samples of some microbatches of every batch. Collective with `gather`.

    Args:
        source: a `Shardable` one then reads no other samples; a loader whose sampler shards by rank reads what that
            gives; any other one, which gives the same batches on every rank, reads global batches, sharded afterwards.
        shard: which microbatches.
        gather: exchanges small values with the other ranks.

    Raises:
        DataError: the sampler of a loader shards the data for other ranks than there are.

    Examples:
        >>> import torch
        >>> from purestep.data import batches
        >>> train = batches(torch.arange(8), 4, shuffle=False)
        >>> [b.data.tolist() for b in shard_samples(train, SampleShard(2, (1,))).open(0, 0, None)]
        [[2, 3], [6, 7]]
    """
    if isinstance(source, Shardable):
        return source.sharded(shard, gather)
    found = rank_sampler(source)
    return ShardedSource(source, shard) if found is None else read_own_share(found, shard, gather)


def shard_batches(source: Source, shard: BatchShard) -> Source:
    """Return a source for `rounds`: `Batches` that read their shard only, any other source as it is.

    Raises:
        DataError: the sampler of a loader shards the data by rank.
    """
    if shard.count > 1:
        refuse_rank_sampler(source)
    return source.replace(shard=shard) if isinstance(source, Batches) else source


def rounds(source: Source, shard: BatchShard) -> Iterator[Any]:
    """Yield this rank's batch of each round of epoch 0, or None where the last round has none for it.

    In round i, rank r has batch `i * count + r`; so every rank sees the same number of rounds.

    Args:
        source: from `shard_batches`.
        shard: which rank of how many.

    Examples:
        >>> from purestep.data import as_source
        >>> list(rounds(as_source([10, 11, 12, 13, 14]), BatchShard(1, 2)))
        [11, 13, None]
    """
    if isinstance(source, Batches):
        batches = source.open(0, 0)
        try:
            for _ in range(-(-source.length() // shard.count)):
                yield next(batches, None)
        finally:
            batches.close()
        return
    # The source gives all batches in order; a round is read to its end, so that all ranks count the same rounds.
    stream = iter(source.open(0, 0, None))
    while True:
        read, local = 0, None
        for number, batch in enumerate(itertools.islice(stream, shard.count)):
            read, local = read + 1, batch if number == shard.index else local
        if not read:
            return
        yield local
