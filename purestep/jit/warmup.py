"""A step that trains uncompiled for a number of steps, while another process compiles it.

Which way a step is computed depends on the step counter of its state and on nothing else, so a resumed, replayed or
verified run switches where the run did and has its bits. The other process leaves what it compiled in the disk cache;
at the switch this process traces the step and loads it from there, after waiting for the other process if it must.

With `warmup="eager"` the number is not chosen in advance. A run asks `facts.ready` after each batch, decides, and goes
on with the step of that number (`with_warmup`), which its snapshots record (`loop/identity.py`).
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Sequence
from typing import Any, Literal

from purestep import _torch, transforms
from purestep.donation import consume, nodes
from purestep.errors import ConfigError, explain
from purestep.jit import disk_cache
from purestep.jit.compile_elsewhere import Elsewhere, can_fork
from purestep.jit.donated import donate
from purestep.jit.function import Jit
from purestep.jit.step import JitStep
from purestep.sharding.plan import Plan
from purestep.state import TrainState
from purestep.step_protocol import AnyStep, StepFacts, StepFn, signature_of

Warmup = int | Literal["eager"]


class WarmedUp(AnyStep):
    """A compiled step after `warmup` uncompiled ones. Made by `jit`; call it as `step(state, batch)`.

    Attributes:
        compiled: the compiled step.
        warmup: steps with a counter below it run uncompiled; with "eager" all do.
        in_run: whether a run is to decide when to switch: then "eager" compiles, too, from the first call on.
        eager: the step that is not compiled, donating if the compiled one is.
    """

    def __init__(self, compiled: Jit | JitStep, warmup: Warmup, in_run: bool = False) -> None:
        self.compiled, self.warmup, self.in_run = compiled, warmup, in_run
        plain = compiled.identity()
        self.eager: StepFn = donate(plain) if compiled.donate else plain
        self.__name__ = compiled.__name__
        self.__signature__ = signature_of(plain)
        self._elsewhere: Elsewhere | None = None
        self._begun = False
        self._seen = -1  # the largest counter of a state that was computed uncompiled
        self._last: Callable[[], object] = lambda: None

    def __repr__(self) -> str:
        return f"{repr(self.compiled).removesuffix(')')}, warmup={self.warmup!r})"

    def __call__(self, state: Any, batch: Any) -> Any:
        if transforms.active() or _torch.dispatch_modes() > 0:
            return self.compiled(state, batch)
        # A state that the compiled step returned needs no look at its counter, which a GPU would have to be asked for.
        if self._last() is not state:
            counter = _counter(self, state)
            if self.warmup == "eager" or counter < self.warmup:
                return self._uncompiled(state, batch, counter)
        if self._elsewhere is not None:
            self._elsewhere.wait()
            self._elsewhere = None
        returned = self.compiled(state, batch)
        self._last = weakref.ref(returned[0])
        return returned

    def _uncompiled(self, state: TrainState, batch: Any, counter: int) -> Any:
        self._seen = max(self._seen, counter)
        begins = not self._begun and (self.in_run or self.warmup != "eager")
        if not begins:
            return self.eager(state, batch)
        self._begun = True
        if not (state.step.device.type == "cpu" and disk_cache.is_used(self.compiled.backend) and can_fork()):
            return self.eager(state, batch)  # it is compiled at the switch
        if isinstance(self.compiled, Jit):
            self._elsewhere = _compiling([(self.compiled, (state, batch))])
            return self.eager(state, batch)
        return self._pieces(self.compiled, state, batch)

    def _pieces(self, compiled: JitStep, state: TrainState, batch: Any) -> Any:
        """Compute the first step by the pieces that are compiled one after another, and note what each is called with.

        So the other process computes no gradients, and exchanges nothing with other ranks.
        """
        calls: list[tuple[Jit, tuple[Any, ...]]] = []
        returned = compiled.uncompiled(lambda piece, args: calls.append((piece, args)))(state, batch)
        self._elsewhere = _compiling(calls)
        if self.donate:
            consume(state, self.__name__, kept=nodes(returned[0]))
        return returned

    def _ready(self) -> int | None:
        if not self._begun or (self._elsewhere is not None and not self._elsewhere.ended()):
            return None
        return self._seen + 1  # not the counter of the state: an update that was skipped leaves it as it was

    # --- as a step ----------------------------------------------------------------------------------------------------

    @property
    def facts(self) -> StepFacts:
        """Facts of the compiled step, with the warm-up, which a snapshot records."""
        return dataclasses.replace(self.compiled.facts, warmup=self.warmup, ready=self._ready if self.in_run else None)

    def bare(self, microbatches: int | None = None) -> StepFn:
        return self.compiled.bare(microbatches)

    def with_microbatches(self, count: int) -> WarmedUp:
        settled: Any = self.compiled.with_microbatches(count)
        return WarmedUp(settled, self.warmup, self.in_run)

    def with_warmup(self, warmup: int | None) -> WarmedUp:
        if self.warmup != "eager":
            return self
        decided = WarmedUp(self.compiled, "eager" if warmup is None else warmup, in_run=warmup is None)
        decided._begun, decided._seen, decided._elsewhere = self._begun, self._seen, self._elsewhere
        return decided

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


def _compiling(calls: Sequence[tuple[Jit, tuple[Any, ...]]]) -> Elsewhere:
    """Return the process that compiles functions for the signatures of such calls."""

    def work() -> None:
        for function, args in calls:
            function.compile(*args)

    return Elsewhere(work)


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
