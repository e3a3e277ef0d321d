"""A rank's part of a source: rows of every batch for training, every n-th batch for evaluation.

Owns the choice between reading less (`Batches`) and reading all and dropping the rest (every other source, whose order
only it knows). The loop calls it when a step has a plan.
"""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from typing import Any

from purestep.data.batches import Batches
from purestep.data.order import Rows, Turns
from purestep.data.rank_samplers import refuse_cut_by_rank
from purestep.data.source import Source
from purestep.sharding.local import local_batch


class Cut:
    """A source whose batches are cut after they were read; see `share_rows`.

    Attributes:
        last: the batch that was read last, before the cut; ranks compare it.
    """

    def __init__(self, source: Source, rows: Rows) -> None:
        self.source, self.rows = source, rows
        self.last: Any = None

    def length(self) -> int | None:
        """Return the number of batches of an epoch."""
        return self.source.length()

    def open(self, epoch: int, batch: int, state: Any = None) -> Iterator[Any]:
        """Return an iterator over local batches, from number `batch` on."""
        return self._local(self.source.open(epoch, batch, state))

    def _local(self, batches: Iterator[Any]) -> Iterator[Any]:
        for self.last in batches:
            yield local_batch(self.last, self.rows, self.rows.total)

    def state(self) -> Any:
        """Return the state of the source."""
        return self.source.state()

    def identity(self) -> Source:
        """Return the source: on how many ranks it is read does not make it another one."""
        return self.source

    def close(self) -> None:
        """Close the source."""
        close = getattr(self.source, "close", None)
        if close is not None:
            close()

    def __repr__(self) -> str:
        return repr(self.source)


def share_rows(source: Source, rows: Rows) -> Source:
    """Return a source of `LocalBatch`es: the rows of some microbatches of every batch.

    Args:
        source: gives the same batches on every rank. `Batches` then reads no other rows; of other sources the whole
            batch is read, and cut.
        rows: which microbatches.

    Raises:
        DataError: the sampler of a loader cuts the data by rank.

    Example:
        >>> import torch
        >>> from purestep.data import batches
        >>> train = batches(torch.arange(8), 4, shuffle=False)
        >>> [b.data.tolist() for b in share_rows(train, Rows(2, (1,))).open(0, 0, None)]
        [[2, 3], [6, 7]]
    """
    refuse_cut_by_rank(source)
    return source.replace(share=rows) if isinstance(source, Batches) else Cut(source, rows)


def share_turns(source: Source, turns: Turns) -> Source:
    """Return a source for `rounds`: `Batches` that read only their turns, any other source as it is.

    Raises:
        DataError: the sampler of a loader cuts the data by rank.
    """
    if turns.count > 1:
        refuse_cut_by_rank(source)
    return source.replace(share=turns) if isinstance(source, Batches) else source


def rounds(source: Source, turns: Turns) -> Iterator[Any]:
    """Yield this rank's batch of each round of epoch 0, or None where the last round has none for it.

    In round i, rank r has batch `i * count + r`; so every rank sees the same number of rounds.

    Args:
        source: from `share_turns`.
        turns: which rank of how many.

    Example:
        >>> from purestep.data import as_source
        >>> list(rounds(as_source([10, 11, 12, 13, 14]), Turns(1, 2)))
        [11, 13, None]
    """
    if isinstance(source, Batches):
        batches = source.open(0, 0)
        try:
            for _ in range(-(-source.length() // turns.count)):
                yield next(batches, None)
        finally:
            batches.close()
        return
    stream = iter(source.open(0, 0, None))
    while True:
        read, mine = 0, None
        for number, batch in enumerate(itertools.islice(stream, turns.count)):
            read, mine = read + 1, batch if number == turns.index else mine
        if not read:
            return
        yield mine
