"""Settings and methods of torch that are changed while a function is traced.

`traceable` changes them in a `with` block and restores them: value checks that would only raise are skipped, a module's
`.to(dtype)` makes new tensors, and modules wrapped by `torch.compile` run uncompiled. `trace` enters the block.
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
    DEVICE,
    compiling,
    fake_device,
    module_conversion,
    put_module_conversion,
    script_source,
    uncompiled,
    validates_distributions,
)
from purestep.jit.random_nodes import as_node
from purestep.random.philox import philox
from purestep.random.torch_mode import undispatched

_lock = threading.RLock()


@contextlib.contextmanager
def traceable(*, library_branch: bool) -> Iterator[None]:
    """Change torch's settings for a `with` block so that models of torch and of other libraries can be traced.

    One thread at a time, because the settings are global to the process: other threads see them meanwhile, except for
    `.to` and scripted functions.

    Args:
        library_branch: whether `torch.compiler.is_compiling()` returns True, which makes libraries take the branch that
            they keep for compilers.
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
        stack.enter_context(_Direct())
        yield


@contextlib.contextmanager
def _unvalidated() -> Iterator[None]:
    """Turn off the validation of distributions, which reads values of their parameters; `python -O` does the same."""
    before = validates_distributions()
    Distribution.set_default_validate_args(False)
    try:
        yield
    finally:
        Distribution.set_default_validate_args(before)


@contextlib.contextmanager
def _converted() -> Iterator[None]:
    """Let `module.to(...)` replace a module's tensors by converted ones, which are computed in the graph.

    Torch would convert each fake tensor in place, and it is an input of the graph.
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
    """Let functions compiled by `torch.jit.script` run as their Python source.

    A trace cannot tell constants that TorchScript creates from tensors that the function captured.
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
    """Replaces `gaussian_nll_loss` by a version that reads no values, and makes each Philox call one node."""

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is philox:
            return as_node(*args)
        if func is F.gaussian_nll_loss:
            func = _gaussian
        return func(*args, **kwargs) if kwargs else func(*args)


class _Direct(_torch.DispatchMode):
    """Computes the shape of an operator's result without function modes.

    Torch's code for shapes reads dozens of attributes of tensors, and each would go through every function mode. The
    device of a fake tensor, which the backward pass asks for at each gradient, is answered at once.
    """

    def __torch_dispatch__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is DEVICE and _torch.is_fake(args[0]):
            return fake_device(args[0])
        with _torch.no_torch_function():
            return func(*args, **kwargs) if kwargs else func(*args)


class _Unchecked:
    """The module torch with `any` always False: `gaussian_nll_loss` calls it only to decide whether to raise."""

    def any(self, tensor: Tensor) -> bool:
        return False

    def __getattr__(self, name: str) -> Any:
        return getattr(torch, name)


_gaussian = undispatched(F.gaussian_nll_loss, torch=_Unchecked(), has_torch_function_variadic=lambda *tensors: False)
