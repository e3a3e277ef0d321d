"""What is checked before the first real step: step, batch, model and callbacks, on fake tensors.

A step that cannot run on fake tensors (it reads values, or calls code of its own) is let through: what it really
returns is checked instead. Under a plan each rank checks its own part. Nothing here is called again after the first
batch.
"""

from __future__ import annotations

import inspect
import os
from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor, nn

from purestep import metrics, tree
from purestep.errors import (
    CompileError,
    ConfigError,
    DonatedStateError,
    PurestepError,
    StepError,
    TraceError,
    TreeError,
    explain,
)
from purestep.loop.contract import Contract
from purestep.loop.dry import Call, Dry, dry_run
from purestep.loop.events import Callback
from purestep.loop.lone import lone
from purestep.state import TrainState

# Errors that fake tensors, rather than the user's code, may be the reason of.
_UNSURE = (TreeError, TraceError, CompileError, DonatedStateError)


def check_arity(step: Any) -> None:
    """Refuse a step that cannot be called with a state and a batch.

    Raises:
        StepError: it takes other arguments.
    """
    try:
        signature = inspect.signature(step)
    except (TypeError, ValueError):
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        name = getattr(step, "__name__", type(step).__name__)
        raise StepError(
            explain(
                "a step takes a state and a batch",
                where=f"{name}{signature}",
                instead="def train_step(state, batch): ...\n    return state, {'loss': loss}",
            )
        ) from error


def check_step(step: Any, state: Any, batch: Any) -> Dry | None:
    """Run a step on fake tensors, and refuse what it could not return or run on.

    Args:
        step: any step; a compiled one is checked uncompiled.
        state, batch: what it is about to be given.

    Returns:
        The dry run; None where fake tensors say nothing about the step.

    Raises:
        StepError: what the step returns breaks its contract, or the batch does not fit the model.
        PurestepError: what any part of it refuses.
    """
    alone = lone(step, state, batch)
    if alone is None:
        return None
    check_optimizer_state(alone.step, alone.state)
    dry = dry_run(alone.step, alone.state, alone.batch)
    if dry.error is None:
        contract = Contract(step, alone.state)
        contract.check(dry.result)
        metrics.as_metrics(dry.result[1], metrics.sample_count(alone.batch))
        return dry
    if isinstance(dry.error, PurestepError) and not isinstance(dry.error, _UNSURE):
        raise dry.error
    found = misfit(dry, alone.batch, what="the first batch does not fit the model")
    if found is not None:
        raise found from dry.error
    return None


def check_eval(name: str, step: Any, state: Any, batch: Any, *, of: Callable[[Any], Any] | None = None) -> None:
    """Run an evaluation step on fake tensors, for its first batch.

    Args:
        name: of the evaluation.
        step, state, batch: what it will be given.
        of: what of the state it will be given instead.

    Raises:
        StepError: the batch does not fit the model, or the loss function returns something else than a loss.
        PurestepError: what any part of it refuses.
    """
    alone = lone(step, state, batch)
    if alone is None:
        return
    evaluate = alone.step
    run = evaluate if of is None else lambda state, batch: evaluate(of(state), batch)
    dry = dry_run(run, alone.state, alone.batch)
    if isinstance(dry.error, PurestepError) and not isinstance(dry.error, _UNSURE):
        raise dry.error
    found = dry.error and misfit(
        dry, alone.batch, what=f"the first batch of the evaluation {name!r} does not fit the model"
    )
    if found:
        raise found from dry.error


# --- a batch that does not fit ----------------------------------------------------------------------------------------


def misfit(dry: Dry, batch: Any, *, what: str) -> StepError | None:
    """Say where in the model a dry run failed, and on which shapes; None unless real tensors would fail there too."""
    if dry.error is None:
        return None
    path, raised_by_module = _module_path(dry.error)
    if dry.call is None:
        # Modules refuse some shapes in Python: BatchNorm, by the number of dims.
        if not (raised_by_module and isinstance(dry.error, (ValueError, RuntimeError))):
            return None
        operation, shapes = "", ""
    elif not dry.call.fails_for_real():
        return None
    else:
        operation = f", in {dry.call.name}"
        shapes = f"\n{_expectation(dry.call)}"
    place = f"{path}{operation}" if path else operation.removeprefix(", ") or "the step"
    return StepError(
        explain(
            what,
            where=f"{place}{shapes}\nbatch: {describe_batch(batch)}",
            why=_first_line(dry.error),
            instead="give the model inputs of the shape and dtype it was made for, or make it for these",
        )
    )


def describe_batch(batch: Any) -> str:
    """Return the shape and dtype of each tensor of a batch, by its path."""
    leaves = zip(tree.paths(batch), tree.leaves(batch), strict=True)
    shown = [f"{path} {tree.describe(leaf)}".strip() for path, leaf in leaves if hasattr(leaf, "shape")]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def _module_path(error: BaseException) -> tuple[str, bool]:
    """Return the path and class of the innermost module that an error passed through, and whether torch raised it."""
    chain: list[nn.Module] = []
    trace, file = error.__traceback__, ""
    while trace is not None:
        frame = trace.tb_frame
        file = frame.f_code.co_filename
        owner = frame.f_locals.get("self")
        if frame.f_code.co_name == "_call_impl" and isinstance(owner, nn.Module) and owner not in chain:
            chain.append(owner)
        trace = trace.tb_next
    if not chain:
        return "", False
    names = {id(m): name for name, m in chain[0].named_modules()}
    name = names.get(id(chain[-1]), "")
    shown = f"model.{name}" if name else "model"
    return f"{shown} ({type(chain[-1]).__name__})", os.sep + os.path.join("torch", "nn") + os.sep in file


def _expectation(call: Call) -> str:
    """Return what a call expected of its first argument and what it was given, or just the shapes of its arguments."""
    args = [x for x in call.args if isinstance(x, Tensor)] or call.tensors()
    weight = call.kwargs.get("weight", args[1] if len(args) > 1 else None)
    given = tree.describe(args[0]) if args else "nothing"
    expected = _EXPECTED[call.name](args[0], weight, call) if call.name in _EXPECTED and weight is not None else None
    if expected is not None:
        return f"expected {expected}, given {given}"
    return "given " + ", ".join(tree.describe(x) for x in call.tensors())


def _dtype(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _conv(x: Tensor, weight: Tensor, call: Call) -> str:
    groups = call.args[6] if len(call.args) > 6 else call.kwargs.get("groups", 1)
    return f"{_dtype(weight)}[n, {weight.shape[1] * groups}{', *' * (weight.ndim - 2)}]"


_EXPECTED: dict[str, Any] = {
    "linear": lambda x, weight, call: f"{_dtype(weight)}[..., {weight.shape[1]}]",
    "conv1d": _conv,
    "conv2d": _conv,
    "conv3d": _conv,
    "embedding": lambda x, weight, call: "integers [...]",
    "layer_norm": lambda x, weight, call: f"{_dtype(weight)}[..., {', '.join(map(str, weight.shape))}]",
    "batch_norm": lambda x, weight, call: f"{_dtype(weight)}[n, {weight.shape[0]}, ...]",
    "cross_entropy": lambda x, target, call: (
        f"labels int64[{', '.join(map(str, (*x.shape[:1], *x.shape[2:])))}] for these scores, given labels "
        f"{tree.describe(target)}; scores"
    ),
    "mse_loss": lambda x, target, call: tree.describe(target),
}


# --- states and callbacks that do not fit -----------------------------------------------------------------------------


def check_optimizer_state(step: Any, state: Any) -> None:
    """Refuse a state whose optimizer state was made by another transformation than that of the step.

    Raises:
        StepError: with the paths that differ.
    """
    tx = getattr(step, "tx", None)
    if tx is None or not isinstance(state, TrainState):
        return
    dry = dry_run(lambda params: tx.init(params), state.params)
    if dry.error is not None:
        return
    expected, given = dry.result, state.opt_state
    if tree.structure(expected) == tree.structure(given):
        pairs = zip(tree.paths(given, "state.opt_state"), tree.leaves(given), tree.leaves(expected), strict=True)
        odd = [f"{p}: {tree.describe(g)}, tx makes {tree.describe(e)}" for p, g, e in pairs if _shape(g) != _shape(e)]
        if not odd:
            return
        where = "\n".join(odd[:4])
    else:
        have, want = tree.paths(given, "state.opt_state"), tree.paths(expected, "state.opt_state")
        missing, extra = [p for p in want if p not in have], [p for p in have if p not in want]
        parts = [f"{word} {', '.join(paths[:3])}" for word, paths in (("missing", missing), ("extra", extra)) if paths]
        where = "\n".join(parts) or f"state.opt_state is a {type(given).__name__}, tx makes a {type(expected).__name__}"
    raise StepError(
        explain(
            "the optimizer state of the state was not made by the tx of the step",
            where=where,
            why="a transformation reads only the state that its own init made",
            instead="state = ps.init(model, step.tx, seed=0)   # one tx; policy.apply(state) under a policy",
        )
    )


def _shape(leaf: Any) -> Any:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf)


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that are none, and those that cannot work together.

    Raises:
        ConfigError: with the names of those concerned.
    """
    for callback in callbacks:
        if not isinstance(callback, Callback) or isinstance(callback, type) or not isinstance(callback.name, str):
            raise ConfigError(
                explain(
                    "this is not a callback",
                    where=f"callbacks: {callback!r}",
                    why="a callback is a value with name, init, react and horizon",
                    instead="ps.callbacks.log()   # called; or a frozen dataclass that subclasses ps.callbacks.Reducer",
                )
            )
    evaluated = [c.name for c in callbacks if hasattr(c, "evaluate")]
    if "train" in evaluated:
        raise ConfigError(
            explain(
                "an evaluation clashes with the metrics of training",
                where="evaluate(..., name='train')",
                why="both would be logged as train/<metric>",
                instead="ps.callbacks.evaluate(loss_fn, data, name='train_set')",
            )
        )
    for callback in callbacks:
        monitor = getattr(callback, "monitor", None)
        if not isinstance(monitor, str) or "/" not in monitor or monitor.startswith("train/"):
            continue
        if evaluated and monitor.split("/")[0] not in evaluated:
            sets = ", ".join(f"{name}/..." for name in evaluated)
            raise ConfigError(
                explain(
                    f"{callback.name!r} watches {monitor!r}, which no callback evaluates",
                    where=f"evaluated: {sets}",
                    why="it would wait for it for ever",
                    instead=f"ps.callbacks.evaluate(loss_fn, data, name={monitor.split('/')[0]!r})",
                )
            )
