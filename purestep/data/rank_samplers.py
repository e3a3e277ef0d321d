"""Samplers that give each rank a shard of the data: under a plan they are refused, with the loader to write instead.

A plan shards every global batch itself, and its bits do not depend on the number of ranks. A sampler that shards the
data as well leaves all but one shard of each rank's data unread. Knows torch's conventions, not packages.
"""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from purestep.data.adapters import ThirdPartyLoader
from purestep.data.source import Source
from purestep.errors import DataError, explain


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


def refuse_rank_sampler(source: Source) -> None:
    """Refuse a loader whose sampler, or batch sampler, gives this rank a shard of the data only.

    Raises:
        DataError: names the sampler, and the loader of global batches.
    """
    if not isinstance(source, ThirdPartyLoader):
        return
    loader, *components = source.components()
    for component in components:
        ranks = _ranks_of(component)
        if ranks > 1:
            named = f"{type(component).__module__}.{type(component).__qualname__}"
            raise DataError(
                explain(
                    "the sampler of a loader shards the data by rank, and the plan of the step shards each batch again",
                    where=f"{source!r} with {named} over {ranks} ranks",
                    why="each rank would compute its shard of a batch that no other rank reads; the rest is lost",
                    instead=_instead(loader, component, ranks),
                )
            )


def _ranks_of(component: object) -> int:
    count = component.num_replicas if isinstance(component, RankSampler) else 1
    count = component.num_processes if isinstance(component, RankBatchSampler) else count
    return count if isinstance(count, int) else 1


def _instead(loader: object, sampler: object, ranks: int) -> str:
    """The loader of the same global batches."""
    size = getattr(loader, "batch_size", None)
    samples = f"{size * ranks}" if isinstance(size, int) else f"{ranks} * batch_size"
    shuffle = getattr(sampler, "shuffle", True)
    return (
        f"ps.data.batches(dataset, batch_size={samples}, shuffle={shuffle}, seed=0)   # each rank reads its shard\n"
        f"or DataLoader(dataset, batch_size={samples}, shuffle={shuffle})   # each rank reads all, computes its shard"
    )
