"""What a run reads from: the `Source` protocol, and `as_source`, which makes one of anything that gives batches.

Owns the contract between the loop and all data. The loop keeps (epoch, batch, state) in its cursor and opens sources
with it; sources keep no position that matters.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import Any, Protocol, runtime_checkable

from purestep.arguments import Seed, checked
from purestep.errors import DataError, explain


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
        """Return what `open` needs besides (epoch, batch), as of the last batch given: plain values, or None."""


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

    While a loader that is not ours gives a batch, python's, numpy's and torch's global generators are seeded from
    (seed, epoch, batch), and put back afterwards. So a `DataLoader(shuffle=True)` gives the same order again for the
    same epoch, and its reading disturbs nothing; its own generator, where it has one, is seeded from that one's first
    seed and the epoch. Samplers and data sets with `set_epoch` are told the epoch.

    What a loader carries from one epoch into the next is restored at the end of an epoch as well. Where the loader has
    no state, generators in the attributes of its data set, sampler or function are, and data sets with `state_dict`;
    what is found and cannot be saved is an `UnsavedStateWarning` at a resume.

    Args:
        data: see above.
        seed: of the global generators while a foreign loader works.

    Raises:
        DataError: it gives samples and not batches, or cannot be iterated.

    Example:
        >>> source = as_source([10, 11, 12])
        >>> source.length(), list(source.open(0, 1, source.state()))
        (3, [11, 12])
    """
    if isinstance(data, Source) and not isinstance(data, type):
        return data
    refuse_path(data)
    _refuse_samples(data)
    from purestep.data import foreign

    if isinstance(data, (list, tuple)):
        return foreign.Sequence(data)
    return foreign.Foreign(data, seed=seed)


def refuse_path(data: Any) -> None:
    """Refuse a path in the place of what lies there.

    Raises:
        DataError: with whether there is anything.
    """
    if not isinstance(data, (str, bytes, os.PathLike)):
        return
    path = os.fsdecode(data)
    raise DataError(
        explain(
            "a path is no data set",
            where=f"{path!r}: there is {'something' if os.path.exists(path) else 'nothing'} at this path",
            why="nothing says how to read what is there",
            instead="np.load(path, mmap_mode='r') for an array, or a data set that reads it: "
            "torchvision.datasets.ImageFolder(path)",
        )
    )


def _refuse_samples(data: Any) -> None:
    from torch import Tensor
    from torch.utils.data import Dataset, IterableDataset

    kind = f"data: {type(data).__module__}.{type(data).__qualname__}"
    if isinstance(data, IterableDataset):
        instead = "torch.utils.data.DataLoader(dataset, batch_size=32)"
    elif isinstance(data, (Dataset, Tensor, dict)) or type(data).__module__ == "numpy":
        instead = "ps.data.batches(dataset, batch_size=32)"
    elif not (hasattr(data, "__iter__") or hasattr(data, "__getitem__") or callable(data)):
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
            why="nothing says how many make a batch",
            instead=instead,
        )
    )
