"""Hooks that cast what goes into a module and what comes out of it, for the duration of a `with` block.

Owns the casting of nested values and the hooks; which module gets which dtype is for `casting` to say.
"""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import MutableMapping, Sequence
from types import TracebackType
from typing import Any

import torch
from torch import Tensor, nn

from purestep import _torch, tree


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
        dtype = self.dtype
        if not kwargs and len(args) == 1 and type(args[0]) is Tensor and args[0].dtype == dtype:
            return None
        return tuple([cast_floating(a, dtype) for a in args]), {k: cast_floating(v, dtype) for k, v in kwargs.items()}


@dataclasses.dataclass(frozen=True)
class CastOutputs:
    """A forward hook: results in one dtype."""

    dtype: torch.dtype

    def __call__(self, module: nn.Module, args: Any, output: Any) -> Any:
        return cast_floating(output, self.dtype)


class Hooks:
    """The hooks of one model: `with hooks(): ...` puts them on, and takes off exactly those again.

    They go straight into the dicts of the modules, because this happens at every step: torch's own registration makes a
    handle for each, and took a third of the time of a small model's step.
    """

    def __init__(self, found: Sequence[tuple[nn.Module, CastInputs | None, CastOutputs | None]]) -> None:
        self._places: list[tuple[dict[Any, Any], Any, bool]] = []
        for module, before, after in found:
            if before is not None:
                self._places.append((_torch.kwargs_pre_hooks_of(module), True, False))
                self._places.append((_torch.pre_hooks_of(module), before, True))
            if after is not None:
                self._places.append((_torch.hooks_of(module), after, False))

    def __call__(self) -> _Hooked:
        return _Hooked(self._places)


class _Hooked:
    def __init__(self, places: list[tuple[dict[Any, Any], Any, bool]]) -> None:
        self._places = places

    def __enter__(self) -> None:
        # No hook of torch has such a key. First before the call and last after it: the user's own hooks see what the
        # module computes in.
        for place, hook, first in self._places:
            place[self] = hook
            if first:
                place.move_to_end(self, last=False)  # type: ignore[attr-defined]

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        for place, _, _ in self._places:
            place.pop(self, None)
