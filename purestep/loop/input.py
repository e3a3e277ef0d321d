"""The stream of batches a run trains on: opened at the cursor, on the state's device, one epoch after the other."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from typing import Any

import torch

from purestep import data, tree
from purestep.data.to_device import on_device
from purestep.errors import DataError, explain
from purestep.loop.events import Cursor

_END = object()
# A loader whose saved state is that of its end has one empty epoch when it goes on; a second one is the data's.
_MOST_EMPTY = 2


class Feed:
    """Batches of a source, position by position.

    It never reads ahead of what the run consumes, except for one batch when the length of an epoch is unknown: only
    so can the last batch of an epoch be told from the others.

    Attributes:
        left_out: samples that the last batch has lost to `on_bad_sample="skip"`; None where none can be.
        waited: seconds that were spent in waiting for batches, since somebody set it to 0.
    """

    def __init__(
        self,
        source: data.Source,
        device: torch.device,
        stopping: Callable[[], bool] = lambda: False,
        *,
        alone: bool = True,
    ) -> None:
        self.source = source
        self.alone = alone
        self.device = device
        self.stopping = stopping
        self.length = source.length()
        self.left_out: int | None = 0 if getattr(source, "on_bad_sample", "") == "skip" else None
        self.waited = 0.0
        self._iterator: Iterator[Any] | None = None
        self._skipped: list[int] = []
        self._ahead: Any = _END
        self._loader: Any = None
        self._unsavable: DataError | None = None
        self._given = False
        self._empty = 0  # epochs in a row that had no batches
        if self.length == 0:
            raise DataError(
                explain(
                    "the training data has no batches",
                    where=f"data: {source!r}",
                    why="it is empty, or smaller than one batch and drop_last=True leaves nothing",
                    instead="ps.data.batches(dataset, batch_size, drop_last=False)",
                )
            )

    def place(self, device: torch.device) -> None:
        """Say where batches go, before the first one is taken: to the state, which a plan may have moved."""
        self.device = device

    def begin(self, loader: object) -> None:
        """Note the state that a resumed run has to open the source with; None at its beginning."""
        self._loader = loader

    def take(self, cursor: Cursor, n: int) -> Iterator[Any]:
        """Yield up to n batches from the cursor on; fewer at the end of the epoch."""
        given, clock = 0, time.perf_counter
        began = clock()
        try:
            for batch in self._take(cursor, n):
                self.waited += clock() - began
                self._given = True
                yield batch
                given += 1
                began = clock()
            self.waited += clock() - began
        except DataError:
            self.waited += clock() - began
            # A signal to the whole process group ends the workers too. What was trained on so far is whole.
            if not self.stopping() or not (self.alone or isinstance(self.source, data.Batches)):
                raise
            if isinstance(self.source, data.Batches) and not self.alone:
                # The other ranks do not know of the signal yet: this one keeps up with them without its workers.
                self.source = self.source.replace(num_workers=0)
                self._loader, self._iterator = self.loader_state(), None
                place = cursor.replace(batch=cursor.batch + given)
                yield from self._take(place, n - given)

    def _take(self, cursor: Cursor, n: int) -> Iterator[Any]:
        fresh = self._iterator is None
        if self._iterator is None:
            opened = self.source.open(cursor.epoch, cursor.batch, self._loader)
            # Its list, not the iterator: one that is kept would keep workers from the next.
            self._skipped = getattr(opened, "skipped", [])
            self._iterator = self._placed(opened)
            del opened
        if self.left_out is not None:
            return self._counted(self._iterator, n)
        if self.length is not None:
            return itertools.islice(self._iterator, n)
        return self._after_looking(self._iterator, cursor, n, fresh)

    def _counted(self, batches: Iterator[Any], n: int) -> Iterator[Any]:
        before = len(self._skipped)
        for batch in itertools.islice(batches, n):
            self.left_out, before = len(self._skipped) - before, len(self._skipped)
            yield batch

    def _after_looking(self, batches: Iterator[Any], cursor: Cursor, n: int, fresh: bool) -> Iterator[Any]:
        if fresh:
            self._look_ahead(batches)
            self._empty = self._empty + 1 if self._ahead is _END and cursor.batch == 0 else 0
            if self._empty == _MOST_EMPTY:
                raise _empty_epoch(self.source, cursor.epoch)
        for _ in range(n):
            batch = self._ahead
            if batch is _END:
                return
            self._look_ahead(batches)
            yield batch

    def _placed(self, batches: Iterator[Any]) -> Iterator[Any]:
        return batches if self.device.type == "cpu" else (on_device(batch, self.device) for batch in batches)

    def _look_ahead(self, batches: Iterator[Any]) -> None:
        # The state that belongs to the cursor is the one before the batch that is only looked at.
        self._loader, self._unsavable = self.source.state(), None
        self._ahead = next(batches, _END)

    def at_end(self, batch: int, short: bool) -> bool:
        """Tell whether the epoch is over after `batch` batches; `short` when fewer came than were asked for."""
        return short or (self._ahead is _END if self.length is None else batch >= self.length)

    def end_epoch(self) -> None:
        """Close the epoch; the next `take` opens the next one, with the state that the source has now."""
        self._iterator, self._given = None, False
        self._loader, self._unsavable = None, None
        try:
            self._loader = self.source.state()
        except DataError as error:
            self._unsavable = error  # of a state that no snapshot can hold; a run without snapshots needs none

    def loader_state(self) -> Any:
        """Return what the source needs, besides the cursor, to be opened here again."""
        if self._given and self.length is not None:
            return self.source.state()
        if self._unsavable is not None:
            raise self._unsavable
        # No batch was given since the source was, or is to be, opened with this; or one batch is looked at.
        return self._loader

    def close(self) -> None:
        """Stop the workers of the source, if it has any."""
        self._iterator = None
        close = getattr(self.source, "close", None)
        if close is not None:
            close()


def _empty_epoch(source: data.Source, epoch: int) -> DataError:
    """The error for a source of unknown length that gives nothing: a run of so many steps would never end."""
    return DataError(
        explain(
            f"epoch {epoch} of the training data has no batches",
            where=f"data: {source!r}",
            why="what it iterates is empty, or was used up by an epoch before",
            instead="lambda epoch: iter(batches)   # a function that returns a new iterator for each epoch",
        )
    )


def device_of(train: object) -> torch.device:
    """Return the device of the first tensor of a train state."""
    for leaf in tree.leaves(train):
        if isinstance(leaf, torch.Tensor):
            return leaf.device
    return torch.device("cpu")
