"""Which samples of a batch are whose, and the key that a worker draws from."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any

from purestep import random
from purestep.sharding.local_batches import local_batch, microbatch_sizes, piece
from purestep.state import TrainState
from purestep.workers.average import team
from purestep.workers.base import StepOfWorkers


@dataclasses.dataclass(frozen=True)
class Cut:
    """A batch as workers share it. Made by `cut_for`.

    Attributes:
        samples: of each worker; those without any come last.
        shares: by worker of this rank that has samples, these and their number.
        spare: the same of some worker, for a rank whose workers have none.
    """

    samples: list[int]
    shares: Mapping[int, tuple[Any, int]]
    spare: tuple[Any, int]

    @property
    def filled(self) -> int:
        """Number of workers that have samples."""
        return sum(map(bool, self.samples))


class _All:
    """The shares of a process that has all microbatches."""

    def microbatches(self, count: int) -> tuple[int, ...]:
        return tuple(range(count))


def cut_for(step: StepOfWorkers, batch: Any) -> Cut:
    """Cut a global batch, or this rank's LocalBatch, into the shares of the workers of this rank."""
    each, parts = step.microbatch_count // step.workers, step.pieces or step.microbatch_count
    local = local_batch(batch, _All() if step.plan is None else step.plan, parts)
    sizes = microbatch_sizes(local.samples, parts)
    samples = [sum(sizes[worker * each : (worker + 1) * each]) for worker in range(step.workers)]
    shares, start = {}, 0
    for worker in team(step.plan, step.workers).mine:
        if count := samples[worker]:
            shares[worker] = piece(local.data, start, start + count), count
            start += count
    return Cut(samples, shares, (piece(local.data, 0, samples[0]), samples[0]))


def with_key_of(state: TrainState, worker: int) -> TrainState:
    """Return a train state with the key that a worker draws from; the first one draws from that of the run."""
    return state if worker == 0 else state.replace(rng=random.fold_in(state.rng, "worker", worker))
