"""`Batches`: a data set, cut into batches, as a value.

Owns the arguments, their checks and their defaults. Which samples make up a batch is `order`'s business, loading them
that of `columns` (whole tensors), `samples` (one by one) and `workers` (in other processes). The loop opens it as a
`Source`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from purestep.arguments import Seed, checked
from purestep.cpus import available_cpus
from purestep.data import seeds
from purestep.data.columns import Columns, as_columns
from purestep.data.order import Plan, Rows, Share
from purestep.data.samples import Epoch, Loaded, Loader, Transform
from purestep.data.source import refuse_path
from purestep.errors import DataError, explain


@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches of a data set: a frozen value; make it with `batches`, change it with `replace` and `take`.

    The content of batch b of epoch e is a function of (dataset, seed, e, b) and of nothing else: not of `num_workers`,
    of `prefetch`, of where reading began, or of the global generators, which stay as they were. It is a `Source`.

    Iterating it gives epoch 0, each time the same; a training loop of one's own reads `epoch(e)`.

    With a `share` it reads a part of them: for `order.Rows` each batch is a `LocalBatch` of these rows, for
    `order.Turns` there is every n-th batch only. The loop sets it, on each of several processes to another part.
    """

    dataset: Any
    batch_size: int
    seed: int = 0
    shuffle: bool = True
    drop_last: bool = True
    collate: Callable[[list[Any]], Any] | None = None
    transform: Transform | None = None
    num_workers: int | Literal["auto"] = 0
    prefetch: int = 2
    worker_start: Literal["forkserver", "spawn"] = "forkserver"
    on_bad_sample: Literal["raise", "skip"] = "raise"
    pin_memory: bool = False
    limit: int | None = None
    share: Share | None = None

    def __post_init__(self) -> None:
        for name in ("batch_size", "seed", "num_workers", "prefetch", "limit"):
            value: Any = getattr(self, name)
            if isinstance(value, np.integer):
                object.__setattr__(self, name, int(value))
        _check_arguments(self)
        if self.drop_last and self.batch_size > self._samples:
            raise DataError(
                explain(
                    "there is no full batch, and drop_last=True leaves out any other",
                    where=f"batch_size={self.batch_size}, {self._named} of {self._samples} samples",
                    why="an epoch would have no batches" + _list_hint(self.dataset),
                    instead=f"batch_size={self._samples}, or drop_last=False",
                )
            )

    def __repr__(self) -> str:
        shown = [f"{self._named} of {self._samples} samples", f"batch_size={self.batch_size}"]
        for field in dataclasses.fields(self)[2:]:
            value = getattr(self, field.name)
            if field.name in ("seed", "shuffle") or value != field.default:
                shown.append(f"{field.name}={getattr(value, '__qualname__', None) or repr(value)}")
        return f"Batches({', '.join(shown)})"

    def __reduce__(self) -> tuple[Any, ...]:
        # Only the arguments travel: not the workers, nor what is derived from the arguments.
        return Batches, tuple(getattr(self, field.name) for field in dataclasses.fields(self))

    def __len__(self) -> int:
        return self.length()

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    # --- reading -----------------------------------------------------------------------------------------------------

    def length(self) -> int:
        """Return the number of batches of an epoch."""
        return self.plan.length()

    def epoch(self, epoch: int) -> Epoch:
        """Return an iterator over the batches of an epoch. Its `skipped` lists the samples left out so far."""
        return self.open(epoch, 0)

    def open(self, epoch: int, batch: int, state: Any = None) -> Epoch:
        """Return an iterator over the batches of an epoch from number `batch` on, at the same cost wherever it begins.

        Args:
            epoch: 0 or more.
            batch: from 0 to `length()`.
            state: not needed; for other sources.

        Raises:
            DataError: there is no such place.
        """
        if epoch < 0 or not 0 <= batch <= self.length():
            raise DataError(
                explain(
                    "there is no such place in the data",
                    where=f"epoch={epoch}, batch={batch}",
                    why=f"epochs count from 0, and one has {self.length()} batches",
                )
            )
        return Epoch(self._loads(epoch, batch), self._named, self.share if isinstance(self.share, Rows) else None)

    def state(self) -> None:
        """Return None: (epoch, batch) says it all."""
        return

    def identity(self) -> dict[str, Any]:
        """Return what the batches are a function of, and not how they are loaded; a snapshot of a run records it."""
        names = "batch_size seed shuffle drop_last limit collate transform on_bad_sample".split()
        data = type(self.dataset) if self._columns is None else self._columns.table
        return {"dataset": data, "samples": self._samples, **{name: getattr(self, name) for name in names}}

    def indices(self, epoch: int, batch: int) -> Tensor:
        """Return which samples of the data set make up a batch: int64[b].

        Example:
            >>> batches(torch.arange(10.0), 4, shuffle=False).indices(epoch=0, batch=1)
            tensor([4, 5, 6, 7])
        """
        start = batch * self.batch_size
        return torch.from_numpy(self.plan.indices(epoch, start, min(start + self.batch_size, self._samples)))

    def close(self) -> None:
        """End the worker processes that wait for the next epoch. Reading again starts new ones."""
        if "_shelf" in self.__dict__:
            self._shelf.close()

    # --- other values ------------------------------------------------------------------------------------------------

    def replace(self, **changes: Any) -> Batches:
        """Return the same with other arguments."""
        return dataclasses.replace(self, **changes)

    def take(self, n: int | float) -> Batches:
        """Limit an epoch to its first `n` batches, or to a fraction of them.

        Args:
            n: an int counts batches (more than there are is all of them); a float in [0, 1] is a share, rounded down.

        Raises:
            DataError: it is negative, a float above 1, or a share above 0 that comes to no batch.

        Example:
            >>> train = batches(torch.arange(10.0), 2)
            >>> len(train.take(3)), len(train.take(0.5)), len(train.take(99))
            (3, 2, 5)
        """
        return self.replace(limit=limit(n, self.length()))

    def overfit(self, n: int | float) -> Batches:
        """Return the first `n` batches of the data set in its own order, the same in every epoch: to overfit on.

        Example:
            >>> [b.tolist() for b in batches(torch.arange(10), 2).overfit(2)]
            [[0, 1], [2, 3]]
        """
        return self.replace(shuffle=False).take(n)

    # --- private -----------------------------------------------------------------------------------------------------

    @functools.cached_property
    def _columns(self) -> Columns | None:
        return as_columns(self.dataset)

    @functools.cached_property
    def _samples(self) -> int:
        return _count(self.dataset) if self._columns is None else len(self._columns)

    @functools.cached_property
    def plan(self) -> Plan:
        """The order of the samples, without the samples."""
        # What a collate function makes of a batch may depend on all of its samples (padding to the longest, say).
        share = None if isinstance(self.share, Rows) and self.collate is not None else self.share
        return Plan(self._samples, self.batch_size, self.seed, self.shuffle, self.drop_last, self.limit, share)

    @functools.cached_property
    def _loader(self) -> Loader:
        source = self.dataset if self._columns is None else self._columns
        return Loader(source, self.seed, self.collate, self.transform, skip=self.on_bad_sample == "skip")

    @property
    def _named(self) -> str:
        return type(self.dataset).__name__

    def _loads(self, epoch: int, batch: int) -> Iterator[Loaded]:
        if self.num_workers != 0:
            return self._shelf.serve(self.plan, self._loader, epoch, batch, self._worker_options)
        return _load_here(self.plan, self._loader, epoch, batch, self._pin)

    @functools.cached_property
    def _shelf(self) -> Any:
        from purestep.data import workers

        return workers.Shelf()

    @property
    def _pin(self) -> bool:
        return self.pin_memory and torch.accelerator.is_available()

    def _worker_options(self) -> dict[str, Any]:
        count = max(1, available_cpus() - 1) if self.num_workers == "auto" else self.num_workers
        return {"workers": count, "ahead": self.prefetch, "start": self.worker_start, "pin": self._pin}


def _load_here(plan: Plan, loader: Loader, epoch: int, batch: int, pin: bool) -> Iterator[Loaded]:
    if loader.whole:
        for request in plan.requests(epoch, batch):
            loaded = loader.load(request)
            yield loaded.pin_memory() if pin else loaded
        return
    for request in plan.requests(epoch, batch):
        with seeds.preserved():
            loaded = loader.load(request)
        yield loaded.pin_memory() if pin else loaded


@checked(DataError)
def batches(
    dataset: Any,
    batch_size: int,
    *,
    seed: Seed = 0,
    shuffle: bool = True,
    drop_last: bool = True,
    collate: Callable[[list[Any]], Any] | None = None,
    transform: Transform | None = None,
    num_workers: int | Literal["auto"] = 0,
    prefetch: int = 2,
    worker_start: Literal["forkserver", "spawn"] = "forkserver",
    on_bad_sample: Literal["raise", "skip"] = "raise",
    pin_memory: bool = False,
) -> Batches:
    """Cut a data set into batches whose order and content are a function of (seed, epoch, batch).

    Args:
        dataset: a map-style data set (`__len__` and `__getitem__`), or a tensor, an array or a pytree (dict, tuple) of
            them with the same leading dim n. The latter is read a batch at a time, without any Python per sample; numpy
            arrays become tensors, and memory-mapped ones stay on disk. A list is a data set of samples.
        batch_size: samples a batch.
        seed: of the order, the augmentation, and of the global generators while a sample is loaded.
        shuffle: a new order each epoch; False is the order of the data set, for evaluation.
        drop_last: leave out a last batch of fewer samples, which a compiled step would be traced again for; False for
            evaluation, where each sample counts.
        collate: list of samples to batch; torch's `default_collate` by default.
        transform: pure augmentation `transform(sample, key) -> sample`; the key is
            `fold_in(key(seed), "augment", epoch, index)`.
        num_workers: processes that load batches; 0 loads in this one, "auto" is one less than the CPUs available.
        prefetch: batches each worker loads ahead.
        worker_start: how workers start. Forking this process is not offered: it has threads.
        on_bad_sample: what an exception in `dataset[i]` or `transform` does: "raise" a `DataError` that names the
            sample, or "skip" it, which makes that batch smaller; the iterator lists them in `skipped`.
        pin_memory: put batches into page-locked memory, where there is an accelerator.

    Raises:
        DataError: the data set is empty, its columns differ in length, or an argument makes no sense.

    Example:
        >>> train = batches({"x": torch.arange(6.0), "y": torch.arange(6)}, 3, seed=0)
        >>> train
        Batches(dict of 6 samples, batch_size=3, seed=0, shuffle=True)
        >>> len(train), sorted(torch.cat([b["y"] for b in train.epoch(4)]).tolist())
        (2, [0, 1, 2, 3, 4, 5])
    """
    return Batches(
        dataset,
        batch_size,
        seed=seed,
        shuffle=shuffle,
        drop_last=drop_last,
        collate=collate,
        transform=transform,
        num_workers=num_workers,
        prefetch=prefetch,
        worker_start=worker_start,
        on_bad_sample=on_bad_sample,
        pin_memory=pin_memory,
    )


def limit(n: Any, length: int) -> int:
    """Return how many of `length` batches `n` stands for: a count as an int, a share as a float."""
    share = isinstance(n, float)
    if isinstance(n, bool) or not isinstance(n, (int, float)) or not n >= 0 or (share and not n <= 1):
        raise DataError(
            explain(
                "a limit is a number of batches or a share of them in [0, 1]",
                where=f"{n!r}",
                instead="take(100) or take(0.1)",
            )
        )
    count = int(length * n) if share else min(n, length)
    if share and n > 0 and count == 0:
        raise DataError(explain("a share comes to no batch", where=f"{n} of {length} batches", instead="take(1)"))
    return int(count)


# --- checks ---------------------------------------------------------------------------------------------------------


def _is_count(value: Any, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_arguments(b: Batches) -> None:
    wrong = None
    if not _is_count(b.batch_size, 1):
        wrong = f"batch_size={b.batch_size!r}", "a whole number of samples, 1 or more", "batch_size=32"
    elif not _is_count(b.seed, 0) or b.seed >= 2**64:
        wrong = f"seed={b.seed!r}", "an integer in [0, 2**64)", "seed=0"
    elif b.num_workers != "auto" and not _is_count(b.num_workers, 0):
        wrong = f"num_workers={b.num_workers!r}", 'a whole number, 0 or more, or "auto"', "num_workers=2"
    elif not _is_count(b.prefetch, 1):
        wrong = f"prefetch={b.prefetch!r}", "a whole number of batches, 1 or more", "prefetch=2"
    elif b.worker_start not in ("forkserver", "spawn"):
        wrong = f"worker_start={b.worker_start!r}", '"forkserver" or "spawn"', 'worker_start="forkserver"'
    elif b.on_bad_sample not in ("raise", "skip"):
        wrong = f"on_bad_sample={b.on_bad_sample!r}", '"raise" or "skip"', 'on_bad_sample="raise"'
    elif b.limit is not None and not _is_count(b.limit, 0):
        wrong = f"limit={b.limit!r}", "a whole number of batches, or None", "batches(...).take(10)"
    functions: dict[str, Any] = {"collate": b.collate, "transform": b.transform}
    for name, function in functions.items():
        if function is not None and not callable(function):
            wrong = f"{name}={function!r}", "a function", f"{name}=None"
    if wrong is not None:
        given, wanted, instead = wrong
        raise DataError(
            explain("an argument of batches makes no sense", where=given, why=f"it is {wanted}", instead=instead)
        )
    if isinstance(b.share, Rows) and b.share.partial and b.on_bad_sample == "skip":
        raise DataError(
            explain(
                'on_bad_sample="skip" does not work where several ranks share a batch',
                where=f"microbatches {', '.join(map(str, b.share.indices))} of {b.share.total} are read here",
                why="a rank does not know which samples the others left out, and so not what its own count",
                instead='on_bad_sample="raise", and a data set without the bad samples: '
                "torch.utils.data.Subset(dataset, good)",
            )
        )
    if b._samples == 0:
        raise DataError(
            explain(
                "the data set is empty",
                where=f"dataset: {b._named}",
                instead="check the path or the filter that it was made with",
            )
        )


def _count(dataset: Any) -> int:
    refuse_path(dataset)
    kind = f"dataset: {type(dataset).__module__}.{type(dataset).__qualname__}"
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise DataError(
            explain(
                "a data set that is read by index needs __len__ and __getitem__",
                where=kind,
                why="the order is a permutation of the indices",
                instead="give iterables and loaders of your own to the run as they are: fit(step, state, loader, ...)",
            )
        )
    try:
        return len(dataset)
    except Exception as error:
        raise DataError(
            explain("the data set does not know its length", where=kind, why=f"{type(error).__name__}: {error}")
        ) from error


def _list_hint(dataset: Any) -> str:
    return "; a list is a data set of samples, for columns write a tuple" if isinstance(dataset, list) else ""
