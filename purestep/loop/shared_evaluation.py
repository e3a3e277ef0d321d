"""An evaluation that several ranks share: whole batches in turns, metrics merged in the order of the batches.

Each batch is evaluated once, by one rank, exactly as a process alone would; so the merged metrics have its bits.
Evaluation callbacks call it.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from purestep import data, metrics, tree
from purestep.data.sampler import BatchShard
from purestep.data.sharded import rounds, shard_batches
from purestep.data.to_device import on_device
from purestep.loop.input import device_of
from purestep.sharding.placement import is_split

_SECONDS = 1.0  # between two exchanges: also how long a signal to one rank goes unnoticed
_MOST = 100  # rounds between two exchanges


class Shared:
    """The part of this rank in an evaluation, and the exchange with the others.

    Args:
        step: evaluation step, `(state, batch) -> metrics`; with split parameters it is collective.
        source: the batches.
        plan: says which of how many ranks this is.
    """

    def __init__(self, step: Callable[[Any, Any], Any], source: data.Source, plan: Any) -> None:
        self._step = step
        self._shard = BatchShard(plan.index, plan.replicas)
        self._whole, self._source = source, shard_batches(source, self._shard)

    def run(self, train: object, meet: Callable[[Any], list[Any]]) -> Iterator[Sequence[Mapping[str, metrics.Metric]]]:
        """Evaluate all rounds; yield the metrics of all ranks' batches as they are exchanged, in order.

        Args:
            train: the train state.
            meet: returns the values of all ranks; every rank calls it.
        """
        collective = any(is_split(leaf) for leaf in tree.leaves(train))
        device = device_of(train)
        spare: Any = None
        waiting: list[Any] = []
        count, goal, met = 0, 1, time.monotonic()
        for batch in rounds(self._source, self._shard):
            count += 1
            if batch is not None or collective:
                # A gather of parameters takes all ranks: one that has no batch left runs the model for the others.
                spare = batch if batch is not None else self._spare(spare)
                found = self._step(train, on_device(spare, device))
                if batch is not None:
                    waiting.append(found)
            if count >= goal:
                pace = max((time.monotonic() - met) / count, 1e-6)
                steps, goal = self._exchange(meet, waiting, min(max(int(_SECONDS / pace), 1), _MOST))
                waiting, count, met = [], 0, time.monotonic()
                yield steps
        if count:
            yield self._exchange(meet, waiting, goal)[0]

    def _spare(self, last: object) -> Any:
        if last is not None:
            return last
        batches = self._whole.open(0, 0, None)
        try:
            return next(batches)
        finally:
            close = getattr(batches, "close", None)
            if close is not None:
                close()

    def _exchange(
        self, meet: Callable[[Any], list[Any]], waiting: list[Any], goal: int
    ) -> tuple[list[Mapping[str, metrics.Metric]], int]:
        """Return the metrics of all ranks, round by round, and when to exchange next (as rank 0 says)."""
        mine = (self._shard.index, list(metrics.to_host(waiting)), goal)
        entries = meet(mine)
        # Ranks that compute a batch together (tensor parallelism) have the same index; the first speaks for them.
        columns: dict[int, list[Any]] = {}
        for index, steps, _ in entries:
            columns.setdefault(index, steps)
        longest = max(len(steps) for steps in columns.values())
        ordered = [columns[i][r] for r in range(longest) for i in sorted(columns) if r < len(columns[i])]
        return ordered, entries[0][2]
