"""What torch and other libraries see while a function is traced.

`traceable` changes it in a `with` block and puts everything back: checks of values that would only raise are left out,
a module's `.to(dtype)` makes new tensors, and what `torch.compile` wrapped runs as it is. `trace` enters it.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributions import Distribution
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from purestep import _torch
from purestep.jit._torch import (
    compiling,
    module_conversion,
    put_module_conversion,
    script_source,
    uncompiled,
    validates_distributions,
)
from purestep.jit.repeats import Repeats
from purestep.random.philox import philox
from purestep.random.torch_mode import undispatched

_lock = threading.RLock()


@contextlib.contextmanager
def traceable(*, library_branch: bool) -> Iterator[None]:
    """Be in surroundings in which models of torch and of others can be traced.

    One thread at a time: what is changed belongs to the process, and other threads see it, too, but for `.to`.

    Args:
        library_branch: whether `torch.compiler.is_compiling()` says yes, on which libraries take the branch that they
            keep for compilers.
    """
    with contextlib.ExitStack() as stack:
        stack.enter_context(_lock)
        stack.enter_context(_unvalidated())
        stack.enter_context(_converted())
        stack.enter_context(_unscripted())
        stack.enter_context(uncompiled())
        if library_branch:
            stack.enter_context(compiling())
        stack.enter_context(_Traceable())
        yield


@contextlib.contextmanager
def _unvalidated() -> Iterator[None]:
    """Distributions check their parameters by value, unless Python runs with -O: here as if it did."""
    before = validates_distributions()
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextlib.contextmanager
def _converted() -> Iterator[None]:
    """Let `module.to(...)` put converted tensors in the places of a bound module's, whose values follow from theirs.

    Torch would swap the fake tensor itself, which is an input of the graph.
    """
    own, here = module_conversion(), threading.get_ident()

    def apply(self: nn.Module, function: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        if threading.get_ident() != here:
            return own(self, function, recurse)
        for child in self.children() if recurse else ():
            apply(child, function)
        for places in (_torch.parameters_of(self), _torch.buffers_of(self)):
            for key, tensor in places.items():
                if tensor is not None:
                    places[key] = function(tensor)
        return self

    put_module_conversion(apply)
    try:
        yield
    finally:
        put_module_conversion(own)


@contextlib.contextmanager
def _unscripted() -> Iterator[None]:
    """Let functions that `torch.jit.script` compiled run as the Python they were made of.

    TorchScript makes its constants where no trace can tell them from tensors that the function took from outside.
    """
    kind, here = torch.jit.ScriptFunction, threading.get_ident()
    own = kind.__call__

    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        source = script_source(self) if threading.get_ident() == here else None
        return own(self, *args, **kwargs) if source is None else source(*args, **kwargs)

    kind.__call__ = call  # type: ignore[method-assign]
    try:
        yield
    finally:
        kind.__call__ = own  # type: ignore[method-assign]


class _Traceable(TorchFunctionMode):
    """Runs functions of torch that ask for values as if they did not, and repeats the blocks of random draws."""

    def __init__(self) -> None:
        super().__init__()
        self.repeats = Repeats()

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is philox:
            return self.repeats(philox, *args)
        if func is F.gaussian_nll_loss:
            func = _gaussian
        return func(*args, **kwargs) if kwargs else func(*args)


class _Unchecked:
    """torch, but for `any`, by which a function asks whether it should raise."""

    def any(self, tensor: Tensor) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_gaussian = undispatched(F.gaussian_nll_loss, torch=_Unchecked(), has_torch_function_variadic=lambda *tensors: False)
