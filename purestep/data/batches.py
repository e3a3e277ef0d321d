"""`Batches`: the batches of a data set, as a value.

Owns the arguments, their checks and their defaults. `sampler` computes which samples make up a batch; `columns` (tables
of tensors), `loading` (one sample at a time) and `workers` (in worker processes) load them. The loop opens it as a
`Source`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Iterator, Sized
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import torch
from torch import Tensor

from purestep._cpus import available_cpus
from purestep.arguments import Seed, checked
from purestep.data import seeding
from purestep.data.columns import Columns, as_columns
from purestep.data.loading import Epoch, Loaded, Loader, Transform
from purestep.data.sampler import BatchOrder, SampleShard, Shard
from purestep.data.source import Gather, refuse_path
from purestep.errors import DataError, explain

if TYPE_CHECKING:
    from purestep.data.workers import PoolCache, PoolOptions


@checked(DataError)
@dataclasses.dataclass(frozen=True, eq=False)
class Batches:
    """Batches of a data set, whose order and content are a function of (seed, epoch, batch).

    `ps.data.batches` is this class: a call makes a frozen value, which `replace` and `take` change. The content of
    batch b of epoch e depends on (dataset, seed, e, b) only: not on `num_workers`, `prefetch`, the position where
    reading began, or the global generators, which reading leaves as they were. It is a `Source`.

    Iterating it gives epoch 0, each time the same; a hand-written training loop reads `epoch(e)`.

    Args:
        dataset: a map-style data set (`__len__` and `__getitem__`), or a tensor, an array or a pytree (dict, tuple) of
            them with the same leading dim n. The latter is read a batch at a time, without any Python per sample; numpy
            arrays become tensors, and memory-mapped ones stay on disk. A list is a data set of samples.
        batch_size: samples a batch, 1 or more.
        seed: of the order, the augmentation, and of the global generators while a sample is loaded; in [0, 2**64).
        shuffle: a new order each epoch; False is the order of the data set, for evaluation.
        drop_last: leave out a last batch of fewer samples, for which a compiled step would be traced again; False for
            evaluation, where each sample counts.
        collate: list of samples to batch; torch's `default_collate` by default.
        transform: pure augmentation `transform(sample, key) -> sample`; the key, int64[2], is
            `fold_in(key(seed), "augment", epoch, index)`.
        num_workers: worker processes that load batches; 0 loads in this one, "auto" is one less than the CPUs
            available.
        prefetch: batches each worker loads ahead.
        worker_start: how workers start. Forking this process is not offered: it has threads.
        on_bad_sample: what an exception in `dataset[i]` or `transform` does: "raise" a `DataError` that names the
            sample, or "skip" it, which makes that batch smaller; the iterator lists them in `skipped`.
        pin_memory: put batches into page-locked memory, where there is an accelerator.
        limit: most batches an epoch, None for all; `take` sets it.
        shard: the shard of the batches that this rank reads, None for all of them. With a `sampler.SampleShard` each
            batch is a `LocalBatch` of some of its samples, with a `sampler.BatchShard` only every n-th batch is read.
            A run sets it to another shard on each rank.

    Raises:
        DataError: the data set is empty, its columns differ in length, or an argument makes no sense.

    Examples:
        >>> train = batches({"x": torch.arange(6.0), "y": torch.arange(6)}, 3, seed=0)
        >>> train
        Batches(dict of 6 samples, batch_size=3, seed=0, shuffle=True)
        >>> len(train), sorted(torch.cat([b["y"] for b in train.epoch(4)]).tolist())
        (2, [0, 1, 2, 3, 4, 5])
    """

    dataset: Any
    batch_size: int
    _: dataclasses.KW_ONLY
    seed: Seed = 0
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
    shard: Shard | None = None

    def __post_init__(self) -> None:
        # A numpy integer would be another value in the repr and in the identity of the run.
        for name in ("batch_size", "seed", "num_workers", "prefetch", "limit"):
            value = getattr(self, name)
            if isinstance(value, np.integer):
                object.__setattr__(self, name, int(value))
        _check_arguments(self)
        if self.drop_last and self.batch_size > self._samples:
            raise DataError(
                explain(
                    "the data set has fewer samples than one batch, and drop_last=True leaves out a smaller batch",
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

    def __reduce__(self) -> tuple[Callable[[], Batches], tuple[()]]:
        # Only the arguments are pickled: worker processes, and what is derived from the arguments, stay here.
        return functools.partial(Batches, **{f.name: getattr(self, f.name) for f in dataclasses.fields(self)}), ()

    def __len__(self) -> int:
        return self.length()

    def __iter__(self) -> Iterator[Any]:
        return self.epoch(0)

    # --- reading -----------------------------------------------------------------------------------------------------

    def length(self) -> int:
        """Return the number of batches of an epoch, over all ranks."""
        return self.order.length()

    def epoch(self, epoch: int) -> Epoch:
        """Return an iterator over the batches of an epoch. Its `skipped` lists the samples left out so far."""
        return self.open(epoch, 0)

    def open(self, epoch: int, batch: int, state: Any = None) -> Epoch:
        """Return an iterator over the batches of an epoch from number `batch` on; any position costs the same.

        Args:
            epoch: 0 or more.
            batch: from 0 to `length()`.
            state: ignored: it is what a `Source` with a state needs.

        Raises:
            DataError: the data has no such epoch or batch.
        """
        if epoch < 0 or not 0 <= batch <= self.length():
            raise DataError(
                explain(
                    "the data has no such position",
                    where=f"epoch={epoch}, batch={batch}",
                    why=f"epochs count from 0, and one has {self.length()} batches",
                )
            )
        return Epoch(
            self._loads(epoch, batch), self._named, self.shard if isinstance(self.shard, SampleShard) else None
        )

    def state(self) -> None:
        """Return None: (epoch, batch) determines every batch."""
        return

    def identity(self) -> dict[str, Any]:
        """Return what the batches are a function of, without how they are loaded; a snapshot of a run records it."""
        # Not num_workers, prefetch, worker_start, pin_memory and shard: a run may resume with others.
        names = "batch_size seed shuffle drop_last limit collate transform on_bad_sample".split()
        data = type(self.dataset) if self._columns is None else self._columns.table
        return {"dataset": data, "samples": self._samples, **{name: getattr(self, name) for name in names}}

    def indices(self, epoch: int, batch: int) -> Tensor:
        """Return which samples of the data set make up a batch: int64[b].

        Examples:
            >>> batches(torch.arange(10.0), 4, shuffle=False).indices(epoch=0, batch=1)
            tensor([4, 5, 6, 7])
        """
        start = batch * self.batch_size
        return torch.from_numpy(self.order.indices(epoch, start, min(start + self.batch_size, self._samples)))

    def close(self) -> None:
        """End the worker processes that wait for the next epoch. Reading again starts new ones."""
        if "_pools" in self.__dict__:  # a cached property: absent until worker processes were asked for
            self._pools.close()

    def sharded(self, shard: SampleShard, gather: Gather) -> Batches:
        """Return the batches of one rank's samples. Every rank computes which these are, so nothing is exchanged."""
        return self.replace(shard=shard)

    # --- other values ------------------------------------------------------------------------------------------------

    def replace(self, **changes: Any) -> Batches:
        """Return the same batches with other arguments.

        Examples:
            >>> batches(torch.arange(6), 3).replace(batch_size=2)
            Batches(Tensor of 6 samples, batch_size=2, seed=0, shuffle=True)
        """
        return dataclasses.replace(self, **changes)

    def take(self, n: int | float) -> Batches:
        """Limit an epoch to its first `n` batches, or to a fraction of them.

        Args:
            n: an int counts batches (more than an epoch has is all of them); a float in [0, 1] is a fraction of the
                epoch, rounded down.

        Raises:
            DataError: it is negative, a float above 1, or a fraction above 0 of less than one batch.

        Examples:
            >>> train = batches(torch.arange(10.0), 2)
            >>> len(train.take(3)), len(train.take(0.5)), len(train.take(99))
            (3, 2, 5)
        """
        return self.replace(limit=limit(n, self.length()))

    def overfit(self, n: int | float) -> Batches:
        """Return the first `n` batches of the data set in its own order, the same in every epoch, to overfit on.

        Examples:
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
    def order(self) -> BatchOrder:
        """The order of the samples, without the samples."""
        # A collate function may use all samples of a batch (to pad to the longest, say), so with one the full batch is
        # loaded, and `Epoch` shards it afterwards.
        shard = None if isinstance(self.shard, SampleShard) and self.collate is not None else self.shard
        return BatchOrder(self._samples, self.batch_size, self.seed, self.shuffle, self.drop_last, self.limit, shard)

    @functools.cached_property
    def _loader(self) -> Loader:
        samples = self.dataset if self._columns is None else self._columns
        return Loader(samples, self.seed, self.collate, self.transform, skip=self.on_bad_sample == "skip")

    @property
    def _named(self) -> str:
        return type(self.dataset).__name__

    def _loads(self, epoch: int, batch: int) -> Iterator[Loaded]:
        if self.num_workers != 0:
            return self._pools.serve(self.order, self._loader, epoch, batch, self._pool_options)
        return _load_here(self.order, self._loader, epoch, batch, self._pin)

    @functools.cached_property
    def _pools(self) -> PoolCache:
        from purestep.data import workers  # multiprocessing is imported by those who use it

        return workers.PoolCache()

    @property
    def _pin(self) -> bool:
        return self.pin_memory and torch.accelerator.is_available()

    def _pool_options(self) -> PoolOptions:
        from purestep.data import workers

        count = max(1, available_cpus() - 1) if self.num_workers == "auto" else self.num_workers
        return workers.PoolOptions(count, self.prefetch, self.worker_start, self._pin)


# The name that users call: the arguments are declared once, as the fields of the value.
batches = Batches


def _load_here(order: BatchOrder, loader: Loader, epoch: int, batch: int, pin: bool) -> Iterator[Loaded]:
    if loader.indexes_columns:  # runs no code of the user, so no generator needs to be put back
        for request in order.requests(epoch, batch):
            loaded = loader.load(request)
            yield loaded.pin_memory() if pin else loaded
        return
    for request in order.requests(epoch, batch):
        with seeding.preserved():
            loaded = loader.load(request)
        yield loaded.pin_memory() if pin else loaded


def limit(n: object, length: int) -> int:
    """Return how many of `length` batches `n` stands for: an int is a count, a float a fraction of them."""
    fraction = isinstance(n, float)
    if isinstance(n, bool) or not isinstance(n, (int, float)) or not n >= 0 or (fraction and not n <= 1):
        raise DataError(
            explain(
                "a limit is a number of batches or a fraction of them in [0, 1]",
                where=f"{n!r}",
                instead="take(100) or take(0.1)",
            )
        )
    count = int(length * n) if fraction else min(n, length)
    if fraction and n > 0 and count == 0:
        raise DataError(
            explain(
                "a fraction of an epoch is less than one batch", where=f"{n} of {length} batches", instead="take(1)"
            )
        )
    return int(count)


# --- checks ---------------------------------------------------------------------------------------------------------


def _is_count(value: object, least: int) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and value >= least


def _check_arguments(data: Batches) -> None:
    wrong = None
    if not _is_count(data.batch_size, 1):
        wrong = f"batch_size={data.batch_size!r}", "a whole number of samples, 1 or more", "batch_size=32"
    elif not _is_count(data.seed, 0) or data.seed >= 2**64:
        wrong = f"seed={data.seed!r}", "an integer in [0, 2**64)", "seed=0"
    elif data.num_workers != "auto" and not _is_count(data.num_workers, 0):
        wrong = f"num_workers={data.num_workers!r}", 'a whole number, 0 or more, or "auto"', "num_workers=2"
    elif not _is_count(data.prefetch, 1):
        wrong = f"prefetch={data.prefetch!r}", "a whole number of batches, 1 or more", "prefetch=2"
    elif data.worker_start not in ("forkserver", "spawn"):
        wrong = f"worker_start={data.worker_start!r}", '"forkserver" or "spawn"', 'worker_start="forkserver"'
    elif data.on_bad_sample not in ("raise", "skip"):
        wrong = f"on_bad_sample={data.on_bad_sample!r}", '"raise" or "skip"', 'on_bad_sample="raise"'
    elif data.limit is not None and not _is_count(data.limit, 0):
        wrong = f"limit={data.limit!r}", "a whole number of batches, or None", "batches(...).take(10)"
    functions: dict[str, object] = {"collate": data.collate, "transform": data.transform}
    for name, function in functions.items():
        if function is not None and not callable(function):
            wrong = f"{name}={function!r}", "a function", f"{name}=None"
    if wrong is not None:
        argument, wanted, instead = wrong
        raise DataError(
            explain("an argument of batches makes no sense", where=argument, why=f"it is {wanted}", instead=instead)
        )
    if isinstance(data.shard, SampleShard) and data.shard.partial and data.on_bad_sample == "skip":
        raise DataError(
            explain(
                'on_bad_sample="skip" does not work where several ranks read shards of one batch',
                where=f"this rank reads microbatches {', '.join(map(str, data.shard.indices))} of {data.shard.total}",
                why="a rank does not know which samples other ranks left out, and so not how to weight its own",
                instead='on_bad_sample="raise", and a data set without the bad samples: '
                "torch.utils.data.Subset(dataset, good)",
            )
        )
    if data._samples == 0:
        raise DataError(
            explain(
                "the data set is empty",
                where=f"dataset: {data._named}",
                instead="check the path or the filter that it was made with",
            )
        )


def _count(dataset: object) -> int:
    refuse_path(dataset)
    kind = f"dataset: {type(dataset).__module__}.{type(dataset).__qualname__}"
    if not hasattr(dataset, "__getitem__") or not isinstance(dataset, Sized):
        raise DataError(
            explain(
                "a data set that is read by index needs __len__ and __getitem__",
                where=kind,
                why="the order is a permutation of the indices",
                instead="pass iterables and loaders of your own to the run as they are: fit(step, state, loader, ...)",
            )
        )
    try:
        return len(dataset)
    except Exception as error:
        raise DataError(
            explain("the data set does not know its length", where=kind, why=f"{type(error).__name__}: {error}")
        ) from error


def _list_hint(dataset: object) -> str:
    return "; a list is a data set of samples, for columns write a tuple" if isinstance(dataset, list) else ""
