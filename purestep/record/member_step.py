"""The step of a run that trains together with others: one of several states over which a step is mapped.

Owns the seats of such an ensemble and what is recorded of them. Kernels may choose another order of sums for another
number of states, and for another place in memory: convolutions do for one state instead of two, matrix products for a
state that does not begin at a multiple of 16 bytes. So each run keeps its seat and the number of seats as long as it
trains, an empty seat is filled, and stacked tensors are contiguous. Then a run has the same bits whichever other runs
are there, and can be executed again without them.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from purestep import tree
from purestep.ensembles import Ensemble, stack, unstack
from purestep.jit import jit
from purestep.sharding.plan import Plan
from purestep.step_protocol import AnyStep, Seat, StepFacts, StepFn, bare, facts_of, no_microbatches

Asked = tuple[Any, Any]  # a state and a batch
_ALIGNMENT = 64  # bytes, of every tensor that torch allocates on a CPU; on a GPU more


class Seats:
    """Calls a step for several states at once, by `torch.vmap`; compiled where the step is.

    The stacked state of the last call is kept: where each run goes on with what it was given, nothing is stacked anew.

    Args:
        step: that of one run.
        members: how many seats there are.
    """

    def __init__(self, step: StepFn, members: int) -> None:
        backend: Any = facts_of(step).backend
        mapped = Ensemble(bare(step), own_batches=True).mapped
        self._mapped = mapped if backend is None else jit(mapped, backend=backend)
        self.members = members
        self._given: list[Any] = []  # the states that the last call returned
        self._stacked: Any = None

    def __call__(self, asked: Mapping[int, Asked]) -> dict[int, Any]:
        """Return what the step returns for the state and the batch at each seat that asks.

        Args:
            asked: by seat, batches of equal shapes. At the others anything is computed.
        """
        filling = next(iter(asked.values()))
        seated = [asked.get(seat, filling) for seat in range(self.members)]
        if not self._given or any(self._given[seat] is not state for seat, (state, _) in asked.items()):
            self._stacked = _contiguous(stack([state for state, _ in seated]))
        batches = _contiguous(stack([batch for _, batch in seated]))
        stacked, values = self._mapped(self._stacked, batches)
        self._stacked = _contiguous(stacked)
        self._given, metrics = unstack(tree.map(_aligned, self._stacked)), unstack(values)
        return {seat: (self._given[seat], metrics[seat]) for seat in asked}


def _contiguous(stacked: Any) -> Any:
    return tree.map(lambda leaf: leaf.contiguous() if isinstance(leaf, Tensor) else leaf, stacked)


def _aligned(stacked: Any) -> Any:
    """Return a stacked tensor whose members begin where tensors of their own begin in memory: at multiples of 64 bytes.

    So what callbacks compute of a state has the bits that it has of one from a snapshot.
    """
    members, unit = stacked.shape[0], _ALIGNMENT // stacked.element_size()
    size = stacked[0].numel()
    if size <= 1 or size % unit == 0:
        return stacked
    rows = stacked.new_empty(members, -(-size // unit) * unit)[:, :size]
    return rows.copy_(stacked.view(members, size)).unflatten(1, stacked.shape[1:])


class MemberStep(AnyStep):
    """The step of one run of an ensemble.

    Args:
        step: that of its experiment.
        seat: of the run.
        call: computes the step, together with those of the other runs or without them.
    """

    def __init__(self, step: StepFn, seat: Seat, call: Callable[[Any, Any], Any]) -> None:
        self._step, self._seat, self._call = step, seat, call

    def __call__(self, state: Any, batch: Any) -> Any:
        return self._call(state, batch)

    @property
    def facts(self) -> StepFacts:
        """Those of the step. What "compiled" it is in every snapshot: a resume of the run alone says so."""
        facts = facts_of(self._step)
        backend = "vmap" if facts.backend is None else f"vmap, {facts.backend}"
        return dataclasses.replace(facts, backend=backend, seat=self._seat, gradients=None)

    def bare(self, microbatches: int | None = None) -> StepFn:
        return bare(self._step, microbatches)

    def with_microbatches(self, count: int) -> AnyStep:
        raise no_microbatches(self)

    def under(self, plan: Plan) -> StepFn:
        return self

    def identity(self) -> StepFn:
        """Return the step itself, which a snapshot records."""
        return self._step


def without_others(step: StepFn, seat: Seat) -> MemberStep:
    """Return the step of one run as it was computed together with others: at its seat, with its own state at all seats.

    It takes the time and the memory of all of them.
    """
    return MemberStep(step, seat, functools.partial(_call_alone, Seats(step, seat.members), seat.number))


def _call_alone(seats: Seats, number: int, state: Any, batch: Any) -> Any:
    return seats({number: (state, batch)})[number]
