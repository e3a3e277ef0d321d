"""Samplers that give each rank a part of the data: under a plan they are refused, with the loader to write instead.

A plan cuts every global batch itself, and its bits do not depend on the number of ranks. A sampler that cuts as well
leaves all but one part of each rank's data unread. Knows torch's conventions, not packages.
"""

from __future__ import annotations

from typing import Any, Protocol, runtime_checkable

from purestep.data.foreign import Foreign
from purestep.data.source import Source
from purestep.errors import DataError, explain


@runtime_checkable
class Distributed(Protocol):
    """A sampler as torch's DistributedSampler, and those of timm, transformers, torchdata and Lightning."""

    num_replicas: int
    rank: int


@runtime_checkable
class BatchShard(Protocol):
    """A batch sampler as Accelerate's BatchSamplerShard."""

    num_processes: int
    process_index: int


def refuse_cut_by_rank(source: Source) -> None:
    """Refuse a loader whose sampler, or batch sampler, gives this rank a part of the data only.

    Raises:
        DataError: names the sampler, and the loader of global batches.
    """
    if not isinstance(source, Foreign):
        return
    loader, *parts = source.parts()
    for part in parts:
        ranks = _ranks_of(part)
        if ranks > 1:
            raise DataError(
                explain(
                    "the sampler of a loader cuts the data by rank, and the plan of the step cuts each batch as well",
                    where=f"{source!r} with {type(part).__module__}.{type(part).__qualname__} over {ranks} ranks",
                    why="each rank would compute its rows of a batch that the others never see; the rest is lost",
                    instead=_instead(loader, part, ranks),
                )
            )


def _ranks_of(part: Any) -> int:
    count = part.num_replicas if isinstance(part, Distributed) else 1
    count = part.num_processes if isinstance(part, BatchShard) else count
    return count if isinstance(count, int) else 1


def _instead(loader: Any, part: Any, ranks: int) -> str:
    """The loader of the same global batches."""
    size = getattr(loader, "batch_size", None)
    samples = f"{size * ranks}" if isinstance(size, int) else f"{ranks} * batch_size"
    shuffle = getattr(part, "shuffle", True)
    return (
        f"ps.data.batches(dataset, batch_size={samples}, shuffle={shuffle}, seed=0)   # each rank reads its own rows\n"
        f"or DataLoader(dataset, batch_size={samples}, shuffle={shuffle})   # each rank reads all, and cuts"
    )
