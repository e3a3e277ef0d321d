"""Errors of `jit` for code that cannot be compiled: captured tensors, branches on values, changed inputs, global
randomness.

This module turns errors of torch's tracers and compilers into errors that name the line and the tensor, with the code
to write instead. `trace` and `backends` call it.
"""

from __future__ import annotations

import functools
import linecache
import os
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, fx, nn

from purestep import _torch, tree
from purestep._cells import PACKAGE, folder_of
from purestep.closures import free_variables, named_globals
from purestep.errors import CompileError, PurestepError, RandomnessError, TraceError, explain
from purestep.functional import Definition

_TORCH = folder_of(torch.__file__)
_OPTREE = os.path.join(os.path.dirname(os.path.dirname(_TORCH)), "optree", "")

_VALUE_ERRORS = ("DataDependentOutputException", "GuardOnDataDependentSymNode")
_SHAPE_ERRORS = ("DynamicOutputShapeException",)
_VALUE_TEXTS = (
    "get value out of a tracing tensor",
    "_local_scalar_dense",
    ".tolist() is not supported",
    ".numpy() is not",
)


class ValueReadError(TraceError):
    """The function reads a value or a shape that a trace does not have; traced in another way, it may not read it."""


def user_line(error: BaseException) -> str | None:
    """Return the innermost line of the user's own code that an error passed through."""
    found = None
    trace = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if not code.co_filename.startswith((PACKAGE, _TORCH, _OPTREE, "<frozen")):
            text = linecache.getline(code.co_filename, trace.tb_lineno).strip()
            found = f"{os.path.basename(code.co_filename)}:{trace.tb_lineno} in {code.co_name}" + (
                f": {text}" if text else ""
            )
        trace = trace.tb_next
    return found


def explained(error: Exception) -> Exception:
    """Return the error to raise in place of an error of the tracer; the user's own errors are returned unchanged."""
    name, text = type(error).__name__, str(error)
    if name in _SHAPE_ERRORS:
        return ValueReadError(
            explain(
                "the shape of a result depends on the values of a tensor",
                where=user_line(error),
                why="jit traces the function once, on shapes without values, and the graph has fixed shapes",
                instead=_known(error)
                or "torch.where(mask, x, 0).sum() / mask.sum()   # in place of x[mask].mean()\n"
                "F.cross_entropy(logits, torch.where(mask, y, -100))   # in place of logits[mask], y[mask]\n"
                "or do it outside of the step, while the batch is made\n"
                + EAGER,
            )
        )
    if name in _VALUE_ERRORS or any(part in text for part in _VALUE_TEXTS):
        return ValueReadError(
            explain(
                "the function asks for the value of a traced tensor",
                where=user_line(error),
                why="jit traces the function once, on shapes without values; a truth value or a whole number of the "
                "batch can be read, but not what the model computes, nor numbers with a fraction",
                instead=_known(error)
                or "torch.where(loss > 3, a, b)      # in place of: a if loss > 3 else b\n"
                "return state, {'loss': loss}     # and read the metric outside of the step\n"
                + EAGER,
            )
        )
    return error


def _known(error: BaseException) -> str | None:
    """Return the code to write in place of a torch layer or function that itself reads values."""
    trace, found = error.__traceback__, None
    while trace is not None:
        code = trace.tb_frame.f_code
        if code.co_filename.startswith(_TORCH):
            found = _READERS.get((os.path.basename(code.co_filename), code.co_name), found)
        trace = trace.tb_next
    return None if found is None else "\n".join(filter(None, (found, EAGER)))


EAGER = 'ps.jit(step, unjittable="eager")   # gradients by the step as it is, only the update compiled'
# Functions of torch that read values, by file and name.
_READERS = {
    ("batchnorm.py", "forward"): "nn.BatchNorm2d(channels, momentum=0.1)   # momentum=None divides by a counter",
    ("rnn.py", "pack_padded_sequence"): "out, _ = lstm(padded)                  # without packing\n"
    "out = out * (torch.arange(out.shape[1]) < lengths[:, None])[..., None]   # and mask what is padding",
    ("functional.py", "ctc_loss"): "",  # no form of it has fixed shapes
}


# --- captured tensors -------------------------------------------------------------------------------------------------


def check_captured(graph: fx.GraphModule, strictly: Callable[[], BaseException | None], roots: list[Any]) -> None:
    """Refuse a graph that holds tensors made outside of the function.

    Tensors made inside are constants too, but go through `lift_fresh_copy` before anything else.
    """
    for node in graph.graph.nodes:
        if node.op != "get_attr":
            continue
        constant = getattr(graph, node.target, None)
        inside = all(user.target in _LIFTS for user in node.users)
        if not isinstance(constant, Tensor) or inside:
            continue
        error = strictly()
        line = None if error is None else user_line(error)
        where = f"{locate(constant, roots) or 'a tensor'}: {tree.describe(constant)}" + (f"\n{line}" if line else "")
        raise TraceError(
            explain(
                "the function uses a tensor that is not among its arguments",
                where=where,
                why="it would be baked into the compiled step as it is now, and later changes of it would go unseen",
                instead="put it in the state or the batch; in a module, self.register_buffer('name', tensor); "
                "and use the `net` that the loss function is given, not the module it was made of",
            )
        )


_LIFTS = (torch.ops.aten.lift_fresh_copy.default, torch.ops.aten.lift_fresh.default, torch.ops.aten.lift.default)


def locate(tensor: Tensor, roots: list[Any]) -> str | None:
    """Return the path to a tensor from functions and models, through closures, globals, attributes and modules."""
    seen: set[int] = set()
    queue: list[tuple[str, Any, int]] = [("", root, 0) for root in roots]
    storage = _torch.storage_id(tensor.untyped_storage())
    while queue and len(seen) < 20_000:
        name, value, depth = queue.pop(0)
        if isinstance(value, Tensor):
            if value.device.type != "meta" and _torch.storage_id(value.untyped_storage()) == storage:
                return name
            continue
        if depth > 9 or id(value) in seen:
            continue
        seen.add(id(value))
        queue.extend((child, v, depth + 1) for child, v in _reachable(name, value))
    return None


def _reachable(name: str, value: Any) -> Iterator[tuple[str, Any]]:
    prefix = f"{name}." if name else ""
    if isinstance(value, types.FunctionType):
        yield from _free(value)
    elif isinstance(value, types.MethodType):
        yield name, value.__func__
        yield prefix + "self", value.__self__
    elif isinstance(value, functools.partial):
        yield name, value.func
        yield f"{name}(...)", (value.args, value.keywords)
    elif isinstance(value, Definition):
        yield "the model", value.module
    elif isinstance(value, nn.Module):
        named = [
            *value.named_parameters(recurse=False),
            *value.named_buffers(recurse=False),
            *_torch.children_of(value).items(),
        ]
        yield from ((prefix + key, v) for key, v in named)
        yield from ((prefix + key, v) for key, v in value.__dict__.items() if not key.startswith("_"))
        if type(value).__module__.split(".")[0] != "torch":
            yield name, type(value).forward
    elif isinstance(value, dict):
        yield from ((f"{name}[{key!r}]", v) for key, v in value.items())
    elif isinstance(value, (list, tuple)):
        yield from ((f"{name}[{i}]", v) for i, v in enumerate(value))
    elif hasattr(value, "__dict__") and not isinstance(value, (type, types.ModuleType)):
        # The user did not write the fields of a Step, but did write the variables that its loss function captures.
        own = type(value).__module__.split(".")[0] == "purestep"
        yield from ((name if own else prefix + key, v) for key, v in vars(value).items())


def _free(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    yield from free_variables(function).items()
    yield from sorted(named_globals(function).items(), key=lambda pair: pair[0])
    yield from ((f"a default of {function.__name__}", d) for d in (function.__defaults__ or ()))


# --- inputs, randomness -----------------------------------------------------------------------------------------------


_RENORM = (
    "F.embedding(ids, torch.renorm(net.embed.weight, 2, 0, max_norm))   # in place of max_norm= of the layer\n"
    "# which has the gradient of the norm, too; or an embedding without max_norm="
)


def check_mutation(graph: fx.GraphModule, mutable: list[fx.Node], names: list[str]) -> None:
    """Refuse a graph that writes into one of its inputs."""
    inputs = [n for n in graph.graph.nodes if n.op == "placeholder"]
    memory = {_torch.storage_id(n.meta["val"].untyped_storage()): i for i, n in enumerate(inputs)}
    for node in mutable:
        for target in written(node):
            at = memory.get(_torch.storage_id(target.meta["val"].untyped_storage()))
            if at is not None:
                operator = str(node.target.overloadpacket).removeprefix("aten.")  # type: ignore[union-attr]
                instead = (
                    _RENORM
                    if operator == "embedding_renorm_"
                    else (
                        f"x = x.{operator.rstrip('_')}(...)   # without the underscore, and return the result\n"
                        "ps.jit(step, donate=True) then writes it into the old memory by itself"
                    )
                )
                raise TraceError(
                    explain(
                        "the function changes one of its arguments in place",
                        where=f"{names[at]}: {tree.describe(inputs[at].meta['val'])}, by {operator}",
                        why="a step is pure: it returns a new state and leaves the old one as it was",
                        instead=instead,
                    )
                )


def is_writer(node: fx.Node) -> bool:
    """Tell whether an operator writes into one of its arguments."""
    return isinstance(node.target, _torch.OpOverload) and _torch.schema_of(node.target).is_mutable


def written(node: fx.Node) -> Iterator[fx.Node]:
    """Return the arguments that an operator writes into."""
    arguments = _torch.schema_of(node.target).arguments  # type: ignore[arg-type]
    for position, argument in enumerate(arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        for item in value if isinstance(value, (list, tuple)) else (value,):
            if isinstance(item, fx.Node) and isinstance(item.meta.get("val"), Tensor):
                yield item


def check_random(nodes: list[fx.Node]) -> None:
    """Refuse a graph that draws from a global generator."""
    if nodes:
        raise RandomnessError(
            explain(
                "the function draws from the global generator of torch",
                where=str(nodes[0].target),
                why="a pure step never touches the global generators; compiled, it would draw other numbers",
                instead='ps.random.normal(ps.random.fold_in(state.rng, state.step, "noise"), shape)',
            )
        )


def host_draw(generator: str | None, line: str | None) -> TraceError:
    """Return the error for a function that draws from a generator of Python or numpy while it is traced."""
    return TraceError(
        explain(
            f"the function draws from {generator or 'a global generator of Python or numpy'}",
            where=line,
            why="jit runs the Python of the function once, so that each call would repeat the one number it drew",
            instead="torch.rand(()), F.dropout(x, p)    # in a model: torch's own draws come from the key of the step\n"
            "ps.random.uniform(ps.random.fold_in(state.rng, state.step), ())\n"
            "or the step without ps.jit, which seeds Python's and numpy's generators from the key",
        )
    )


# --- compilers --------------------------------------------------------------------------------------------------------


def _chain(error: BaseException) -> Iterator[str]:
    """Yield an error and its chain of causes as text."""
    current: BaseException | None = error
    while current is not None:
        yield f"{type(current).__name__}: {current}"
        current = current.__cause__ or current.__context__


def no_compiler(error: BaseException) -> bool:
    """Tell whether any error in a chain says that no compiler was found."""
    signs = "InvalidCxxCompiler", "No working C++ compiler"
    return any(any(s in text for s in signs) or "working triton" in text.lower() for text in _chain(error))


def compiler_failed(error: BaseException) -> bool:
    """Tell whether a C++ compiler was found and rejected the source."""
    return any("CppCompileError" in text for text in _chain(error))


def no_compiler_message(name: str, error: BaseException) -> str:
    """Return the warning for a machine without a compiler."""
    return explain(
        f"{name} runs without being compiled: Inductor found no compiler on this machine",
        where=str(error).splitlines()[0],
        why="Inductor writes C++ (on CPU) or Triton (on GPU) and compiles it; the results are the same, slower",
        instead="Debian, Ubuntu: apt install g++    Fedora: dnf install gcc-c++    macOS: xcode-select --install\n"
        "conda: conda install -c conda-forge cxx-compiler    elsewhere: set CXX to a C++17 compiler\n"
        'or ps.jit(step, backend="eager"), which says the same without a warning',
    )


def not_compiled(name: str, backend: str, error: Exception) -> PurestepError:
    """Return the error for a graph that a compiler cannot take."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    target = next((line for line in lines if line.startswith("target:")), None)
    return CompileError(
        explain(
            f"{backend} cannot compile {name}",
            where=target or (lines[0] if lines else type(error).__name__),
            why=None if target is None else lines[0],
            instead='ps.jit(step, backend="eager"), which runs the traced graph operator by operator;\n'
            "and please report the operator to PyTorch",
        )
    )
