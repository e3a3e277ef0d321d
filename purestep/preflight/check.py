"""What is checked before the first real step: step, batch and model, on fake tensors.

A step that cannot run on fake tensors (it reads values, or calls code of its own) is let through: what it really
returns is checked instead. Under a plan each rank checks its own part. Nothing here is called again after the first
batch.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from purestep import metrics, tree
from purestep._cpus import available_cpus
from purestep.distributed import control
from purestep.errors import (
    CompileError,
    DonatedStateError,
    PurestepError,
    StepError,
    TraceError,
    TreeError,
    explain,
)
from purestep.preflight.contract import Contract
from purestep.preflight.dry_run import Dry, dry_run
from purestep.preflight.explain_shapes import misfit
from purestep.preflight.single_process import lone
from purestep.state import TrainState
from purestep.step_protocol import StepFn, facts_of, name_of, signature_of


class ThreadsWarning(UserWarning):
    """Torch computes with more threads than there are CPUs for this process."""


class PrecisionWarning(UserWarning):
    """A card computes in float32 without its tensor cores."""


_TENSOR_CORES = 8, 0  # compute capability from which on they take float32 (as TF32) and bfloat16
_told: list[torch.device] = []  # once a process is enough

# Errors that fake tensors, rather than the user's code, may be the reason of.
_UNSURE = (TreeError, TraceError, CompileError, DonatedStateError)
_NUMBERS = (metrics.Mean, metrics.Sum, metrics.Min, metrics.Max, metrics.Last)


def check_arity(step: StepFn) -> None:
    """Refuse a step that cannot be called with a state and a batch.

    Raises:
        StepError: it takes other arguments.
    """
    signature = signature_of(step)
    if signature is None:
        return
    try:
        signature.bind(None, None)
    except TypeError as error:
        raise StepError(
            explain(
                "a step takes a state and a batch",
                where=f"{name_of(step)}{signature}",
                instead="def train_step(state, batch): ...\n    return state, {'loss': loss}",
            )
        ) from error


def check_step(step: StepFn, state: object, batch: object) -> Dry | None:
    """Run a step on fake tensors, and refuse what it could not return or run on.

    Args:
        step: any step; a compiled one is checked as the function it was compiled of.
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
    if isinstance(dry.error, TypeError) and f"'{type(state).__name__}' object is not callable" in str(dry.error):
        raise StepError(
            explain(
                "the step calls its state as if it were a model",
                where=f"{name_of(step)}(state, batch)",
                why="a loss function takes the model and the batch, a step the state and the batch",
                instead="step = ps.make_step(loss_fn, tx)",
            )
        ) from dry.error
    found = misfit(dry, alone.batch, what="the first batch does not fit the model")
    if found is not None:
        raise found from dry.error
    return None


def check_eval(
    name: str, step: StepFn, state: object, batch: object, *, of: Callable[[Any], Any] | None = None
) -> tuple[str, ...] | None:
    """Run an evaluation step on fake tensors, for its first batch.

    Args:
        name: of the evaluation.
        step, state, batch: what it will be given.
        of: what of the state it will be given instead.

    Returns:
        The names of its metrics; None where fake tensors do not tell.

    Raises:
        StepError: the batch does not fit the model, or the loss function returns something else than a loss.
        PurestepError: what any part of it refuses.
    """
    alone = lone(step, state, batch)
    if alone is None:
        return None
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
    if dry.error is not None or not isinstance(dry.result, Mapping):
        return None
    # The numbers of these need no look; of others it is computed, or a trial on a real batch tells.
    own = {key: metric for key, metric in dry.result.items() if not isinstance(metric, _NUMBERS)}
    computed = dry_run(lambda found: [list(metrics.entries(key, metric)) for key, metric in found.items()], own)
    if isinstance(computed.error, PurestepError) and not isinstance(computed.error, _UNSURE):
        raise computed.error
    return tuple(dry.result) if computed.error is None else None


# --- surroundings and states that do not fit --------------------------------------------------------------------------


def check_optimizer_state(step: StepFn, state: object) -> None:
    """Refuse a state whose optimizer state was made by another transformation than that of the step.

    Raises:
        StepError: with the paths that differ.
    """
    tx = facts_of(step).tx
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


def _shape(leaf: object) -> Any:
    return tuple(leaf.shape) if isinstance(leaf, Tensor) else type(leaf)


def check_precision(step: StepFn, device: torch.device) -> None:
    """Say once what a card with tensor cores would give to a run that computes in float32 without them."""
    policy = facts_of(step).policy
    if device.type != "cuda" or not torch.cuda.is_available() or torch.version.hip or _told:
        return
    whole = policy is None or policy.compute == torch.float32
    exact = torch.get_float32_matmul_precision() == "highest"
    if not (whole and exact) or torch.cuda.get_device_capability(device) < _TENSOR_CORES:
        return
    _told.append(device)
    warnings.warn(
        explain(
            "this card has tensor cores, which float32 does not use",
            where=f"{torch.cuda.get_device_name(device)}, precision 32, float32 matmul precision 'highest'",
            why="by the data sheet of an A100, matrix products reach 19.5 TFLOP/s in float32, 156 in TF32 and 312 in\n"
            "bfloat16; other cards with tensor cores have similar ratios. Bits and rounding change with it",
            instead='ps.make_step(..., policy="bf16-mixed") and ps.precision.policy("bf16-mixed").apply(state)\n'
            'torch.set_float32_matmul_precision("high")   # TF32: the tensors stay float32',
        ),
        PrecisionWarning,
        stacklevel=2,
    )


def check_threads(device: torch.device) -> None:
    """Warn when torch computes with more threads than there are CPUs for this process, which nothing else tells."""
    threads, cpus = torch.get_num_threads(), max(available_cpus() // control.neighbours(), 1)
    if device.type != "cpu" or threads <= cpus:
        return
    warnings.warn(
        explain(
            "torch computes with more threads than there are CPUs for this process",
            where=f"{threads} threads, {cpus} CPUs by affinity mask and cgroup quota",
            why="they wait for each other, which can make a step many times slower",
            instead=f"torch.set_num_threads({cpus})   # for the whole run: bits depend on it",
        ),
        ThreadsWarning,
        stacklevel=2,
    )
