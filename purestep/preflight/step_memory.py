"""`step_memory`: the peak of a step on a rank, from a dry run of one microbatch.

The forward and the backward pass of one microbatch run on fake tensors, and every storage is watched from its birth to
its death; `sharding.step_account` adds what the plan holds beside it: parameters, gradients, buffers.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, cast

import torch
from torch import Tensor, nn

from purestep import _torch, metrics, tree
from purestep.arguments import Count, checked
from purestep.errors import StepError, explain
from purestep.metrics import Metric
from purestep.microbatch import Context, NoExchange, Tensors, Weight, both, split_batch
from purestep.optim.scope import scope_of
from purestep.precision.cast_params import Uncast, casting
from purestep.preflight.dry_run import dry_run
from purestep.preflight.flops import flops_of
from purestep.preflight.single_process import lone
from purestep.sharding import Plan
from purestep.sharding.dry_run import DryRun
from purestep.sharding.dry_run import dry_run as account
from purestep.sharding.presets import single
from purestep.sharding.stages import submodules
from purestep.sharding.step_account import Course, StageCourse
from purestep.state import TrainState, definition
from purestep.step import Step
from purestep.step_protocol import StepFn, WrappedStep, bare, facts_of


@checked(StepError)
def step_memory(
    step: StepFn,
    state: TrainState,
    batch: object,
    sizes: Mapping[str, int] | None = None,
    *,
    count: Count | None = None,
) -> DryRun:
    """Return what a step needs of a rank at its peak, and what it sends, from a dry run. Print it.

    Nothing is allocated and nothing is sent: state and batch may be on the meta device, and the machine need not be
    here. What is counted is what tensors hold, on the device of the state. Kernels may have a workspace of their own,
    and an allocator keeps what it does not return; of jitted steps the compiler may keep less. A step that was jitted
    without `by_unit=True` has all parameters and gradients whole at once where a plan splits them.

    Args:
        step: of `make_step`, jitted or donating or neither; its plan says how ranks share the work.
        state: the state, whole or placed.
        batch: the global batch; shapes are looked at.
        sizes: of the mesh axes; those of the plan's mesh by default.
        count: of microbatches, where the step says "auto".

    Returns:
        A DryRun: bytes by kind at the moment in which most is there, and bytes sent.

    Raises:
        StepError: it is no step of `make_step`, or fails on fake tensors, with the error of the step as its cause.

    Examples:
        >>> import purestep as ps
        >>> tx = ps.optim.adam(1e-3)
        >>> with torch.device("meta"):
        ...     state = ps.init(torch.nn.Linear(1024, 1024, bias=False), tx)
        >>> step = ps.make_step(lambda net, x: net(x).square().mean(), tx, plan=ps.sharding.fsdp())
        >>> found = step_memory(ps.donate(step), state, torch.ones(8, 1024), {"fsdp": 4})
        >>> found.memory["optimizer"], found.memory["params"]
        (2097160, 1048576)
    """
    facts = facts_of(step)
    plan = single() if facts.plan is None else facts.plan
    plan = plan if sizes is None else plan.on(sizes)
    turns = count or (facts.microbatches if isinstance(facts.microbatches, int) else None)
    turns = plan.replicas if turns is None or (facts.plan is not None and turns % plan.replicas) else turns
    return _account(step, state, plan, turns, facts.donate, course_of(step, state, batch, turns, plan))


def of_first_batch(step: StepFn, state: object, batch: object, *, donate: bool | None = None) -> DryRun | None:
    """Return what `step_memory` does of a step that is about to be called here; None where it is not known.

    Args:
        step: with a number of microbatches.
        state: whole or placed by the plan of the step.
        batch: a batch, or the `LocalBatch` of this rank.
        donate: whether the new state takes the memory of the old one; as the step says by default.
    """
    facts, alone = facts_of(step), lone(step, state, batch)
    if alone is None or not isinstance(alone.state, TrainState):
        return None
    plan = single() if facts.plan is None else facts.plan
    own = facts_of(alone.step).microbatches
    turns = facts.microbatches if isinstance(facts.microbatches, int) else plan.replicas
    try:
        course = course_of(step, alone.state, alone.batch, own if isinstance(own, int) else 1, plan)
        return _account(step, state, plan, turns, facts.donate if donate is None else donate, course)
    except StepError:
        return None


def _account(step: StepFn, state: object, plan: Plan, turns: int, donate: bool, course: Course) -> DryRun:
    facts = facts_of(step)
    return account(
        plan,
        state,
        microbatches=turns,
        donate=donate,
        by_element=facts.tx is None or scope_of(facts.tx) == "element",
        one_graph=facts.backend is not None and not facts.by_unit,
        course=course,
    )


def course_of(step: StepFn, state: object, batch: object, count: int, plan: Plan | None = None) -> Course:
    """Return what the passes of the largest microbatch keep, of a batch that is cut into so many, in the stages of a
    plan."""
    around = bare(step)
    alone, single = lone(around, state, batch), _innermost(around)
    if alone is None or not isinstance(single, Step):
        raise StepError(
            explain(
                "the memory of this step is not known",
                where=repr(step),
                why="only a step of ps.make_step says what happens in its passes",
                instead="ps.step_memory(step, state, batch)   # of step = ps.make_step(...), jitted or donating",
            )
        )
    found: list[Course] = []

    def watched(state: TrainState, batch: object) -> object:
        (microbatch, _), *_ = split_batch(batch, min(count, metrics.sample_count(batch)))
        with _Storages(tree.leaves((state, microbatch))) as storages:
            listening = _Listening(storages, plan if plan is not None and plan.pipelined else None)
            single._grads(state, microbatch, 0, listening)
            found.append(listening.course(state, casting(single.policy, definition(state).module)))
        # A function around a step may look at what the step returns; the caller of a plain one does not.
        return None if around is single else single(state, batch)

    dry = dry_run(_with_inside(around, watched), alone.state, alone.batch)
    if not found:
        raise StepError(
            explain(
                "the memory of this step is not known",
                where=f"a dry run of {getattr(single.loss_fn, '__name__', 'the loss function')}",
                why=f"{type(dry.error).__name__}: {dry.error}",
                instead="step(state, batch)   # on real tensors",
            )
        ) from dry.error
    return found[0]


def _innermost(step: StepFn) -> StepFn:
    """Return the step that functions were put around."""
    return _innermost(step.step) if isinstance(step, WrappedStep) else step


def _with_inside(step: StepFn, inside: StepFn) -> StepFn:
    """Return a step with another one in the place of the innermost."""
    return WrappedStep(_with_inside(step.step, inside), step.function) if isinstance(step, WrappedStep) else inside


class _Storages(_torch.Watcher):
    """Counts the bytes of the storages that are made while it is active, for as long as each is alive, and operations.

    Args:
        given: what is there already, and not counted.
    """

    def __init__(self, given: Sequence[object]) -> None:
        super().__init__()
        self._known: dict[int, Any] = {}
        self.live = self.most = self.flops = 0
        for leaf in given:
            if isinstance(leaf, Tensor):
                self.forget(leaf)

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # as of `small_kernels`: torch would import Dynamo

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.flops += flops_of(func, args, kwargs or {}, out)
        for x in out if isinstance(out, (tuple, list)) else (out,):
            if isinstance(x, Tensor):
                self._born(x.untyped_storage())
        return out

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = _torch.storage_id(storage), storage.nbytes()
        if key in self._known or not size:
            return
        self._known[key] = weakref.ref(storage, functools.partial(self._died, key, size))
        self.live += size
        self.most = max(self.most, self.live)

    def _died(self, key: int, size: int, _: object) -> None:
        # What was forgotten is not counted any more.
        if self._known.pop(key, None) is not None:
            self.live -= size

    def forget(self, tensor: Tensor) -> None:
        """Count a tensor no longer: the account of the plan does."""
        storage = tensor.untyped_storage()
        key = _torch.storage_id(storage)
        if isinstance(self._known.get(key), weakref.ref):
            self.live -= storage.nbytes()
        self._known[key] = storage  # held, so that no other gets its number

    def since(self) -> int:
        """Return the most bytes since this was asked last."""
        most, self.most = self.most, self.live
        return most


class _Listening(NoExchange):
    """The exchange of a microbatch that tells when which gradient is there.

    Args:
        storages: what is counted.
        plan: with stages, if what each of them keeps is to be told.
    """

    def __init__(self, storages: _Storages, plan: Plan | None = None) -> None:
        self.storages, self.plan = storages, plan
        self.moments: list[tuple[str, int]] = []
        self.widths: dict[str, int] = {}
        self.forward = 0
        # What there was at the ends of stages: bytes that were given, the most since the end before, and what is left.
        self.ends: list[tuple[int, int, int]] = []
        self.given = 0

    def tracked(self, cast: Uncast, params: Tensors) -> Tensors:
        for tensor in params.values():
            self.storages.forget(tensor)
        self.storages.since()
        self.computed, self.module = dict(params), cast.module
        return params

    def bound(
        self, tracked: Tensors, buffers: Tensors, around: Context | None
    ) -> tuple[Tensors, Tensors, Context | None]:
        for tensor in (*tracked.values(), *buffers.values()):
            self.storages.forget(tensor)
        for name, leaf in tracked.items():
            leaf.register_hook(functools.partial(self._made, name))
        if self.plan is None:
            return tracked, buffers, around
        return tracked, buffers, self._stages if around is None else functools.partial(both, around, self._stages)

    @contextlib.contextmanager
    def _stages(self) -> Iterator[None]:
        """Have the submodules at which stages begin tell so."""
        handles = []
        for module, (stage, _) in submodules(self.module, cast(Plan, self.plan).stage_of).items():
            handles.append(module.register_forward_pre_hook(functools.partial(self._called, stage), with_kwargs=True))
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _called(self, stage: int, module: nn.Module, args: Any, kwargs: Any) -> None:
        if stage == len(self.ends) + 1:
            self._ended()
            self.given = sum(x.nbytes for x in tree.leaves((args, kwargs)) if getattr(x, "requires_grad", False))

    def _ended(self) -> None:
        self.ends.append((self.given, self.storages.since(), self.storages.live))

    def forward_done(self, weight: Weight, buffers: Tensors, metrics: Mapping[str, Metric]) -> None:
        if self.plan is not None:
            self._ended()

    def _made(self, name: str, grad: Tensor) -> Tensor:
        with _torch.no_torch_function(), torch.no_grad():
            most = self.storages.since()
            self.forward = self.forward or most
            self.moments.append((name, max(most - grad.untyped_storage().nbytes(), 0)))
            self.storages.forget(grad)
            return grad.new_empty(()).expand(grad.shape)

    def course(self, state: TrainState, cast: Uncast) -> Course:
        """Return what was seen."""
        summed = cast.reduced({name: x.new_empty(()) for name, x in self.computed.items()})
        widths = {name: (x.element_size(), summed[name].element_size()) for name, x in self.computed.items()}
        before, stages = [0], []
        for given, most, left in self.ends:
            stages.append(StageCourse(given, most - before[-1], left - before[-1]))
            before.append(left)
        moments = self.moments
        if self.plan is not None:
            moments = [
                (n, max(live - before[min(self.plan.stage_of(n) or 0, len(before) - 1)], 0)) for n, live in moments
            ]
        return Course(self.forward, tuple(moments), widths, self.storages.flops, tuple(stages))
