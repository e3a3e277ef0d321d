"""What does not fit: from a dry run that failed to the module, the operation, and the shapes it expected and was given.

`check` words the first batch with it, `guard` later ones.
"""

from __future__ import annotations

import os
from typing import Any

from torch import Tensor, nn

from purestep import tree
from purestep.errors import StepError, explain
from purestep.preflight.dry_run import Call, Dry


def misfit(dry: Dry, batch: object, *, what: str) -> StepError | None:
    """Say where in the model a dry run failed, and on which shapes; None unless real tensors would fail there too."""
    if dry.error is None:
        return None
    path, raised_by_module = module_path(dry.error)
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
            instead="give the model inputs of the shape and dtype it was made for, or make it for these"
            if path
            else "compare what goes together: scores and labels, predictions and targets of one shape",
        )
    )


def describe_batch(batch: object) -> str:
    """Return the shape and dtype of each tensor of a batch, by its path."""
    leaves = zip(tree.paths(batch), tree.leaves(batch), strict=True)
    shown = [f"{path} {tree.describe(leaf)}".strip() for path, leaf in leaves if hasattr(leaf, "shape")]
    return ", ".join(shown[:8]) + (", ..." if len(shown) > 8 else "")


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:300] if lines else ''}"


def module_path(error: BaseException) -> tuple[str, bool]:
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
    weight = call.kwargs.get("weight")
    weight = weight if weight is not None or len(args) < 2 else args[1]
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
