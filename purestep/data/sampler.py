"""Which samples make up which batch: a keyed permutation of the indices that is never stored.

Owns `Permutation` (any position of any epoch in O(1) time and memory), `BatchOrder`, the arithmetic of epochs and
batches, and the shards that ranks read. It never touches a sample. `Batches` and the worker pool ask it for indices.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from typing import NamedTuple

import numpy as np
from torch import Tensor

from purestep import random
from purestep.sharding.local_batches import rows

# Odd multipliers and the middle shift of the round hash, in the narrowest arithmetic that holds the domain.
_NARROW = (np.uint32(0x9E3779B1), np.uint32(15), np.uint32(0x85EBCA77))
_WIDE = (np.uint64(0x9E3779B97F4A7C15), np.uint64(32), np.uint64(0xD6E8FEB86659FD93))
# Indices are computed for many batches at once; 4096 of them keep every temporary inside the L1 and L2 caches.
_CHUNK = 4096


@dataclasses.dataclass(frozen=True)
class Permutation:
    """A bijection of `range(n)`, evaluated at single positions.

    An alternating Feistel network permutes the integers of b bits, 2**b being the smallest power of two >= n (and
    >= 4); a value outside `range(n)` is permuted again until it falls inside (cycle walking), less than twice on
    average. Each round xors one half with a keyed multiply-xorshift-multiply hash of the other, in 32-bit
    arithmetic up to 2**32 elements and in 64-bit arithmetic beyond.

    Args:
        n: number of elements, 1 or more.
        words: one 64-bit round key a round.

    Examples:
        >>> order = permutation(random.key(0), 5)
        >>> sorted(order(np.arange(5)).tolist())
        [0, 1, 2, 3, 4]

    Reference: J. Black and P. Rogaway, "Ciphers with arbitrary finite domains", CT-RSA 2002.
    """

    n: int
    words: tuple[int, ...] = dataclasses.field(repr=False)

    def __call__(self, positions: np.ndarray) -> np.ndarray:
        """Return the elements at some positions: int64[k] in [0, n) for int64[k] in [0, n)."""
        dtype = np.uint32 if self.n <= 1 << 32 else np.uint64
        values = self._network(positions.astype(dtype))
        # Cycle walking: following the cycle of a value outside of range(n) to its first element inside keeps the map a
        # bijection of range(n), because every element is the end of exactly one such walk.
        last = dtype(self.n - 1)
        outside = np.flatnonzero(values > last)
        while outside.size:
            walked = self._network(values[outside])
            values[outside] = walked
            outside = outside[walked > last]
        return values.astype(np.int64)

    def _network(self, values: np.ndarray) -> np.ndarray:
        integer = values.dtype.type
        width = values.dtype.itemsize * 8
        first, half, second = _NARROW if width == 32 else _WIDE
        bits = max(2, (self.n - 1).bit_length())
        low_bits = bits // 2
        shift = integer(low_bits)
        low, high = values & integer((1 << low_bits) - 1), values >> shift
        # A multiplication mixes the high bits of a word best, so each half takes its bits from that end of the hash.
        keep_high, keep_low = integer(width - (bits - low_bits)), integer(width - low_bits)
        # Everything is written into these two buffers: new arrays for each of 8 rounds would cost more than the hash.
        hashed, buffer = np.empty_like(low), np.empty_like(low)
        for number, word in enumerate(self.words):
            source, target, keep = (low, high, keep_high) if number % 2 == 0 else (high, low, keep_low)
            np.add(source, integer(word & (1 << width) - 1), out=hashed)
            np.multiply(hashed, first, out=hashed)
            np.right_shift(hashed, half, out=buffer)
            np.bitwise_xor(hashed, buffer, out=hashed)
            np.multiply(hashed, second, out=hashed)
            np.right_shift(hashed, keep, out=hashed)
            np.bitwise_xor(target, hashed, out=target)
        np.left_shift(high, shift, out=high)
        return np.bitwise_or(high, low, out=high)


def permutation(key: Tensor, n: int) -> Permutation:
    """Derive the permutation of `range(n)` that belongs to a key.

    Args:
        key: int64[2], a PRNG key on the CPU.
        n: number of elements, 1 or more.

    Examples:
        >>> permutation(random.key(0), 10)(np.array([0, 1, 2])).shape
        (3,)
    """
    # A round of a tiny network holds few random bits, so small domains take more rounds; they cost next to nothing.
    rounds = 8 if n > 1 << 8 else 32
    words = random.bits(key, (rounds, 2)).tolist()
    return Permutation(n, tuple(low | high << 32 for low, high in words))


class Request(NamedTuple):
    """One batch to load.

    Attributes:
        epoch, batch: its position: the number of the epoch, and of the batch in it.
        indices: of the samples to load, int64[b].
        samples: number of samples of the global batch; more than `indices` has where a rank reads a shard of it.
    """

    epoch: int
    batch: int
    indices: np.ndarray
    samples: int


@dataclasses.dataclass(frozen=True)
class SampleShard:
    """A shard of every batch: the samples of some of its microbatches.

    Args:
        total: number of microbatches of a global batch.
        indices: which of them this rank reads.
    """

    total: int
    indices: tuple[int, ...]

    def microbatches(self, count: int) -> tuple[int, ...]:
        """Return the microbatches of the shard, as a plan does."""
        return self.indices

    def rows(self, samples: int) -> np.ndarray:
        """Return the rows of a global batch of so many samples that the shard has, in its order: int64[n].

        Examples:
            >>> SampleShard(total=4, indices=(1, 3)).rows(8).tolist()
            [2, 3, 6, 7]
        """
        return rows(samples, self.total, self.indices)

    @property
    def partial(self) -> bool:
        """Whether other ranks read some of the microbatches."""
        return len(self.indices) < self.total


@dataclasses.dataclass(frozen=True)
class BatchShard:
    """A shard of the batches of an epoch: those whose number leaves `index` when divided by `count`, unsharded."""

    index: int
    count: int


Shard = SampleShard | BatchShard


@dataclasses.dataclass(frozen=True)
class BatchOrder:
    """The order of a data set: which samples make up each batch, a pure function of (seed, epoch, batch).

    Args:
        samples: number of samples in the data set.
        batch_size: samples a batch.
        seed: of the order.
        shuffle: whether the order is a new permutation each epoch; False is the order of the data set.
        drop_last: whether a last batch of fewer samples is left out.
        limit: most batches an epoch, None for all.
        shard: the shard that this rank reads: some samples of every batch, or every n-th batch; None for all.

    Examples:
        >>> order = BatchOrder(samples=5, batch_size=2, seed=0, shuffle=False, drop_last=False)
        >>> [request.indices.tolist() for request in order.requests(epoch=0, batch=1)]
        [[2, 3], [4]]
        >>> second = dataclasses.replace(order, shard=SampleShard(total=2, indices=(1,)))
        >>> [request.indices.tolist() for request in second.requests(epoch=0)][:2]
        [[1], [3]]
    """

    samples: int
    batch_size: int
    seed: int
    shuffle: bool
    drop_last: bool
    limit: int | None = None
    shard: Shard | None = None

    def length(self) -> int:
        """Return the number of batches of an epoch, over all ranks."""
        full = self.samples // self.batch_size if self.drop_last else -(-self.samples // self.batch_size)
        return full if self.limit is None else min(full, self.limit)

    def indices(self, epoch: int, start: int, stop: int) -> np.ndarray:
        """Return the samples at positions [start, stop) of an epoch, int64."""
        positions = np.arange(start, stop, dtype=np.int64)
        return self._permutation(epoch)(positions) if self.shuffle else positions

    def numbers(self, batch: int = 0) -> range:
        """Return the numbers of the batches that this rank reads, from number `batch` on."""
        if not isinstance(self.shard, BatchShard):
            return range(batch, self.length())
        index, count = self.shard.index, self.shard.count
        return range(batch + (index - batch) % count, self.length(), count)

    def requests(self, epoch: int, batch: int = 0) -> Iterator[Request]:
        """Yield the batches of an epoch from number `batch` on; any position costs the same."""
        numbers, size = self.numbers(batch), self.batch_size
        permute = self._permutation(epoch) if self.shuffle else None
        shard = self.shard if isinstance(self.shard, SampleShard) and self.shard.partial else None
        # One call of the permutation serves many batches, so that small ones share its fixed cost (60 numpy calls).
        stride = max(1, _CHUNK // (size * numbers.step))
        for chunk in (numbers[i : i + stride] for i in range(0, len(numbers), stride)):
            first = chunk[0] * size
            indices = np.arange(first, min((chunk[-1] + 1) * size, self.samples), dtype=np.int64)
            if permute is not None:
                indices = permute(indices)
            for number in chunk:
                offset = number * size - first
                full = indices[offset : offset + size]
                local = full if shard is None else full[shard.rows(len(full))]
                yield Request(epoch, number, local, len(full))

    def _permutation(self, epoch: int) -> Permutation:
        return permutation(random.fold_in(random.key(self.seed), "order", epoch), self.samples)
