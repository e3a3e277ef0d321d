"""What a run reads from: the `Source` protocol, and `as_source`, which makes one of anything that gives batches.

Owns the contract between the loop and all data. The loop keeps (epoch, batch, state) in its cursor and opens sources
with it; a position that a source keeps itself never decides which batches it gives.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from typing import TYPE_CHECKING, Any, Protocol, runtime_checkable

from purestep.arguments import Seed, checked
from purestep.errors import DataError, explain

if TYPE_CHECKING:
    from purestep.data.sampler import SampleShard


@runtime_checkable
class Source(Protocol):
    """Batches by epoch and position.

    `open(epoch, batch, state)` gives bitwise the same batches whether `batch` was reached by reading or by opening
    there, in this process or another one, if `state` is what `state()` returned at that position. At the start of an
    epoch that is what it returned at the end of the one before: the loop opens each epoch with it, resumed or not.
    """

    def length(self) -> int | None:
        """Return the number of batches of an epoch, or None where it is not known."""

    def open(self, epoch: int, batch: int, state: Any) -> Iterator[Any]:
        """Return an iterator over the batches of an epoch, positioned after the first `batch` of them."""

    def state(self) -> Any:
        """Return what `open` needs besides (epoch, batch), as of the last batch read: plain values, or None."""


Gather = Callable[[Any], list[Any]]  # returns the values of all ranks, in their order; every rank calls it


@runtime_checkable
class Shardable(Protocol):
    """A source that can read the samples of one rank, and no others.

    A run under a plan asks each rank's source for its shard: some of the microbatches that a global batch is cut into.
    Any other source reads global batches, and each rank drops what the others compute.
    """

    def sharded(self, shard: SampleShard, gather: Gather) -> Source:
        """Return a source of `ps.sharding.LocalBatch`es, each with the rows `shard.rows(n)` of the batch of n samples.

        Args:
            shard: of this rank. `LocalBatch(data, samples=n, microbatches=shard.total)` is its part of a batch.
            gather: exchanges small values with the other ranks, for sources whose state depends on all of them. Calls
                belong into `sharded` and `state`, which every rank calls at the same point.
        """


@runtime_checkable
class Closable(Protocol):
    """A source or an iterator that holds worker processes, files or an unfinished generator."""

    def close(self) -> None: ...


def close(value: object) -> None:
    """Close a source or an iterator of one, if it can be closed."""
    if isinstance(value, Closable):
        value.close()


@checked(DataError)
def as_source(data: Any, *, seed: Seed = 0) -> Source:
    """Make a source of anything that gives batches.

    | data | after a resume |
    |---|---|
    | `Batches`, or any `Source` | exact, at once |
    | list, tuple or other sequence of batches | exact, at once |
    | with `state_dict`, `load_state_dict` (torchdata's `StatefulDataLoader`) | exact, from its own state |
    | whose iterators have `get_state`, `set_state` (grain) | exact, from its own state |
    | torch `DataLoader`, other iterables, functions `f()` or `f(epoch)` to one | reads and drops the first batches |
    | an iterator | reads and drops the first batches; it has one epoch only |

    While a third-party loader loads a batch, python's, numpy's and torch's global generators are seeded from
    (seed, epoch, batch), and restored afterwards. So a `DataLoader(shuffle=True)` gives the same order again for the
    same epoch, and loading changes no other random draw; the generator of the loader, if it has one, is seeded from
    its initial seed and the epoch. `set_epoch` of samplers and data sets is called with the epoch.

    State that a loader carries from one epoch into the next is restored at the end of an epoch as well. For a loader
    without `state_dict`, the random generators in the attributes of its data set, sampler or function are saved, and
    data sets with `state_dict`; other state that is found is an `UnsavedStateWarning` at a resume.

    Args:
        data: one of the kinds in the table.
        seed: of the global generators while a third-party loader works; in [0, 2**64).

    Raises:
        DataError: it gives samples and not batches, or cannot be iterated.

    Examples:
        >>> source = as_source([10, 11, 12])
        >>> source.length(), list(source.open(0, 1, source.state()))
        (3, [11, 12])
    """
    if isinstance(data, Source) and not isinstance(data, type):
        return data
    refuse_path(data)
    _refuse_samples(data)
    from purestep.data import adapters

    if isinstance(data, (list, tuple)):
        return adapters.BatchSequence(data)
    return adapters.ThirdPartyLoader(data, seed=seed)


def refuse_path(data: object) -> None:
    """Refuse a path where a data set is wanted.

    Raises:
        DataError: says whether a file or directory exists at the path.
    """
    if not isinstance(data, (str, bytes, os.PathLike)):
        return
    path = os.fsdecode(data)
    raise DataError(
        explain(
            "a path is no data set",
            where=f"{path!r}, which {'exists' if os.path.exists(path) else 'does not exist'}",
            why="a path does not say in which format its samples are stored",
            instead="np.load(path, mmap_mode='r') for an array, or a data set that reads it: "
            "torchvision.datasets.ImageFolder(path)",
        )
    )


def _refuse_samples(data: object) -> None:
    from torch import Tensor
    from torch.utils.data import Dataset, IterableDataset

    kind = f"data: {type(data).__module__}.{type(data).__qualname__}"
    if isinstance(data, IterableDataset):
        instead = (
            "torch.utils.data.DataLoader(dataset, batch_size=32)\n"
            "or DataLoader(dataset, batch_size=None)   # if what it gives are batches already"
        )
    elif isinstance(data, (Dataset, Tensor, dict)) or type(data).__module__ == "numpy":
        instead = "ps.data.batches(dataset, batch_size=32)"
    elif not (isinstance(data, Iterable) or hasattr(data, "__getitem__") or callable(data)):
        raise DataError(
            explain(
                "this cannot be iterated",
                where=kind,
                why="a run reads batches from a loader, an iterable, or a function that returns an iterator",
                instead="ps.data.batches(dataset, batch_size=32)",
            )
        )
    else:
        return
    raise DataError(
        explain(
            "a data set gives samples, and a run reads batches",
            where=kind,
            why="a data set does not say how many samples make a batch",
            instead=instead,
        )
    )
