"""A step that trains uncompiled for a number of steps, while another process compiles it.

Which way a step is computed depends on the step counter of its state and on nothing else, so a resumed, replayed or
verified run switches where the run did and has its bits. The other process leaves what it compiled in the disk cache;
at the switch this process traces the step and loads it from there, after waiting for the other process if it must.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable
from typing import Any

from purestep import _torch, transforms
from purestep.errors import ConfigError, explain
from purestep.jit import disk_cache
from purestep.jit.compile_elsewhere import Elsewhere, can_fork
from purestep.jit.donated import donate
from purestep.jit.function import Jit
from purestep.jit.step import JitStep
from purestep.sharding.plan import Plan
from purestep.state import TrainState
from purestep.step_protocol import AnyStep, StepFacts, StepFn, signature_of


class WarmedUp(AnyStep):
    """A compiled step after `warmup` uncompiled ones. Made by `jit`; call it as `step(state, batch)`.

    Attributes:
        compiled: the compiled step.
        warmup: steps with a counter below it run uncompiled.
        eager: the step that is not compiled, donating if the compiled one is.
    """

    def __init__(self, compiled: Jit | JitStep, warmup: int) -> None:
        self.compiled, self.warmup = compiled, warmup
        plain = compiled.identity()
        self.eager: StepFn = donate(plain) if compiled.donate else plain
        self.__name__ = compiled.__name__
        self.__signature__ = signature_of(plain)
        self._elsewhere: Elsewhere | None = None
        self._begun = False
        self._last: Callable[[], object] = lambda: None

    def __repr__(self) -> str:
        return f"{repr(self.compiled).removesuffix(')')}, warmup={self.warmup})"

    def __call__(self, state: Any, batch: Any) -> Any:
        if transforms.active() or _torch.dispatch_modes() > 0:
            return self.compiled(state, batch)
        # A state that the compiled step returned needs no look at its counter, which a GPU would have to be asked for.
        if self._last() is not state and _counter(self, state) < self.warmup:
            self._begin(state, batch)
            return self.eager(state, batch)
        if self._elsewhere is not None:
            self._elsewhere.wait()
            self._elsewhere = None
        returned = self.compiled(state, batch)
        self._last = weakref.ref(returned[0])
        return returned

    def _begin(self, state: TrainState, batch: Any) -> None:
        """Start the other process, at the first uncompiled step."""
        if self._begun:
            return
        self._begun = True
        on_cpu = state.step.device.type == "cpu"
        # The pieces of a JitStep are compiled one after another, with gradients computed between, so at the switch.
        if isinstance(self.compiled, Jit) and on_cpu and disk_cache.is_used(self.compiled.backend) and can_fork():
            self._elsewhere = Elsewhere(lambda: self.compiled.compile(state, batch))

    # --- as a step ----------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> StepFacts:
        """Facts of the compiled step, with the warm-up, which a snapshot records."""
        return dataclasses.replace(self.compiled.facts, warmup=self.warmup)

    def bare(self, microbatches: int | None = None) -> StepFn:
        return self.compiled.bare(microbatches)

    def with_microbatches(self, count: int) -> WarmedUp:
        settled: Any = self.compiled.with_microbatches(count)
        return WarmedUp(settled, self.warmup)

    def under(self, plan: Plan) -> StepFn:
        return self

    def identity(self) -> Callable[..., Any]:
        """Return the plain step, as a compiled step does."""
        return self.compiled.identity()

    # --- ahead of time ------------------------------------------------------------------------------------------------

    @property
    def donate(self) -> bool:
        """Whether the state is consumed."""
        return self.compiled.donate

    @property
    def backend(self) -> str:
        """Name of the backend."""
        return self.compiled.backend

    @property
    def retraces(self) -> tuple[str, ...]:
        """The reason of each trace but the first."""
        return self.compiled.retraces

    @property
    def refusals(self) -> tuple[str, ...]:
        """Why something runs uncompiled, with `unjittable="eager"`."""
        return self.compiled.refusals

    def clear(self) -> None:
        """Forget everything that was compiled."""
        self.compiled.clear()

    def compile(self, state: TrainState, batch: Any) -> WarmedUp:
        """Compile now, in this process, for the signature of these arguments; the state is not consumed."""
        self._begun = True
        self.compiled.compile(state, batch)
        return self

    def graph(self, state: TrainState, batch: Any) -> str:
        """Return the traced graph as code."""
        return self.compiled.graph(state, batch)


def _counter(step: WarmedUp, state: object) -> int:
    if isinstance(state, TrainState) and state.step.numel() == 1:
        return int(state.step)
    raise ConfigError(
        explain(
            "a step with warmup= is called with a train state, whose counter says when to switch",
            where=f"{step.__name__} was called with {type(state).__name__}",
            instead="ps.jit(step)   # without warmup=",
        )
    )
