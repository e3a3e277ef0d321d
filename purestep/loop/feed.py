"""The stream of batches a run trains on: opened at the cursor, on the state's device, one epoch after the other."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch

from purestep import data, tree
from purestep.errors import DataError, explain
from purestep.loop.events import Cursor

_END = object()


class Feed:
    """Batches of a source, position by position.

    It never reads ahead of what the run consumes, except for one batch when the length of an epoch is unknown: only
    so can the last batch of an epoch be told from the others.
    """

    def __init__(self, source: data.Source, device: torch.device, stopping: Callable[[], bool] = lambda: False) -> None:
        self.source = source
        self.device = device
        self.stopping = stopping
        self.length = source.length()
        self._iterator: Iterator[Any] | None = None
        self._ahead: Any = _END
        self._loader: Any = None
        if self.length == 0:
            raise DataError(
                explain(
                    "the training data has no batches",
                    where=f"{source!r}",
                    why="it is empty, or smaller than one batch and drop_last=True leaves nothing",
                    instead="ps.data.batches(dataset, batch_size, drop_last=False)",
                )
            )

    def take(self, cursor: Cursor, n: int) -> Iterator[Any]:
        """Yield up to n batches from the cursor on; fewer at the end of the epoch."""
        try:
            if self._iterator is None:
                self._iterator = self.source.open(cursor.epoch, cursor.batch, cursor.loader)
                self._ahead = self._pull() if self.length is None else _END
            for _ in range(n):
                batch = self._pull() if self.length is not None else self._ahead
                if batch is _END:
                    return
                if self.length is None:
                    self._ahead = self._pull()
                yield batch
        except DataError:
            # A signal to the whole process group ends the workers too. What was trained on so far is whole.
            if not self.stopping():
                raise

    def _pull(self) -> Any:
        self._loader = self.source.state() if self.length is None and self._iterator is not None else None
        batch = next(self._iterator, _END)  # type: ignore[call-overload]
        return batch if batch is _END or self.device.type == "cpu" else data.to_device(batch, self.device)

    def at_end(self, batch: int, short: bool) -> bool:
        """Tell whether the epoch is over after `batch` batches; `short` when fewer came than were asked for."""
        return short or (self._ahead is _END if self.length is None else batch >= self.length)

    def end_epoch(self) -> None:
        """Close the epoch; the next `take` opens the next one."""
        self._iterator = None

    def loader_state(self) -> Any:
        """Return what the source needs, besides the cursor, to be opened here again."""
        return self.source.state() if self.length is not None or self._iterator is None else self._loader

    def close(self) -> None:
        """Stop the workers of the source, if it has any."""
        self._iterator = None
        close = getattr(self.source, "close", None)
        if close is not None:
            close()


def device_of(train: Any) -> torch.device:
    """Return the device of the first tensor of a train state."""
    for leaf in tree.leaves(train):
        if isinstance(leaf, torch.Tensor):
            return leaf.device
    return torch.device("cpu")
