"""Hooks that cast what goes into a module and what comes out of it, for the duration of a `with` block.

Owns the casting of nested values and the hooks; which module gets which dtype is for `casting` to say.
"""

from __future__ import annotations

import copy
import dataclasses
import weakref
from collections.abc import Callable, MutableMapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from purestep import tree


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """Return a value with every floating tensor inside cast; all else is passed on.

    It looks into trees, and into the mappings and dataclasses that models of other libraries return.
    """
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != dtype else value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return tree.map(lambda leaf: _cast_leaf(leaf, dtype), value)


def _cast_leaf(leaf: Any, dtype: torch.dtype) -> Any:
    if isinstance(leaf, Tensor):
        return cast_floating(leaf, dtype)
    if isinstance(leaf, MutableMapping):
        made = copy.copy(leaf)
        for key, value in leaf.items():
            made[key] = cast_floating(value, dtype)
        return made
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        named = {f.name: cast_floating(getattr(leaf, f.name), dtype) for f in dataclasses.fields(leaf) if f.init}
        return dataclasses.replace(leaf, **named)
    return leaf


@dataclasses.dataclass(frozen=True)
class CastInputs:
    """A forward pre-hook: arguments in one dtype."""

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: Any, kwargs: Any) -> Any:
        cast_args = tuple([cast_floating(a, self.dtype) for a in args])
        return cast_args, {k: cast_floating(v, self.dtype) for k, v in kwargs.items()} if kwargs else kwargs


@dataclasses.dataclass(frozen=True)
class CastOutputs:
    """A forward hook: results in one dtype."""

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return cast_floating(output, self.dtype)


class Hooks:
    """The hooks of one model: `with hooks(): ...` puts them on, and takes off exactly those again."""

    def __init__(self, found: Sequence[tuple[nn.Module, Callable[..., Any] | None, Callable[..., Any] | None]]) -> None:
        self._found = [(weakref.ref(m), before, after) for m, before, after in found]

    def __call__(self) -> _Hooked:
        return _Hooked([(module, before, after) for ref, before, after in self._found if (module := ref()) is not None])


class _Hooked:
    def __init__(self, found: list[tuple[nn.Module, Callable[..., Any] | None, Callable[..., Any] | None]]) -> None:
        self._found = found
        self._handles: list[Any] = []

    def __enter__(self) -> None:
        for module, before, after in self._found:
            # First before the call and last after it: the user's own hooks see what the module computes in.
            if before is not None:
                self._handles.append(module.register_forward_pre_hook(before, with_kwargs=True, prepend=True))
            if after is not None:
                self._handles.append(module.register_forward_hook(after))

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        while self._handles:
            self._handles.pop().remove()
