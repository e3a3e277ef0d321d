"""Loaders that read per rank: a data set in a fixed number of shares, of which each rank opens its own.

Owns `per_rank`, and the reader that puts batches of several shares together and gathers their states. How many shares
there are is a property of the data and not of the job, so batches and positions are those of any number of ranks.
"""

from __future__ import annotations

import builtins
import dataclasses
import functools
import itertools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from purestep import tree
from purestep.arguments import Count, Seed, checked
from purestep.data import seeding
from purestep.data.batches import limit
from purestep.data.sampler import SampleShard
from purestep.data.source import Gather, Source, as_source, close
from purestep.errors import DataError, explain
from purestep.sharding.local_batches import LocalBatch, check_samples, take_rows


@dataclasses.dataclass(frozen=True)
class Share:
    """Which share of a data set a loader reads.

    Args:
        index: of the share, from 0.
        count: how many shares there are.

    Examples:
        >>> files = ["a.tar", "b.tar", "c.tar", "d.tar"]
        >>> files[Share(1, 2).slice]
        ['b.tar', 'd.tar']
    """

    index: int
    count: int

    @property
    def slice(self) -> builtins.slice:
        """Every `count`-th item from number `index` on."""
        return slice(self.index, None, self.count)


@checked(DataError)
def per_rank(make: Callable[[Share], Any], shares: Count, *, seed: Seed = 0) -> PerRank:
    """Read a data set in shares, of which each rank opens its own, and no other.

    Batch b of an epoch is the concatenation of batch b of each share, in the order of the shares. Without a plan one
    process reads all shares; under a plan each rank opens those that its microbatches lie in. So the batches, and the
    bits, are the same on any number of ranks, and a run resumes on another number of them: the snapshot has the state
    of each share's loader. An epoch has as many batches as the shortest share.

    With as many shares as microbatches (or a multiple of that), no two ranks open the same share.

    Args:
        make: returns the loader of one share, anything `as_source` takes, with a `len`. Its batches have the same
            number of samples in every share.
        shares: how many shares there are, 1 or more; the same number for as long as the run lives.
        seed: of the global generators while a third-party loader works; another one is made of it for each share.

    Raises:
        DataError: the length of a share is not known, or is 0.

    Examples:
        >>> data = torch.arange(8)
        >>> train = per_rank(lambda share: torch.utils.data.DataLoader(data[share.slice], 2), shares=2)
        >>> [batch.tolist() for batch in train.open(0, 0)]
        [[0, 2, 1, 3], [4, 6, 5, 7]]
    """
    return PerRank(make, shares, seed)


class PerRank:
    """A source that is read in shares; see `per_rank`."""

    def __init__(self, make: Callable[[Share], Any], shares: int, seed: int, limit: int | None = None) -> None:
        self._make, self._shares, self._seed, self._limit = make, shares, seed, limit

    def __repr__(self) -> str:
        return f"per_rank({getattr(self._make, '__qualname__', None) or repr(self._make)}, shares={self._shares})"

    def length(self) -> int:
        """Return the number of batches of an epoch: that of the shortest share."""
        return self._all.length()

    def open(self, epoch: int, batch: int, state: Any = None) -> Iterator[Any]:
        """Return an iterator over global batches, from number `batch` on."""
        return self._all.open(epoch, batch, state)

    def state(self) -> list[Any] | None:
        """Return the states of the loaders by share."""
        return self._all.state()

    def sharded(self, shard: SampleShard, gather: Gather) -> ShareReader:
        """Return a source of the samples of some microbatches, which opens no shares but those they lie in."""
        return ShareReader(
            {index: self._member(index) for index in _shares_of(shard, self._shares)},
            self._shares,
            gather,
            functools.partial(_local, shard, self._shares),
            self,
            limit=self._limit,
        )

    def take(self, n: int | float) -> PerRank:
        """Return the first `n` batches of each epoch, or a fraction of them; see `ps.data.take`.

        Examples:
            >>> source = per_rank(lambda share: [torch.arange(2)] * 10, shares=2)
            >>> source.take(3).length(), source.take(0.5).length()
            (3, 5)
        """
        return PerRank(self._make, self._shares, self._seed, limit(n, self.length()))

    def identity(self) -> dict[str, Any]:
        """Return the function that makes the loaders, and the number of shares; a snapshot of a run records it."""
        return {"make": self._make, "shares": self._shares, "seed": self._seed, "limit": self._limit}

    def close(self) -> None:
        """Close the loaders of all shares."""
        if "_all" in self.__dict__:  # a cached property: absent until all shares were asked for
            self._all.close()

    @functools.cached_property
    def _all(self) -> ShareReader:
        members = {index: self._member(index) for index in range(self._shares)}
        return ShareReader(
            members, self._shares, lambda value: [value], lambda parts, size: join(parts), self, limit=self._limit
        )

    def _member(self, index: int) -> Source:
        return as_source(self._make(Share(index, self._shares)), seed=share_seed(self._seed, index))


class ShareReader:
    """Batches put together from those of some shares.

    Args:
        members: by share, those that are read here.
        shares: how many there are.
        gather: returns the values of all ranks; every rank that reads shares calls it with its own.
        assemble: makes a batch of one batch of each member, by share, and of their number of samples.
        source: what the shares were made from.
        identity: what a snapshot of a run records; `source` by default.
        limit: most batches an epoch, None for all.

    Raises:
        DataError: the length of a share is not known, or is 0, on any rank.
    """

    def __init__(
        self,
        members: Mapping[int, Source],
        shares: int,
        gather: Gather,
        assemble: Callable[[dict[int, Any], int], Any],
        source: Source,
        identity: Mapping[str, Any] | None = None,
        limit: int | None = None,
    ) -> None:
        self._members, self._shares, self._gather = dict(members), shares, gather
        self._assemble, self._source, self._identity = assemble, source, identity
        lengths = {index: member.length() for index, member in self._members.items()}
        length = _shortest({k: v for heard in gather(lengths) for k, v in heard.items()}, source)
        self._length = length if limit is None else min(limit, length)

    def __repr__(self) -> str:
        return repr(self._source)

    def length(self) -> int:
        """Return the number of batches of an epoch: that of the shortest share of all ranks."""
        return self._length

    def open(self, epoch: int, batch: int, state: list[Any] | None = None) -> Iterator[Any]:
        """Return an iterator over batches, from number `batch` on."""
        streams: dict[int, Iterator[Any]] = {
            # Never asked for the batch after the last: the member decides at its next `open` how it leaves the epoch.
            index: itertools.islice(
                member.open(epoch, batch, None if state is None else state[index]), self._length - batch
            )
            for index, member in self._members.items()
        }
        return self._read(streams, epoch, batch)

    def _read(self, streams: dict[int, Iterator[Any]], epoch: int, batch: int) -> Iterator[Any]:
        for number in range(batch, self._length):
            parts = {index: next(stream, _END) for index, stream in streams.items()}
            if ended := [index for index, part in parts.items() if part is _END]:
                raise _ended(self, ended, number, self._length)
            sizes = {index: check_samples(part, 1) for index, part in parts.items()}
            if len(set(sizes.values())) > 1:
                raise _uneven(self, sizes, epoch, number)
            yield self._assemble(parts, next(iter(sizes.values())))

    def state(self) -> list[Any] | None:
        """Return the states of the loaders of all ranks by share. Collective: every rank calls it."""
        known: dict[int, Any] = {}
        for heard in self._gather({index: member.state() for index, member in self._members.items()}):
            known |= heard
        states = [known.get(index) for index in range(self._shares)]
        return None if all(state is None for state in states) else states

    def identity(self) -> Any:
        """Return what decides which batches it gives; a snapshot of a run records it."""
        return self._source if self._identity is None else self._identity

    def close(self) -> None:
        """Close the loaders."""
        for member in self._members.values():
            close(member)


_END = object()


def share_seed(seed: int, index: int) -> int:
    """Return the seed of the global generators for one share, so that shares do not draw the same numbers."""
    low, high = seeding.epoch_words(seed, "share", index)
    return low | high << 32


def join(parts: Mapping[int, Any]) -> Any:
    """Concatenate batches along dim 0. Leaves without dims are taken from the first, and have to be equal in all.

    Raises:
        DataError: leaves differ in dtype, or leaves without dims in their value.

    Examples:
        >>> join({0: {"x": torch.zeros(2)}, 1: {"x": torch.ones(1)}})
        {'x': tensor([0., 0., 1.])}
    """
    batches = list(parts.values())
    return batches[0] if len(batches) == 1 else tree.map(_joined, *batches)


def _joined(*leaves: Any) -> Any:
    first = leaves[0]
    if isinstance(first, (torch.Tensor, np.ndarray)) and first.ndim:
        if len({leaf.dtype for leaf in leaves}) == 1:
            return torch.cat(leaves) if isinstance(first, torch.Tensor) else np.concatenate(leaves)
    elif all(bool(leaf == first) for leaf in leaves):
        return first
    raise DataError(
        explain(
            "the batches of the shares cannot be joined",
            where=f"a leaf of {len(leaves)} shares: {', '.join(tree.describe(leaf) for leaf in leaves[:4])}",
            why="a leaf with dims is concatenated along dim 0, with the dtype that all shares have; one without dims "
            "belongs to the whole batch",
            instead="tensors or arrays of one dtype, with the samples as dim 0",
        )
    )


def _shares_of(shard: SampleShard, shares: int) -> list[int]:
    """The shares in which the microbatches of a shard lie, where the microbatches of a batch are of equal size."""
    total = shard.total
    found = {s for i in shard.indices for s in range(i * shares // total, -(-(i + 1) * shares // total))}
    return sorted(found)


def _local(shard: SampleShard, shares: int, parts: dict[int, Any], size: int) -> LocalBatch:
    """The samples of the microbatches of a shard, from the batches of the shares that were read here."""
    wanted = shard.rows(size * shares)
    place = np.full(shares, -1, np.int64)
    place[list(parts)] = np.arange(len(parts))
    places = place[wanted // size]
    if (places < 0).any():
        raise DataError(
            explain(
                "a microbatch reaches into a share that another rank reads",
                where=f"{shares} shares of {size} samples each, {shard.total} microbatches",
                why="samples that do not divide evenly make the first microbatches larger by one sample",
                instead=f"shares whose batches together are a multiple of {shard.total} samples, also at the end of an "
                "epoch: drop_last=True",
            )
        )
    local = places * size + wanted % size
    joined = join(parts)
    in_order = len(local) == size * len(parts) and bool((np.diff(local) == 1).all())
    return LocalBatch(joined if in_order else take_rows(joined, local), size * shares, shard.total)


def _shortest(lengths: Mapping[int, int | None], source: Any) -> int:
    known = [length for length in lengths.values() if length is not None]
    if len(known) == len(lengths) and min(known) > 0:
        return min(known)
    index = next(index for index, length in sorted(lengths.items()) if not length)
    raise DataError(
        explain(
            "the number of batches of a share is not known" if lengths[index] is None else "a share has no batches",
            where=f"share {index} of {source!r}",
            why="an epoch ends on all ranks after the same batch, so each share has to say how many it has",
            instead="per_rank(lambda share: ps.data.stream(loader_of(share), 1000), shares=8)   # of an endless loader",
        )
    )


def _ended(source: ShareReader, ended: list[int], number: int, length: int) -> DataError:
    return DataError(
        explain(
            "a share ended before the others",
            where=f"share {ended[0]} of {source!r}, after {number} of {length} batches",
            why="its loader gave fewer batches than its length says",
            instead="ps.data.take(loader, n) with the batches that every share has, or a loader that repeats its data",
        )
    )


def _uneven(source: ShareReader, sizes: dict[int, int], epoch: int, number: int) -> DataError:
    shown = ", ".join(f"share {index}: {size} samples" for index, size in list(sizes.items())[:6])
    return DataError(
        explain(
            "the batches of the shares differ in their number of samples",
            where=f"{shown}; batch {number} of epoch {epoch} of {source!r}",
            why="no rank knows the sizes of the shares that it does not read",
            instead="drop_last=True",
        )
    )
