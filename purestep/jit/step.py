"""A step of several microbatches, compiled in two pieces.

`grads` is compiled once and called for each microbatch, then `update` is called once; the gradients are added between
the two, in the fixed tree. One graph of all microbatches would take several times as long to compile. Every rank
computes a microbatch by the same piece, so with the same bits.
"""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from purestep import _torch, transforms, tree
from purestep.donation import consume
from purestep.jit import exchanging
from purestep.jit.function import Jit, Unjittable
from purestep.jit.unit_pieces import CutStep, UnitPieces, units_of
from purestep.microbatch import Gradients, MicrobatchExchange, accumulate, split_batch
from purestep.optim.scope import only_shards
from purestep.parallel import offload, zero
from purestep.sharding import placement
from purestep.sharding.plan import Plan
from purestep.sharding.presets import single
from purestep.state import TrainState, definition
from purestep.step import Metrics, Step
from purestep.step_protocol import AnyStep, StepFacts, StepFn, following, name_of

log = logging.getLogger("purestep.jit")


class JitStep(AnyStep):
    """A compiled step of several microbatches. Made by `jit`; call it as `step(state, batch)`.

    Attributes:
        step: the step.
        donate: whether the state is consumed.
        backend: name of the backend.
        grads, update: the two pieces, compiled functions themselves.
    """

    def __init__(
        self,
        step: Step,
        donate: bool,
        backend: str,
        mode: str | None,
        *,
        unjittable: Unjittable = "error",
        by_unit: bool = False,
    ) -> None:
        # Gradients that are no graph are compiled by units, unless they are to have the bits of the step itself.
        self.step, self.by_unit = step, by_unit or (unjittable == "error" and exchanging.by_unit(step.plan))
        by_unit = self.by_unit
        self.unjittable = unjittable
        self.__name__ = name_of(step)
        self.donate, self.backend, self.mode = donate, backend, mode

        def grads(state: TrainState, microbatch: Any, index: Tensor) -> Gradients:
            return step.grads(state, microbatch, index)

        def update(state: TrainState, total: Gradients) -> tuple[TrainState, Metrics]:
            return step.update(state, _whole(state, total))

        self.grads = Jit(grads, False, backend, (), mode, unjittable=unjittable)
        # Values may be read from the batch only, and the arguments of the update are gradients.
        self.update = Jit(update, donate, backend, (), mode, reads=False)
        self.units = UnitPieces(step.plan or single(), backend, mode, self.__name__) if by_unit else None
        self._cut: Step | None = None if self.units is None else CutStep.of(step, self.units)
        self._index: list[Tensor] = []
        self._refused: tuple[str, ...] = ()
        self._compute: Callable[..., Gradients] = self.grads
        self._apply: Callable[..., tuple[TrainState, Metrics]] = self.update

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Return the state after one update, and the metrics of the batch."""
        if transforms.active() or _torch.dispatch_modes() > 0:
            return self.step(state, batch)
        batch = following(state, batch)
        if self.step.plan is not None:
            return self._planned(self.step.plan, state, batch)
        return self._apply(state, _changed(state, self._total(state, batch)))

    def _planned(self, plan: Plan, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Run both pieces on this rank's microbatches, with all gathers and sums outside of the compiled graphs."""
        from purestep.parallel import microbatches as microbatches_module

        step = self.step
        microbatches_module.check(plan, step)
        # A graph takes no DTensors: if any leaf is split, the pieces compute with the local shards.
        view = placement.local(state) if any(map(placement.is_split, tree.leaves(state))) else state
        gradients = self._gradients(plan, state, view, batch)
        # A transformation that needs full tensors gathers them, one on the CPU copies: a graph has neither.
        compiled = (view is state or only_shards(step.tx)) and not offload.is_away(plan, state)

        def update(parts: TrainState, total: Gradients) -> tuple[TrainState, Metrics]:
            return self._apply(parts, _changed(parts, total)) if compiled else step.update(parts, total)

        new, metrics = zero.updated(plan, state, view, gradients, update)
        # The compiled update marked the view as consumed; the state, with the same memory, is still to be marked.
        if self.donate and compiled and view is not state:
            consume(state, self.__name__)
        return new, metrics

    def _gradients(self, plan: Plan, state: TrainState, view: TrainState, batch: Any) -> Gradients:
        """Return the mean gradients over all microbatches of this rank's parts."""
        from purestep.parallel import microbatches as microbatches_module

        step = self.step
        if (reason := exchanging.why(plan)) is not None:
            # The step as it is without jit, which exchanges in the middle of a microbatch, with its units compiled.
            return self._cut_step(plan, state, reason)._planned(plan, state, view, batch)
        indices = self._indices(step.microbatch_count, state.rng.device)

        def compute(view: TrainState, microbatch: Any, index: int, exchange: MicrobatchExchange) -> Gradients:
            if (cut := self._in_units(view)) is not None:
                return cut._grads(view, microbatch, index, exchange)
            full = exchange.gathered(view)
            full = full.replace(
                params=offload.on_card(plan, view, full.params), buffers=offload.on_card(plan, view, full.buffers)
            )
            part = _whole(full, self._compute(full, microbatch, indices[index]))
            part = dataclasses.replace(part, buffers=offload.at_rest(plan, view, part.buffers))
            return exchange.taken(part, view)

        return microbatches_module.total(plan, step.microbatch_count, state, view, batch, compute, step.orders)

    def _cut_step(self, plan: Plan, state: TrainState, reason: str) -> Step:
        """Return the step whose units are compiled; the step itself where its gradients may run uncompiled."""
        cut = self._cut if exchanging.by_unit(plan) else None
        found = () if cut is None else units_of(plan, definition(state).module)
        if cut is not None and found:
            return cut
        error = exchanging.refusal(plan, reason, units=cut is not None)
        if self.unjittable == "error":
            raise error
        if str(error) not in self._refused:
            self._refused = (*self._refused, str(error))
            log.warning("gradients of %s run uncompiled: %s", self.__name__, error)
        return self.step

    def _total(self, state: TrainState, batch: Any, same: bool = False) -> Gradients:
        """Add up the gradients of all microbatches. `same`: compute them once for each microbatch size (`compile`)."""
        microbatches = split_batch(batch, self.step.microbatch_count)
        indices = self._indices(len(microbatches), state.rng.device)
        total = accumulate(state, sum(size for _, size in microbatches), self.step.microbatch_count)
        known: dict[int, Gradients] = {}
        for index, (microbatch, size) in enumerate(microbatches):
            part = known.get(size)
            if part is None:
                cut = self._in_units(state)
                found = (
                    self._compute(state, microbatch, indices[index])
                    if cut is None
                    else cut.grads(state, microbatch, index)
                )
                part = _whole(state, found)
                if same:
                    known[size] = part
            total.add(part, index)
        return total.result()

    def _in_units(self, state: TrainState) -> Step | None:
        """Return the step whose units are compiled each by itself; None where a microbatch is compiled as a whole."""
        if self._cut is None or self.units is None:
            return None
        return self._cut if units_of(self.units.plan, definition(state).module) else None

    def _indices(self, count: int, device: torch.device) -> list[Tensor]:
        """Return the indices of the microbatches as tensors, so that one graph serves all of them."""
        if len(self._index) < count or self._index[0].device != device:
            self._index = list(torch.arange(count, device=device).unbind())
        return self._index[:count]

    # --- as a step ----------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> StepFacts:
        """Facts of the step, with the backend and the donation of this one."""
        return dataclasses.replace(self.step.facts, donate=self.donate, backend=self.backend, by_unit=self.by_unit)

    def bare(self, microbatches: int | None = None) -> StepFn:
        return self.step.bare(microbatches)

    def with_microbatches(self, count: int) -> AnyStep:
        settled = self.step.with_microbatches(count)
        if count == 1 and self.step.plan is None and self.unjittable == "error" and not self.by_unit:
            return Jit(settled, self.donate, self.backend, (), self.mode)
        return JitStep(settled, self.donate, self.backend, self.mode, unjittable=self.unjittable, by_unit=self.by_unit)

    def under(self, plan: Plan) -> StepFn:
        return self

    def identity(self) -> Step:
        """Return the plain step, which a snapshot records: compilation is not part of the identity of a step."""
        return self.step

    # --- ahead of time ------------------------------------------------------------------------------------------------

    @property
    def retraces(self) -> tuple[str, ...]:
        """The reason of each trace but the first, of both pieces."""
        return self.grads.retraces + self.update.retraces

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why gradients are computed uncompiled: with `unjittable="eager"` all, with `by_unit` those of some units."""
        return self._refused + self.grads.refusals + (() if self.units is None else self.units.refusals)

    def clear(self) -> None:
        """Forget everything that was compiled."""
        self.grads.clear()
        self.update.clear()
        self._refused = ()
        if self.units is not None:
            self.units.clear()

    def compile(self, state: TrainState, batch: Any) -> JitStep:
        """Compile for the signature of these arguments; the state is not consumed. A step with a plan is compiled by
        its first call.

        The gradients of one microbatch are computed, because the second piece takes what the first returns.
        """
        self._pieces(state, batch)
        return self

    def uncompiled(self, told: Callable[[Jit, tuple[Any, ...]], None]) -> JitStep:
        """Return a step of the same two pieces that runs uncompiled and consumes nothing.

        Args:
            told: called with each piece and its arguments, before it computes.
        """
        plain = JitStep(self.step, False, self.backend, self.mode, unjittable=self.unjittable, by_unit=self.by_unit)
        # Units are compiled where they are called, so nothing is told of them.
        plain._cut = self.step if self.by_unit else None

        def telling(piece: Jit) -> Callable[..., Any]:
            def compute(*args: Any) -> Any:
                told(piece, args)
                return piece.function(*args)

            return compute

        plain._compute, plain._apply = telling(self.grads), telling(self.update)
        return plain

    def graph(self, state: TrainState, batch: Any) -> str:
        """Return the graphs of both pieces as code."""
        return "\n".join(self._pieces(state, batch))

    def _pieces(self, state: TrainState, batch: Any) -> tuple[str, str]:
        (microbatch, _), *_ = split_batch(batch, self.step.microbatch_count)
        first = self.grads.graph(state, microbatch, self._indices(1, state.rng.device)[0])
        return first, self.update.graph(state, _changed(state, self._total(state, batch, same=True)))

    def __repr__(self) -> str:
        by_unit = ", by_unit=True" if self.by_unit else ""
        return f"jit({self.step!r}, donate={self.donate!r}, backend={self.backend!r}{by_unit})"


def _whole(state: TrainState, part: Gradients) -> Gradients:
    """Add the buffers that `_changed` dropped."""
    return part.replace(buffers={**state.buffers, **part.buffers})  # type: ignore[attr-defined]


def _changed(state: TrainState, part: Gradients) -> Gradients:
    """Drop the fields that `update` does not need: the weight, a number that would be a constant of the graph, and the
    buffers that the forward pass did not change (frozen parameters may be most of a model).
    """
    kept = {name: t for name, t in part.buffers.items() if t is not state.buffers[name]}
    return part.replace(buffers=kept, weight=None)  # type: ignore[attr-defined]
