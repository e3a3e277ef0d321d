"""Samplers that give each rank a share of the data: recognised, read as they are, or refused.

Under a plan the rows of such a loader become the microbatches of its rank. Where that cannot be (other ranks than those
of the plan, evaluations), the error names the loader to write instead. Knows torch's conventions, not packages.
"""

from __future__ import annotations

import dataclasses
from typing import Any, Protocol, runtime_checkable

from purestep.data.adapters import ThirdPartyLoader
from purestep.data.per_rank import ShareReader, share_seed
from purestep.data.sampler import SampleShard
from purestep.data.source import Gather, Source
from purestep.errors import DataError, explain
from purestep.sharding.local_batches import LocalBatch, microbatch_sizes


@runtime_checkable
class RankSampler(Protocol):
    """A sampler as torch's DistributedSampler, and those of timm, transformers, torchdata and Lightning."""

    num_replicas: int
    rank: int


@runtime_checkable
class RankBatchSampler(Protocol):
    """A batch sampler as Accelerate's BatchSamplerShard."""

    num_processes: int
    process_index: int


@dataclasses.dataclass(frozen=True)
class RankedLoader:
    """A loader whose sampler shards the data by rank.

    Attributes:
        source: the loader.
        sampler: its sampler, or batch sampler.
        rank: whose share it reads.
        ranks: how many shares there are.
    """

    source: ThirdPartyLoader
    sampler: object
    rank: int
    ranks: int

    def __str__(self) -> str:
        named = f"{type(self.sampler).__module__}.{type(self.sampler).__qualname__}"
        return f"{self.source!r} with {named} over {self.ranks} ranks"

    @property
    def instead(self) -> str:
        """The loader of the same global batches."""
        loader = self.source.components()[0]
        size = getattr(loader, "batch_size", None)
        samples = f"{size * self.ranks}" if isinstance(size, int) else f"{self.ranks} * batch_size"
        shuffle = getattr(self.sampler, "shuffle", True)
        return (
            f"ps.data.batches(dataset, batch_size={samples}, shuffle={shuffle}, seed=0)   # each rank reads its shard\n"
            f"or DataLoader(dataset, batch_size={samples}, shuffle={shuffle})   # each rank reads all, computes its "
            "shard"
        )


def rank_sampler(source: Source) -> RankedLoader | None:
    """Return the loader whose sampler, or batch sampler, gives this rank a share of the data; None for any other."""
    if not isinstance(source, ThirdPartyLoader):
        return None
    for component in source.components()[1:]:
        rank, ranks = _place_of(component)
        if ranks > 1:
            return RankedLoader(source, component, rank, ranks)
    return None


def read_own_share(loader: RankedLoader, shard: SampleShard, gather: Gather) -> Source:
    """Return a source of `LocalBatch`es: the rows that a loader gives to this rank are those of its microbatches.

    A global batch is what the loaders of all ranks give together. Each rank's rows are cut into its microbatches in
    their order, so the batch is that of the sampler on so many ranks, and not of any other number.

    Raises:
        DataError: on every rank: the sampler is one for other ranks than those that share a batch.
    """
    places = gather((shard.indices, loader.rank, loader.ranks))
    shares = {indices: {rank for other, rank, _ in places if other == indices} for indices, _, _ in places}
    if any(ranks != len(shares) for *_, ranks in places) or sorted(map(sorted, shares.values())) != [
        [rank] for rank in range(len(shares))
    ]:
        shown = ", ".join(f"rank {r}: share {rank} of {ranks}" for r, (_, rank, ranks) in enumerate(places[:8]))
        raise DataError(
            explain(
                "the sampler of a loader shards the data for other ranks than those that share a batch",
                where=f"{loader}; {shown}; {len(shares)} ranks have microbatches of their own",
                why="some samples would be read twice and others by no rank",
                instead=f"DistributedSampler(dataset, num_replicas={len(shares)}, rank=...)   # each rank another one\n"
                f"or {loader.instead}",
            )
        )

    def assemble(parts: dict[int, Any], size: int) -> LocalBatch:
        _check_cut(loader, shard, size)
        return LocalBatch(parts[loader.rank], size * loader.ranks, shard.total)

    members = {loader.rank: loader.source.reseeded(share_seed(loader.source.seed, loader.rank))}
    identity = {"loader": loader.source, "ranks": loader.ranks}
    return ShareReader(members, loader.ranks, gather, assemble, loader.source, identity)


def _check_cut(loader: RankedLoader, shard: SampleShard, size: int) -> None:
    sizes = microbatch_sizes(size * loader.ranks, shard.total)
    if sum(sizes[i] for i in shard.indices) != size:
        each = len(shard.indices)
        raise DataError(
            explain(
                "the samples that a sampler gives to each rank do not divide into its microbatches",
                where=f"{loader}: {size} samples, {each} microbatches on each of {loader.ranks} ranks",
                why="the ranks would need samples of each other to make microbatches of equal size",
                instead=f"a batch_size that is a multiple of {each}, with drop_last=True",
            )
        )


def refuse_rank_sampler(source: Source) -> None:
    """Refuse, for an evaluation, a loader whose sampler gives this rank a share of the data only.

    Raises:
        DataError: names the sampler, and the loader of global batches.
    """
    if (loader := rank_sampler(source)) is not None:
        raise DataError(
            explain(
                "the sampler of a loader shards the data by rank, and an evaluation deals batches to ranks itself",
                where=str(loader),
                why="each rank would compute its part of a batch that no other rank reads, and samplers that make "
                "shares equal repeat samples, which would count twice",
                instead=loader.instead,
            )
        )


def _place_of(component: object) -> tuple[int, int]:
    """Whose share a component reads, and of how many."""
    places: list[tuple[object, object]] = []
    if isinstance(component, RankBatchSampler):
        places.append((component.process_index, component.num_processes))
    if isinstance(component, RankSampler):
        places.append((component.rank, component.num_replicas))
    for rank, ranks in places:
        if isinstance(rank, int) and isinstance(ranks, int) and ranks > 1:
            return rank, ranks
    return 0, 1
