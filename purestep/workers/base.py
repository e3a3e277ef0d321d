"""`StepOfWorkers`: what the steps of workers have in common, whatever their workers exchange."""

from __future__ import annotations

import dataclasses
from typing import Any, Self

from purestep.errors import ConfigError, explain
from purestep.sharding.plan import Plan
from purestep.step_protocol import AnyStep, StepFn, bare, facts_of, name_of, resliced, warmed_up
from purestep.workers.average import team
from purestep.workers.state import WorkerPlan


@dataclasses.dataclass(frozen=True)
class StepOfWorkers(AnyStep):
    """A step of several workers, made of one that each of them can take.

    Attributes:
        step: what a worker computes with.
        workers: their number.
        plan: the ranks that hold the workers; None in a dry run and in a replay, where this process holds all.
        pieces: into how many microbatches a batch is sliced, where a dry run is given the samples of one rank.
    """

    step: Any
    workers: int
    _: dataclasses.KW_ONLY
    plan: WorkerPlan | None = None
    pieces: int | None = dataclasses.field(default=None, repr=False)

    @property
    def microbatch_count(self) -> int:
        """Number of microbatches of a batch: those of each worker."""
        count = facts_of(self.step).microbatches
        return self.workers * (count if isinstance(count, int) else 1)

    def bare(self, microbatches: int | None = None) -> Self:
        """Return it without a plan; with `microbatches` those of the first workers, which have all the samples."""
        return dataclasses.replace(self, step=bare(self.step), plan=None, pieces=microbatches)

    def with_microbatches(self, count: int) -> Self:
        if count % self.workers:
            raise ConfigError(
                explain(
                    "the microbatches of a batch are shared equally by the workers",
                    where=f"{count} microbatches, {self.workers} workers",
                    instead=f"microbatches={-(-count // self.workers) * self.workers}",
                )
            )
        return dataclasses.replace(self, step=resliced(self.step, count // self.workers))

    def with_warmup(self, warmup: int | None) -> Self:
        return dataclasses.replace(self, step=warmed_up(self.step, warmup))

    def under(self, plan: Plan) -> StepFn:
        return self

    def check_here(self, count: int, what: str) -> None:
        """Refuse a state of which this rank does not have the workers that the plan says.

        Args:
            count: of how many workers this rank has a part.
            what: the part, for the error.
        """
        mine = len(team(self.plan, self.workers).mine)
        if count != mine:
            raise ConfigError(
                explain(
                    "the state is not placed by the plan of the step",
                    where=f"{what}{count} workers are on this rank, the plan says {mine}",
                    instead="state = step.plan.place(state)",
                )
            )

    @property
    def __name__(self) -> str:
        return f"{self.workers} workers of {name_of(self.step)}"
