"""Loading a batch sample by sample: seed, fetch, augment, collate, and the naming of a sample that fails.

Owns the loading of one request, in this process or in a worker: the result is a function of (seed, epoch, indices)
alone. It starts no process; `workers` calls it in worker processes, `batches` in this one.
"""

from __future__ import annotations

import dataclasses
import itertools
import os
import traceback
import warnings
from collections.abc import Callable, Iterator, Sized
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purestep.data import _torch, seeding
from purestep.data.columns import Columns
from purestep.data.sampler import Request, SampleShard
from purestep.data.source import close
from purestep.errors import DataError, explain
from purestep.sharding.local_batches import LocalBatch, local_batch

# In a data set with many bad samples, `Epoch.skipped` keeps counting after the last of these warnings.
_WARNINGS = 10
# Attributes in which the data sets of torchvision and others list the files of their samples. There is no protocol.
_LISTS = ("samples", "imgs", "paths", "files", "filenames", "file_paths", "image_paths")
Transform = Callable[[Any, Tensor], Any]


class BadSampleWarning(UserWarning):
    """A sample could not be loaded and was left out, because `on_bad_sample="skip"`."""


@dataclasses.dataclass(frozen=True)
class Failure:
    """Why a sample (or the batch as a whole, where `index` is None) could not be loaded.

    Plain text, so that a worker can send it. `path` is that of the sample's file, where the data set lists it.
    """

    index: int | None
    error: str
    trace: str
    path: str | None = None


@dataclasses.dataclass(frozen=True)
class Loaded:
    """A loaded batch and the samples left out of it; where `failure` is set, there is no batch."""

    request: Request
    batch: Any = None
    skipped: tuple[Failure, ...] = ()
    failure: Failure | None = None

    def pin_memory(self) -> Loaded:
        """Return the same with the tensors of the batch in page-locked memory (torch's loader calls this)."""
        return dataclasses.replace(self, batch=_torch.pin_memory(self.batch))


@dataclasses.dataclass(frozen=True)
class Loader:
    """Loads the batch of a request. It is picklable where its data set and functions are.

    Args:
        dataset: the data set of samples, or its columns.
        seed: of augmentation and of the global generators.
        collate: list of samples to batch; None is torch's `default_collate`.
        transform: pure augmentation of a sample, `transform(sample, key)`.
        skip: whether a sample that fails is left out.
    """

    dataset: Any
    seed: int
    collate: Callable[[list[Any]], Any] | None = None
    transform: Transform | None = None
    skip: bool = False

    @property
    def indexes_columns(self) -> bool:
        """Whether a batch is a selection of columns, which runs no Python per sample and draws no random numbers."""
        return isinstance(self.dataset, Columns) and self.transform is None and self.collate is None

    def load(self, request: Request) -> Loaded:
        """Load one batch, leaving the global generators in an unspecified state."""
        if self.indexes_columns:
            return Loaded(request, self.dataset.take(torch.from_numpy(request.indices)))
        samples: list[Any] = []
        skipped: list[Failure] = []
        for index, sample_words in self._to_run(request):
            if sample_words is None:
                samples.append(self.dataset[index])
                continue
            try:
                samples.append(self._sample(index, sample_words))
            except Exception as error:
                failure = Failure(index, _brief(error), traceback.format_exc(), path_of(self.dataset, index))
                if not self.skip:
                    return Loaded(request, failure=failure)
                skipped.append(failure)
        if not samples:
            return Loaded(request, skipped=tuple(skipped), failure=skipped[0])
        # A collate function that draws (mixup, say) gets draws of its own: not those left over by the last sample.
        seeding.seed_globals(
            *seeding.fold_words(seeding.epoch_words(self.seed, "collate", request.epoch), request.batch)
        )
        try:
            batch = self._collate(samples)
        except Exception as error:
            return Loaded(request, failure=Failure(None, _brief(error), traceback.format_exc()))
        return Loaded(request, batch, tuple(skipped))

    def _to_run(self, request: Request) -> Iterator[tuple[int, list[int] | None]]:
        """Give each index with the words of its key and seed; None where getting a sample runs no foreign code."""
        indices = request.indices.tolist()
        if self.transform is None and type(self.dataset) in (list, tuple):
            return zip(indices, itertools.repeat(None), strict=False)
        # Seeds by index, not by position: a sample is augmented in the same way in whichever batch and worker it is.
        words = seeding.sample_words(seeding.epoch_words(self.seed, "augment", request.epoch), request.indices)
        return zip(indices, words.tolist(), strict=True)

    def _sample(self, index: int, words: list[int]) -> Any:
        seeding.seed_globals(words[2], words[3])
        sample = self.dataset[index]
        return sample if self.transform is None else self.transform(sample, torch.tensor(words[:2]))

    def _collate(self, samples: list[Any]) -> Any:
        if self.collate is not None:
            return self.collate(samples)
        from torch.utils.data import default_collate

        return default_collate(samples)


def path_of(dataset: object, index: int) -> str | None:
    """Return the path of a sample's file, where a data set lists one a sample, or tuples that begin with it.

    Examples:
        >>> class Pictures:
        ...     samples = [("cat/1.png", 0), ("dog/2.png", 1)]
        ...     def __len__(self):
        ...         return 2
        >>> path_of(Pictures(), 1), path_of([1, 2], 0)
        ('dog/2.png', None)
    """
    inner, indices = getattr(dataset, "dataset", None), getattr(dataset, "indices", None)
    if inner is not None and isinstance(indices, (list, tuple, range, np.ndarray)) and index < len(indices):
        return path_of(inner, int(indices[index]))  # torch's Subset
    for name in _LISTS:
        listed = getattr(dataset, name, None)
        if isinstance(listed, (list, tuple)) and isinstance(dataset, Sized) and index < len(listed) == len(dataset):
            entry = listed[index]
            entry = entry[0] if isinstance(entry, (list, tuple)) and entry else entry
            if isinstance(entry, (str, os.PathLike)):
                return os.fspath(entry)
    return None


class Epoch(Iterator[Any]):
    """The batches of an epoch from some position on.

    Attributes:
        skipped: indices of the samples left out so far, in order.
    """

    def __init__(self, loads: Iterator[Loaded], dataset: str, shard: SampleShard | None = None) -> None:
        self._loads = loads
        self._shard = shard
        self._dataset = dataset
        self.skipped: list[int] = []

    def __next__(self) -> Any:
        loaded = next(self._loads)
        if loaded.failure is not None:
            self.close()
            raise _error(loaded, loaded.failure, self._dataset)
        if loaded.skipped:
            if len(self.skipped) < _WARNINGS:
                first = loaded.skipped[0]
                file = "" if first.path is None else f", {first.path}"
                text = f"left out {_counted([f.index for f in loaded.skipped])} of {self._dataset}{file}: {first.error}"
                warnings.warn(text, BadSampleWarning, stacklevel=2)
            self.skipped.extend(f.index for f in loaded.skipped if f.index is not None)
        if self._shard is None:
            return loaded.batch
        if len(loaded.request.indices) < loaded.request.samples:  # the loader read the shard only
            return LocalBatch(loaded.batch, loaded.request.samples, self._shard.total)
        return local_batch(loaded.batch, self._shard, self._shard.total)

    def close(self) -> None:
        """End the iteration; worker processes become free for the next one."""
        close(self._loads)


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {error}"


def _error(loaded: Loaded, failure: Failure, dataset: str) -> DataError:
    epoch, batch, indices, _ = loaded.request
    position = f"epoch {epoch}, batch {batch}"
    if failure.index is None:
        where = f"samples {_listed(indices)} of {dataset} ({position})"
        what, instead = "the samples of a batch cannot be collated", "samples of one structure and shape, or `collate=`"
    elif loaded.skipped:
        where = f"samples {_listed(indices)} of {dataset} ({position})"
        what, instead = "no sample of a batch could be loaded, so the batch is empty", "repair the data set"
    else:
        file = "" if failure.path is None else f": {failure.path}"
        where = f"sample {failure.index} of {dataset} ({position}){file}"
        what = "a sample cannot be loaded"
        instead = f'repair it: dataset[{failure.index}]; or leave such samples out: on_bad_sample="skip"'
    text = explain(what, where=where, why=failure.error, instead=instead)
    return DataError(f"{text}\n\n{failure.trace.rstrip()}")


def _counted(indices: list[int | None]) -> str:
    return f"sample {indices[0]}" if len(indices) == 1 else f"samples {indices}"


def _listed(indices: np.ndarray) -> str:
    shown = ", ".join(str(i) for i in indices[:8].tolist())
    return f"[{shown}{', ...' if len(indices) > 8 else ''}]"
