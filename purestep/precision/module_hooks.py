"""Hooks that cast the inputs and outputs of modules, for the duration of a `with` block.

Owns the casting of nested values and the hooks; `cast_params` decides which module gets which dtype.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import MutableMapping, Sequence
from types import TracebackType
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from purestep import _torch, tree

T = TypeVar("T")


def cast_floating(value: Any, dtype: torch.dtype) -> Any:
    """Return a value with every floating-point tensor in it cast; everything else stays as it is.

    It looks into pytrees, and into the mappings and dataclasses that models of other libraries return.
    """
    if isinstance(value, Tensor):
        return value.to(dtype) if value.is_floating_point() and value.dtype != dtype else value
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    return tree.map(lambda leaf: _cast_leaf(leaf, dtype), value)


def _cast_leaf(leaf: object, dtype: torch.dtype) -> object:
    if isinstance(leaf, Tensor):
        return cast_floating(leaf, dtype)
    if isinstance(leaf, MutableMapping):
        # A copy, and not a new mapping: such outputs (transformers' ModelOutput) are classes with attributes as well.
        copied = copy.copy(leaf)
        for key, value in leaf.items():
            copied[key] = cast_floating(value, dtype)
        return copied
    if dataclasses.is_dataclass(leaf) and not isinstance(leaf, type):
        named = {f.name: cast_floating(getattr(leaf, f.name), dtype) for f in dataclasses.fields(leaf) if f.init}
        return dataclasses.replace(leaf, **named)
    return leaf


@dataclasses.dataclass(frozen=True)
class CastInputs:
    """A forward pre-hook: arguments in one dtype."""

    dtype: torch.dtype

    def __call__(
        self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any]] | None:
        dtype = self.dtype
        # The usual call, one tensor of the right dtype, costs no walk through its arguments: this runs at every layer.
        if not kwargs and len(args) == 1 and type(args[0]) is Tensor and args[0].dtype == dtype:
            return None
        return tuple([cast_floating(a, dtype) for a in args]), {k: cast_floating(v, dtype) for k, v in kwargs.items()}


@dataclasses.dataclass(frozen=True)
class CastOutputs:
    """A forward hook: results in one dtype."""

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: tuple[Any, ...], output: T) -> T:
        return cast_floating(output, self.dtype)


class Hooks:
    """The hooks of one model: `with hooks(): ...` registers them and removes exactly those again.

    They are written into the dicts of the modules, because this happens at every step: torch's own registration makes a
    handle for each hook, and took a third of the time of a small model's step.
    """

    def __init__(self, casts: Sequence[tuple[nn.Module, CastInputs | None, CastOutputs | None]]) -> None:
        # (dict of hooks, the hook, whether it runs before the other hooks in that dict)
        self._places: list[tuple[dict[Any, Any], Any, bool]] = []
        for module, before, after in casts:
            if before is not None:
                self._places.append((_torch.kwargs_pre_hooks_of(module), True, False))
                self._places.append((_torch.pre_hooks_of(module), before, True))
            if after is not None:
                self._places.append((_torch.hooks_of(module), after, False))

    def __call__(self) -> _Registered:
        return _Registered(self._places)


class _Registered:
    def __init__(self, places: list[tuple[dict[Any, Any], Any, bool]]) -> None:
        self._places = places

    def __enter__(self) -> None:
        # The key is this object, so that nested blocks of one model have hooks of their own; torch's keys are integers.
        # Casts of inputs run first and those of outputs last: the user's hooks get the dtype of the computation.
        for hooks, hook, first in self._places:
            hooks[self] = hook
            if first:
                hooks.move_to_end(self, last=False)  # type: ignore[attr-defined]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for hooks, _, _ in self._places:
            hooks.pop(self, None)
