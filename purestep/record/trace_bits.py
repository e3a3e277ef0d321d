"""`trace_bits`: run one step and digest what each of its operations returns.

Owns the dispatch mode that sees the operations, and how an operation is told its module, its phase and its line.
Neither changes what is computed: operations run as they would, except that memory that is left unset is zeroed.
"""

from __future__ import annotations

import contextlib
import functools
import hashlib
import linecache
import os
import sys
import threading
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from pathlib import Path
from types import FrameType
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.module import register_module_forward_hook, register_module_forward_pre_hook

from purestep import _torch, _torch_cpu, bits, portable, tree
from purestep._cells import PACKAGE, folder_of
from purestep.arguments import Location, checked
from purestep.errors import ConfigError, explain
from purestep.jit.function import Jit
from purestep.jit.step import JitStep
from purestep.preflight.dry_run import models_of
from purestep.record.bits_trace import Bits, BitsTrace, Operation
from purestep.step_protocol import facts_of, name_of

_TORCH, _HERE = folder_of(torch.__file__), folder_of(__file__)
# What they call is a forward pass, if not backward.
_FORWARD = frozenset([PACKAGE + os.path.join("functional", "binding.py"), PACKAGE + "grad.py"])
# They ask whether a generator moved, and compute nothing.
_OBSERVING = frozenset(
    PACKAGE + os.path.join("random", name) for name in ("host_draws.py", "torch_generator.py", "watch_all.py")
)
_IMPORT = "<frozen importlib"  # a module that is imported by the first call may make tensors
_GRAPH = "<eval_with_key>"  # the name that torch.fx gives the code of a graph
_LONGEST = 160  # characters of arguments and lines that are kept

# What returns memory as it finds it, so that its bytes are not the program's.
_UNSET = frozenset(
    f"aten::{name}" for name in "empty empty_like empty_strided empty_permuted new_empty new_empty_strided".split()
)
# Outputs that only the backward kernel of the same library reads, partly unset.
_WORKSPACE = {"aten::mkldnn_rnn_layer": (3,), "aten::_cudnn_rnn": (3, 4), "aten::cudnn_batch_norm": (3,)}
# What writes into its running statistics although its schema does not say so.
_BATCH_NORMS = frozenset(["aten::native_batch_norm", "aten::cudnn_batch_norm", "aten::miopen_batch_norm"])
_STATISTICS = ("running_mean", "running_var")


@checked(ConfigError)
def trace_bits(
    step: Callable[..., Any],
    state: Any,
    batch: Any,
    file: Location | None = None,
    *,
    values: bool | Collection[int] = False,
) -> BitsTrace:
    """Run one step and record the digest of every operation in it, to find the first one that differs elsewhere.

    Do it twice, with two threads and with one, before and after a change of the code, on two machines or with two
    versions of torch, and give both traces, or their files, to `ps.compare_bits`.

    Args:
        step: any step: of `ps.make_step`, with any number of microbatches, `ps.jit(..., backend="eager")`, which runs
            its graph, or a function of one's own. It is called once; a step that consumes its state consumes it.
        state, batch: what to call it with.
        file: where to write the trace; None to only return it. About 300 bytes an operation, a tenth of that where gzip
            takes it, from 64 KiB on.
        values: True keeps the outputs of all operations, so that `compare_bits` can tell how far they are apart; a
            collection of positions those of these operations. They go into the file, too.

    Returns:
        The trace. What the step returned is in `returned`, with the bits it has untraced.

    Raises:
        ConfigError: the step computes with DTensors, or is compiled to kernels that hold several operations; or
            `values` holds something else than positions.

    Examples:
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> step = ps.make_step(lambda net, batch: net(batch).square().mean(), tx)
        >>> state = ps.init(lambda: nn.Sequential(nn.Linear(4, 8), nn.Tanh(), nn.Linear(8, 1)), tx)
        >>> trace = trace_bits(step, state, torch.ones(3, 4))
        >>> [str(op) for op in trace.operations if op.name == "aten.tanh_backward"]
        ['aten.tanh_backward in 1']
        >>> print(ps.compare_bits(trace, trace_bits(step, state, torch.ones(3, 4))))
        equal: 21 operations
    """
    _check(step, state, batch, values)
    given = {path: bits_of(leaf) for path, leaf in _named({"state": state, "batch": batch})}
    devices = sorted({_device(x) for x in tree.leaves((state, batch)) if isinstance(x, Tensor)})
    modules = {id(m): path.partition(".")[2] for path, m in models_of(step, (state,)).items()}
    if isinstance(step, (Jit, JitStep)):
        step.compile(state, batch)  # else the first trace would see what only the first call does
    watch = _Watch(values, modules, sys._getframe())
    # Threads of the autograd engine, which it has for GPUs, know nothing of what this thread is in.
    with torch.autograd.set_multithreading_enabled(False), watch.hooks(), watch:
        returned = step(state, batch)
    result = {path: bits_of(x) for path, x in _named({"returned": returned}) if isinstance(x, Tensor)}
    trace = BitsTrace(_conditions(devices), given, tuple(watch.operations), result, watch.values, returned)
    if file is not None:
        trace.save(file)
    return trace


def _check(step: Callable[..., Any], state: object, batch: object, values: object) -> None:
    positions = isinstance(values, Collection) and all(type(position) is int for position in values)
    if not isinstance(values, bool) and (not positions or isinstance(values, (str, bytes))):
        what = "values= is True, or the positions of operations"
        raise ConfigError(explain(what, where=f"values={values!r:.80}", instead="values=[41]"))
    backend = facts_of(step).backend
    if backend not in (None, "eager", "vmap", "vmap, eager"):
        raise ConfigError(
            explain(
                "the operations of a compiled step cannot be seen",
                where=f"{name_of(step)}, backend={backend!r}",
                why="the compiler has fused them into kernels of its own",
                instead='ps.trace_bits(ps.jit(step, backend="eager"), ...)   # the same graph, operation by operation\n'
                "ps.trace_bits(step, ...)   # the step that was compiled",
            )
        )
    for path, leaf in _named({"state": state, "batch": batch}):
        if _torch.is_dtensor(leaf):
            raise _split(f"{path}: {tree.describe(leaf)}")


def _split(where: str) -> ConfigError:
    # No TypeError: from inside of an operator, Python would take it for one that the operator does not know.
    return ConfigError(
        explain(
            "bits are traced in one process, and this tensor is split over several",
            where=where,
            why="the operations of a DTensor are those of its shards, and others on each rank",
            instead="restore a snapshot of the run in one process, and trace the step without its plan there",
        )
    )


def _named(trees: Mapping[str, object]) -> Iterator[tuple[str, Any]]:
    for root, value in trees.items():
        yield from zip(tree.paths(value, root), tree.leaves(value), strict=True)


def _device(tensor: Tensor) -> str:
    return torch.cuda.get_device_name(tensor.device) if tensor.is_cuda else tensor.device.type


def _conditions(devices: list[str]) -> dict[str, Any]:
    """Return what bits are known to depend on, as JSON."""
    return {
        "torch": torch.__version__,
        "devices": ", ".join(devices),
        "processor": _torch_cpu.processor(),
        "capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "bits": portable.record(),
        "matmul_precision": torch.get_float32_matmul_precision(),
        "deterministic_algorithms": torch.are_deterministic_algorithms_enabled(),
    }


# --- what an operation is given and returns ---------------------------------------------------------------------------


def bits_of(value: Any) -> Bits:
    """Return the kind and the digest of a leaf."""
    if isinstance(value, Tensor):
        if value.is_meta:
            return Bits(tree.describe(value), "")
        if value.layout != torch.strided:
            value = value.to_dense()
    try:
        kind, _, content = bits.digest_row("", value)
    except bits.TreeError:  # what only Python knows: an object without bytes
        return Bits(type(value).__name__, "")
    return Bits(kind, hashlib.sha256(f"{kind}\0".encode() + content).hexdigest()[:16])


def _unknown(value: Any) -> Bits:
    return Bits(tree.describe(value), "")


@functools.cache
def _name(op: _torch.OpOverload) -> str:
    return str(op).removesuffix(".default")


@functools.cache
def _written(op: _torch.OpOverload) -> tuple[tuple[int, str], ...]:
    """Return position and name of the arguments that an operator writes into."""
    schema = _torch.schema_of(op)
    untold = _STATISTICS if schema.name in _BATCH_NORMS else ()
    return tuple(
        (place, argument.name)
        for place, argument in enumerate(schema.arguments)
        if argument.name in untold or (argument.alias_info is not None and argument.alias_info.is_write)
    )


@functools.cache
def _is_view(op: _torch.OpOverload) -> bool:
    """Return whether an operator says that its result shares the memory of an argument, which it does not write."""
    return not _written(op) and any(a.alias_info is not None for a in _torch.schema_of(op).arguments)


def _tensors(value: object) -> list[Tensor]:
    return [x for x in tree.leaves(value) if isinstance(x, Tensor)]


def _text(value: Any) -> str:
    """Return arguments as text: `x` for a tensor, and without devices, on which alone no bit depends."""
    if isinstance(value, Tensor):
        return "x"
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_text, value))}]"
    if isinstance(value, dict):
        return ", ".join(f"{name}={_text(x)}" for name, x in value.items() if not isinstance(x, torch.device))
    return repr(value)


def _arguments(args: Sequence[Any], kwargs: Mapping[str, Any]) -> str:
    text = ", ".join(filter(None, [*map(_text, args), _text(dict(kwargs))]))
    if len(text) <= _LONGEST:
        return text
    return f"{text[: _LONGEST - 20]}... {hashlib.sha256(text.encode()).hexdigest()[:16]}"


# --- where an operation is --------------------------------------------------------------------------------------------


@functools.cache
def _shown(file: str) -> str:
    """Return the path of a file as it reads on any machine: below the working directory, or its last two parts."""
    if file.startswith(PACKAGE):
        return "purestep/" + file.removeprefix(PACKAGE).replace(os.sep, "/")
    path, here = Path(file), Path.cwd()
    return (path.relative_to(here) if path.is_relative_to(here) else Path(*path.parts[-2:])).as_posix()


def _line(frame: FrameType) -> tuple[str, str]:
    code, number = frame.f_code, frame.f_lineno
    text = linecache.getline(code.co_filename, number, frame.f_globals).strip()
    if code.co_filename.startswith(_GRAPH):
        return "the graph", text.partition(";")[0][:_LONGEST]
    return f"{_shown(code.co_filename)}:{number} in {code.co_name}", text[:_LONGEST]


class _Watch(_torch.Watcher):
    """Sees every operation of this thread, below autograd and all transforms."""

    def __init__(self, values: bool | Collection[int], modules: dict[int, str], top: FrameType) -> None:
        super().__init__()
        self.operations: list[Operation] = []
        self.values: dict[int, tuple[Any, ...]] = {}
        self._chosen = values
        self._modules = modules
        self._inside: list[str] = []  # paths of the modules that are being called
        self._top, self._thread = top, threading.get_ident()
        # By number of a node of autograd: where the forward pass made it. Its gradient is computed there, too.
        self._origins: dict[int, tuple[str, str, str]] = {}
        self._went_backward = False
        self._workspaces: list[Tensor] = []  # kept, so that no other tensor comes to lie there

    # --- modules ------------------------------------------------------------------------------------------------------

    @contextlib.contextmanager
    def hooks(self) -> Iterator[None]:
        """Follow the calls of modules for the duration of a `with` block."""
        before = register_module_forward_pre_hook(self._enter)
        after = register_module_forward_hook(self._leave, always_call=True)
        try:
            yield
        finally:
            before.remove()
            after.remove()

    def _enter(self, module: nn.Module, args: object) -> None:
        if threading.get_ident() != self._thread:
            return
        if id(module) not in self._modules:
            # A model that neither the step nor the state leads to: its paths begin with its class.
            root = type(module).__name__ if not self._inside else f"{self._inside[-1]}.{type(module).__name__}"
            for path, inner in module.named_modules():
                self._modules.setdefault(id(inner), f"{root}.{path}" if path else root)
        self._inside.append(self._modules[id(module)])

    def _leave(self, module: nn.Module, args: object, output: object) -> None:
        if threading.get_ident() == self._thread and self._inside:
            self._inside.pop()

    # --- operations ---------------------------------------------------------------------------------------------------

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if any(kind not in (Tensor, nn.Parameter, nn.Buffer) for kind in types):
            for value in _tensors((args, kwargs)):
                if _torch.is_dtensor(value):
                    raise _split(f"{_name(func)}: {tree.describe(value)}")
            return NotImplemented  # a wrapper runs its own operations, which come here in their turn
        phase, place = self._where(args, kwargs)
        if _is_view(func) or not phase:
            return func(*args, **kwargs)
        with _torch.no_torch_function():
            inputs = _tensors((args, kwargs))
            read = tuple(map(self._digest, inputs))
        result = func(*args, **kwargs)
        with _torch.no_torch_function():
            self._record(func, phase, place, args, kwargs, inputs, read, result)
        return result

    def _record(
        self,
        func: Any,
        phase: str,
        place: tuple[str, str, str],
        args: Sequence[Any],
        kwargs: Mapping[str, Any],
        inputs: list[Tensor],
        read: tuple[Bits, ...],
        result: Any,
    ) -> None:
        schema = _torch.schema_of(func).name
        written = [
            tensor
            for number, name in _written(func)
            for tensor in _tensors(args[number] if number < len(args) else kwargs.get(name))
        ]
        returned = [x for x in tree.leaves(result) if not any(x is tensor for tensor in written)]
        if not written and returned and self._shares(returned, inputs):
            return  # a view that does not say so
        if schema in _UNSET:
            for tensor in _tensors(returned):
                tensor.zero_()
            outputs = tuple(map(_unknown, returned))
        else:
            hidden = _WORKSPACE.get(schema, ())
            self._workspaces += [returned[i] for i in hidden if i < len(returned)]
            outputs = tuple(map(self._digest, (*returned, *written)))
        if self._chosen is True or (self._chosen and len(self.operations) in self._chosen):
            self.values[len(self.operations)] = tuple(map(_copied, (*returned, *written)))
        text = _arguments(args, kwargs)
        self.operations.append(Operation(_name(func), phase, *place, read, text, outputs))

    def _digest(self, value: Any) -> Bits:
        if isinstance(value, Tensor) and any(value.is_set_to(workspace) for workspace in self._workspaces):
            return _unknown(value)
        return bits_of(value)

    def _shares(self, returned: list[Any], inputs: list[Tensor]) -> bool:
        if not all(isinstance(x, Tensor) and x.layout == torch.strided for x in (*returned, *inputs)):
            return False
        memory = {_torch.storage_id(x.untyped_storage()) for x in inputs}
        return all(_torch.storage_id(x.untyped_storage()) in memory for x in returned)

    def _where(self, args: Any, kwargs: Any) -> tuple[str, tuple[str, str, str]]:
        """Return the phase of an operation, "" where it is none of the step, and its module, place and line of code."""
        frame, called_by = self._frame()
        if called_by == "aside":
            return "", ("", "", "")
        if called_by == "graph":
            return "graph", ("", *_line(frame))
        here = (self._inside[-1] if self._inside else "", *_line(frame))
        if _torch_cpu.backward_running():
            self._went_backward = True
            number = _torch_cpu.backward_number()
            return "backward", here if number is None or self._inside else self._origins.get(number, here)
        tracked = torch.is_grad_enabled() and any(x.requires_grad for x in _tensors((args, kwargs)))
        if tracked:
            self._origins.setdefault(_torch_cpu.sequence_number(), here)
        forward = tracked or self._inside or called_by == "forward" or not self._went_backward
        return "forward" if forward else "update", here

    def _frame(self) -> tuple[FrameType, str]:
        """Return the frame that an operation is attributed to, and what has called it: a graph, a pure call, ..."""
        frame: FrameType | None = sys._getframe(3)
        users = ours = None
        called_by = ""
        while frame is not None and frame is not self._top:
            file = frame.f_code.co_filename
            if file.startswith(_GRAPH):
                return frame, "graph"
            if file.startswith(_IMPORT) or (file in _OBSERVING and ours is users is None):
                return frame, "aside"
            if file.startswith(PACKAGE):
                if ours is None and not file.startswith(_HERE):
                    ours = frame
                if file in _FORWARD:
                    called_by = "forward"
            elif users is None and not file.startswith(_TORCH) and not file.startswith("<frozen"):
                users = frame
            frame = frame.f_back
        return users or ours or self._top, called_by


def _copied(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return (value if value.layout == torch.strided else value.to_dense()).detach().to("cpu", copy=True)
