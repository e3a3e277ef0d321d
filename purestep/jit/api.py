"""`jit`: the function that users call. It checks the arguments and chooses how the function is compiled."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Literal

from purestep.arguments import Whole, checked
from purestep.errors import ConfigError, explain
from purestep.jit import backends
from purestep.jit.backends import Backend, Mode
from purestep.jit.function import Jit, Unjittable
from purestep.jit.step import JitStep
from purestep.jit.warmup import WarmedUp
from purestep.step import Step
from purestep.step_protocol import AnyStep, WrappedStep, facts_of
from purestep.workers.base import StepOfWorkers


@checked(ConfigError)
def jit(
    function: Callable[..., Any],
    *,
    donate: bool = False,
    backend: Backend = "inductor",
    static: int | str | Sequence[int | str] = (),
    mode: Mode | None = None,
    unjittable: Unjittable = "error",
    warmup: Whole | Literal["eager"] = 0,
    by_unit: bool = False,
) -> Any:
    """Compile a pure function of pytrees: forward, backward and optimizer become one graph.

    The function is traced once for each combination of structure, shapes, dtypes, devices, strides and Python values of
    its arguments, on tensors without memory, as `jax.jit` does. Side effects (printing, counting) happen while tracing
    only. Numbers and strings in the arguments are constants of the graph: another value is traced again, so keep a
    learning rate that changes in a tensor. Inside a transform, such as `vmap` or `grad`, and inside another `jit`, the
    compiled function runs as the plain one.

    Args:
        function: any function of pytrees of tensors; a step of `make_step` or `make_eval`, or one written by hand. It
            must be pure: it changes none of its arguments and reads no other tensors than those.
        donate: consume the first argument. The returned state is written over its memory, and using the old state again
            raises DonatedStateError. The function returns a state of the same structure, alone or first in a tuple.
            Tensors taken out of the old state before show the new values. In a dict or list of states, the states are
            marked as consumed, the container is not.
        backend: "inductor" compiles the graph. "eager" runs the same graph operator by operator, with the bits of the
            function itself. "aot_eager" and "dynamo" hand the traced graph to `torch.compile`, with its `aot_eager`
            backend and its default one.
        static: arguments, by position or name, that are not pytrees of tensors: each needs a hash, and the function is
            compiled once for each of its values.
        mode: as in `torch.compile`, for "inductor" and "dynamo". "reduce-overhead" and "max-autotune" record a donated
            step on CUDA as one CUDA graph.
        unjittable: what to do with a function that cannot be traced. "error" refuses it. With "eager" every step is
            compiled in two pieces, gradients and update; gradients that cannot be traced run uncompiled, with the bits
            of the step itself. An evaluation, or another function that donates nothing, runs uncompiled as a whole.
            `refusals` says why. So do all gradients under a plan whose ranks exchange in the middle of a microbatch:
            pipelines, expert parallelism, batch norm over ranks.
        warmup: train uncompiled until the state's counter `step` has this value, while another process compiles, and
            then switch, after waiting for it if it is not done. The switch depends on the counter alone, so a resumed
            or replayed run has the same bits, and snapshots record it. Only a step, of a train state, may have one.
            "eager": a run switches at the first batch at which the other process is done, and records the counter, so
            that from then on it is a run with that number. Called outside of a run, it stays uncompiled.
        by_unit: compile the forward and the backward pass of each unit of the model by itself, and the update; the rest
            of a microbatch runs uncompiled. Under `pipeline` and `expert_parallel` a step is always compiled so, unless
            `unjittable="eager"`.

    Returns:
        An object that is called like the function. It has `donate`, `backend`, `retraces` (why it was traced again),
        `compile(*args)` (ahead of time, runs nothing), `graph(*args)` (the graph as code) and `clear()`.
        A step of several microbatches is compiled in two pieces, `grads` and `update`.

    Raises:
        ConfigError: an unknown backend, mode or argument name; a function around a step that is compiled in pieces; a
            step that moves activations to the CPU; `by_unit` of something else than a step of `make_step`, or under a
            plan whose ranks compute one microbatch together; when called: a plan whose ranks exchange in the middle of
            a microbatch, of which nothing can be compiled.
        TraceError: when called: a captured tensor, a Python branch on the value of a tensor, an argument that is
            changed in place.
        StepError: when called: a donating function that returns no such state.
        CompileError: when called: an operator that the backend cannot take.

    Examples:
        >>> import torch
        >>> double = jit(lambda x: {"y": 2 * x}, backend="eager")
        >>> double(torch.ones(3))
        {'y': tensor([2., 2., 2.])}
        >>> double(torch.ones(2))["y"].shape, double.retraces
        (torch.Size([2]), ('x changed from float32[3] to float32[2]',))

    References:
        `jax.jit` and its `donate_argnums`, https://docs.jax.dev/en/latest/_autosummary/jax.jit.html
    """
    if not callable(function):
        raise ConfigError(
            explain(
                "jit compiles a function",
                where=f"{type(function).__name__} {function!r}",
                instead="step = ps.jit(ps.make_step(loss_fn, tx))",
            )
        )
    backends.check(backend, mode)
    names: Sequence[int | str] = (static,) if isinstance(static, (int, str)) else tuple(static)
    if any(isinstance(name, int) and name < 0 for name in names):
        raise ConfigError(explain("static= counts arguments from 0 up", where=f"{static=}", instead="static=0"))
    if isinstance(function, Step) and function.checkpoint is not None and function.checkpoint.offload:
        raise ConfigError(
            explain(
                "a compiled step does not move activations to the CPU",
                where=f"checkpoint={function.checkpoint!r}",
                why="what is stored for the backward pass is chosen when the graph is made",
                instead=f"ps.make_step(..., checkpoint=ps.Checkpoint({function.checkpoint.modules!r}))   # recomputed",
            )
        )
    if by_unit:
        _check_units(function)
    pieces = unjittable == "eager" or by_unit or (isinstance(function, Step) and function.microbatches not in (None, 1))
    if warmup and (static or not isinstance(function, AnyStep) or facts_of(function).evaluates):
        raise ConfigError(
            explain(
                "only a step that trains has a warm-up",
                where=f"{warmup=}, {function!r:.80}",
                why="the counter of its state says when to switch to what was compiled",
                instead="ps.jit(ps.make_step(loss_fn, tx), warmup=200)\n"
                "ps.jit(ps.wrap_step(step, function), warmup=200)",
            )
        )
    if isinstance(function, Step) and (pieces or function.plan is not None):
        made = JitStep(function, bool(donate), backend, mode, unjittable=unjittable, by_unit=by_unit)
        return WarmedUp(made, warmup) if warmup else made
    if unjittable == "eager" and donate:
        raise ConfigError(
            explain(
                "only a step of make_step donates its state where its gradients cannot be compiled",
                where=f"{unjittable=}, {donate=}, {function!r:.80}",
                instead='ps.wrap_step(ps.jit(step, donate=True, unjittable="eager"), function)',
            )
        )
    if isinstance(function, StepOfWorkers):
        raise ConfigError(
            explain(
                "a step of workers does not go into one graph",
                where=repr(function),
                why="it reads the number of the step from its state, and exchanges what it finds with other ranks",
                instead="ps.local_sgd(ps.jit(step), workers=4, every=16)   # compile the step of one worker\n"
                "ps.power_sgd(step, workers=4)   # as it is",
            )
        )
    if isinstance(function, WrappedStep):
        _check_one_graph(function)
    compiled = Jit(function, bool(donate), backend, names, mode, unjittable=unjittable)
    return WarmedUp(compiled, warmup) if warmup else compiled


def _check_units(function: Callable[..., Any]) -> None:
    """Refuse what has no units that could be compiled each by itself."""
    if not isinstance(function, Step):
        raise ConfigError(
            explain(
                "only a step of make_step is compiled unit by unit",
                where=f"by_unit=True, {function!r:.80}",
                why="what is around the units of a model runs as the step runs it without jit",
                instead="ps.jit(ps.make_step(loss_fn, tx), by_unit=True)\n"
                "ps.wrap_step(ps.jit(step, by_unit=True), function)   # a function around it",
            )
        )
    plan = function.plan
    if plan is not None and (plan.tensor_axis or plan.context):
        raise ConfigError(
            explain(
                "ranks that compute a microbatch together have no units that could be compiled each by itself",
                where=f"by_unit=True, {plan!r}",
                why="they exchange activations in the middle of a unit, outside of any graph",
                instead="ps.jit(step)   # without by_unit",
            )
        )


def _check_one_graph(function: WrappedStep) -> None:
    """Refuse a function around a step that only goes into two graphs, with something between them."""
    facts = facts_of(function)
    if facts.backend is None and (facts.microbatches not in (None, 1) or (facts.plan and not facts.evaluates)):
        raise ConfigError(
            explain(
                "a function around a step of several microbatches, or of a plan, does not go into one graph",
                where=repr(function),
                why="gradients are summed, and exchanged between ranks, outside of what is compiled",
                instead="ps.wrap_step(ps.jit(step), function)   # compile the step, then put the function around it",
            )
        )
