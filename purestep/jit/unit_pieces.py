"""The units of a model as compiled pieces: the forward and the backward pass of each, called in the middle of a step.

`UnitPieces` puts a compiled forward in the place of that of each unit while a model is bound. All other modules
run as Python, so a plan gathers and frees the parameters of one unit after the other as it does for a step that is not
compiled. Units with the same graph share one compiled piece.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import logging
import threading
import warnings
import weakref
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from purestep import _torch, transforms, tree
from purestep.errors import PurestepError, RandomnessError, TraceError
from purestep.jit import backends, cache_key, errors, exchanging
from purestep.jit._torch import load_tracer
from purestep.jit.joint import Halves, joint
from purestep.jit.outline import signature_of
from purestep.jit.progress import progress
from purestep.jit.trace import Traced
from purestep.jit.unit_call import TENSOR, UnitCall
from purestep.microbatch import Context, both
from purestep.module_tensors import slots
from purestep.parallel.per_model import PerModel
from purestep.precision.cast_params import Uncast
from purestep.random.torch_mode import innermost
from purestep.sharding.plan import Plan
from purestep.step import Step

log = logging.getLogger("purestep.jit")
# Attributes of a unit that are looked at around its forward, not in it.
_AROUND = tuple(
    "forward _forward_hooks _forward_pre_hooks _forward_hooks_with_kwargs _forward_hooks_always_called "
    "_forward_pre_hooks_with_kwargs _backward_hooks _backward_pre_hooks".split()
)


def _units_of(plan: Plan, module: nn.Module) -> tuple[str, ...]:
    modules = dict(module.named_modules())
    paths = dict.fromkeys(plan.unit(name) for name in slots(module).params)
    found = [path for path in paths if path and path in modules]
    # The forward of an outer unit holds the call of an inner one, before which parameters are gathered.
    inner = [p for p in found if not any(other.startswith(f"{p}.") for other in found)]
    for path in inner:
        exchanging.check_whole(plan, path)
    experts = [path for path in modules if tree.matches(plan.experts, path)] if plan.experts else []
    return tuple(q for p in inner for q in _beside(modules[p], p, experts))


def _beside(module: nn.Module, path: str, experts: Sequence[str]) -> Iterator[str]:
    """Yield a unit, or what of it can be compiled: experts run as they are, and what is around them does."""
    if not any(other == path or other.startswith(f"{path}.") for other in experts):
        yield path
        return
    for name, child in () if path in experts else module.named_children():
        # A layer of torch's is one kernel already.
        layer = type(child).__module__.startswith("torch.nn.") and not any(child.children())
        if not layer and any(True for _ in child.parameters()):
            yield from _beside(child, f"{path}.{name}", experts)


# The submodules that are compiled each by itself: the innermost ones that a plan gathers as a whole.
units_of = PerModel(_units_of)


class UnitPieces:
    """The compiled pieces of the units of a step.

    Args:
        plan: it says what the units are.
        backend, mode: as of `jit`.
        name: of the step, for messages.

    Attributes:
        refusals: the reason for each unit that runs uncompiled.
        compiled: how many graphs were compiled: of identical units one forward and one backward graph.
        graphs: the code of the graphs, in the order in which they were compiled.
    """

    def __init__(self, plan: Plan, backend: str, mode: str | None, name: str) -> None:
        self.plan, self.backend, self.mode, self.name = plan, backend, mode, name
        self._lock = threading.RLock()
        self.clear()

    def clear(self) -> None:
        """Forget everything that was compiled."""
        self._pieces: dict[Hashable, Piece | None] = {}
        self._runs: dict[Hashable, backends.Run] = {}
        self._known: weakref.WeakKeyDictionary[nn.Module, Hashable] = weakref.WeakKeyDictionary()
        self.refusals: tuple[str, ...] = ()
        self.graphs: list[str] = []

    @property
    def compiled(self) -> int:
        return len(self._runs)

    def around(self, module: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Return a context in which the units of a model run compiled."""
        return _Replaced(self, [(path, module.get_submodule(path)) for path in units_of(self.plan, module)])

    def call(self, path: str, module: nn.Module, own: Callable[..., Any], args: Any, kwargs: Any) -> Any:
        """Run the forward of a unit: compiled, or as it is where it cannot be cut out of the model."""
        if transforms.active() or _torch.dispatch_modes() > 0:
            return own(*args, **kwargs)
        # What happens here is no operation of the model: no mode of it has to look.
        with _torch.no_torch_function():
            call = UnitCall(module, own, args, kwargs, innermost())
            elsewhere = any(map(_torch.is_fake, call.inputs))  # another rank of a pipeline computes it
        piece = None if elsewhere else self._piece(path, call)
        if piece is None:
            return own(*args, **kwargs)
        with _torch.no_torch_function():
            return piece(call)

    def _piece(self, path: str, call: UnitCall) -> Piece | None:
        """Return what was compiled for a call, or compile it now; None for a unit that runs as it is."""
        with _torch.no_torch_function():
            key = self._key(call)
            known = key in self._pieces
            if not known and (plain := self._key(call, any_mode=True)) in self._pieces:
                key, known = plain, True
        if not known:
            with self._lock:
                if key not in self._pieces:
                    self._pieces[key] = piece = self._built(path, call)
                    if piece is not None and not piece.met:
                        # Whether a mode is active makes no difference to what it does not look at.
                        self._pieces.setdefault(self._key(call, any_mode=True), piece)
        return self._pieces[key]

    def _key(self, call: UnitCall, any_mode: bool = False) -> Hashable:
        if call.module not in self._known:
            self._known[call.module] = cache_key.module_fingerprint(call.module, ignored=_AROUND)
        return self._known[call.module], cache_key.ambient(), torch.is_grad_enabled(), call.signature(any_mode)

    def _built(self, path: str, call: UnitCall) -> Piece | None:
        # The modes and hooks of the step must not see the operations of a trace, nor what it saves.
        hooks = torch.autograd.graph.saved_tensors_hooks(_same, _same)
        with _torch.disable_current_modes(), _torch.no_function_modes(), hooks:
            load_tracer()
            try:
                call.check(path)
                halves = joint(
                    call.function,
                    call.inputs,
                    call.wanted,
                    len(call.params),
                    buffers=len(call.buffers),
                    paths=functools.partial(call.paths, path),
                    static=[call.module],
                )
                call.check_traced(path)
            except (TraceError, RandomnessError) as error:
                said = f"{path}: {error}"
                if said not in self.refusals:
                    self.refusals = (*self.refusals, said)
                    log.warning("the unit %s of %s runs uncompiled: %s", path, self.name, error)
                return None
            forward = self._compiled(halves.forward)
            backward = None if halves.backward is None else self._compiled(halves.backward)
        changed = {i - call.results: at for at, i in enumerate(halves.returned) if i >= call.results}
        return Piece(halves, forward, backward, call.structure, call.constants, changed, call.draws, call.met)

    def _compiled(self, traced: Traced) -> backends.Run:
        """Compile a graph, unless one like it was."""
        name = graph_digest(traced)
        run = None if name is None else self._runs.get(name)
        if run is not None:
            return run
        with progress(f"{self.name}, piece {len(self._runs) + 1}") as note:
            note(f"compiling {len(traced.graph.graph.nodes)} operations with {self.backend}")
            try:
                run = backends.compile(traced, self.backend, self.mode, donated=0)
            except Exception as error:
                if isinstance(error, PurestepError) or not errors.no_compiler(error):
                    raise errors.not_compiled(self.name, self.backend, error) from error
                warnings.warn(errors.no_compiler_message(self.name, error), stacklevel=2)
                self.backend, self.mode = "eager", None
                run = backends.compile(traced, "eager", None, donated=0)
        self._runs[len(self._runs) if name is None else name] = run
        self.graphs.append(traced.graph.print_readable(print_output=False))
        return run


@dataclasses.dataclass(frozen=True)
class Piece:
    """The compiled forward and backward pass of a unit.

    Attributes:
        halves: the graphs.
        forward, backward: the functions that run them.
        structure: of what the unit returns.
        constants: its leaves that are not tensors, with None in place of each tensor.
        changed: positions of the results that are new values of buffers, by the position of the buffer.
        draws: how many random operations a call makes.
        met: whether a call comes upon a function that a mode handles.
    """

    halves: Halves
    forward: backends.Run
    backward: backends.Run | None
    structure: Any
    constants: tuple[Any, ...]
    changed: dict[int, int]
    draws: int
    met: bool

    def __call__(self, call: UnitCall) -> Any:
        """Run it on the tensors of a call, and return what the unit returns."""
        inputs = call.drawing(self.draws, self.met)
        if self.backward is None:
            with torch.no_grad():
                results = self.results(self.forward(self.taken(inputs)))[0]
        else:
            results = _Run.apply(self, *inputs)
        for buffer, at in self.changed.items():
            with torch.no_grad():
                call.buffers[buffer].copy_(results[at])
        rest = iter(results)
        return tree.unflatten(self.structure, [next(rest) if x is TENSOR else x for x in self.constants])

    def taken(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Return the inputs that the forward graph takes."""
        return [inputs[i] for i in self.halves.takes]

    def results(self, returned: Sequence[Any]) -> tuple[tuple[Tensor, ...], Sequence[Any]]:
        """Return the results, each in memory of its own, and what the forward graph returned in all."""
        found = list(returned)
        for at in self.halves.views:
            # Autograd refuses writes into a view that a function of its own returned.
            found[at] = torch.empty(0, dtype=found[at].dtype, device=found[at].device).set_(
                found[at].untyped_storage(), found[at].storage_offset(), found[at].shape, found[at].stride()
            )
        return tuple(found[: len(self.halves.returned)]), found


class _Run(torch.autograd.Function):
    """A compiled forward pass, whose backward pass is the compiled one."""

    @staticmethod
    def forward(ctx: Any, piece: Piece, *inputs: Tensor) -> tuple[Tensor, ...]:
        halves = piece.halves
        results, returned = piece.results(piece.forward(piece.taken(inputs)))
        ctx.piece = piece
        ctx.save_for_backward(*(inputs[i] for i in halves.saved_inputs), *(returned[i] for i in halves.saved))
        ctx.mark_non_differentiable(*(x for i, x in enumerate(results) if i not in halves.differentiable))
        return results

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        with _torch.no_torch_function():
            piece: Piece = ctx.piece
            halves, run = piece.halves, piece.backward
            pairs = zip(halves.differentiable, halves.strides, strict=True)
            given = [*ctx.saved_tensors, *(_laid(grads[i], strides) for i, strides in pairs)]
            found: list[Tensor | None] = [None] * len(ctx.needs_input_grad)
            for at, grad in zip(halves.gradients, run(given), strict=True):  # type: ignore[misc]
                found[1 + at] = grad
            return tuple(found)


def graph_digest(traced: Traced) -> Hashable:
    """Return what two graphs have in common that compute the same; None for one that holds a constant tensor.

    Within a process only: functions are told apart by their addresses.
    """
    inputs, end, returned = traced.nodes()
    calls = [node for node in traced.graph.graph.nodes if node.op != "placeholder" and node is not end]
    if any(node.op == "get_attr" for node in calls):
        return None
    return signature_of(inputs, calls, returned), tuple([fake.device for fake in traced.fakes])


def _laid(grad: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return a gradient with the strides that the backward graph was compiled for."""
    if grad.stride() == strides:
        return grad
    return torch.empty_strided(grad.shape, strides, dtype=grad.dtype, device=grad.device).copy_(grad)


def _same(tensor: Tensor) -> Tensor:
    return tensor


# --- in the places of the units ---------------------------------------------------------------------------------------


class _Compiled:
    """What is called in the place of the forward of a unit."""

    def __init__(self, pieces: UnitPieces, path: str, module: nn.Module) -> None:
        self.pieces, self.path, self.module = pieces, path, module
        self.own: Callable[..., Any] = module.forward

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.pieces.call(self.path, self.module, self.own, args, kwargs)


class _Replaced:
    """Compiled functions in the places of the forwards of units, of each module itself: its class is not changed."""

    def __init__(self, pieces: UnitPieces, units: Sequence[tuple[str, nn.Module]]) -> None:
        self.pieces, self.units = pieces, units

    def __enter__(self) -> None:
        self.put: list[tuple[nn.Module, Any]] = []
        for path, module in self.units:
            before = module.__dict__.get("forward", _ABSENT)
            # A recomputation enters the context again, within that of the forward pass or after it.
            if not isinstance(before, _Compiled):
                module.__dict__["forward"] = _Compiled(self.pieces, path, module)
                self.put.append((module, before))

    def __exit__(self, *error: object) -> None:
        for module, before in self.put:
            if before is _ABSENT:
                module.__dict__.pop("forward", None)
            else:
                module.__dict__["forward"] = before


_ABSENT = object()


@dataclasses.dataclass(frozen=True)
class CutStep(Step):
    """A step whose units are compiled each by itself while it computes a microbatch."""

    pieces: UnitPieces | None = None

    @classmethod
    def of(cls, step: Step, pieces: UnitPieces) -> CutStep:
        """Return a step with compiled units."""
        return cls(**{field.name: getattr(step, field.name) for field in dataclasses.fields(step)}, pieces=pieces)

    @property
    def _direct(self) -> bool:
        """No: the units of the model are compiled where it is bound."""
        return False

    def _around(self, cast: Uncast) -> Context | None:
        outer = super()._around(cast)
        if self.pieces is None:
            return outer
        compiled = functools.partial(self.pieces.around, cast.module)
        return compiled if outer is None else functools.partial(both, compiled, outer)
