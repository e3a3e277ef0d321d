"""Torch's shape kernels without the compiler that they import: about 2 s of a process, for questions about numbers.

The Python kernels behind meta tensors ask `sympy` and `symbolic_shapes` whether sizes are expressions, and Dynamo to
leave them alone. In a dry run sizes are numbers, so the answers are known. Within `light_kernels`, modules that are not
loaded yet have stand-ins that answer just that. Whatever else is asked of them, by whomever, loads the real modules and
retires the stand-ins. `dry` uses it.
"""

from __future__ import annotations

import contextlib
import functools
import importlib
import operator
import sys
import types
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from torch import Tensor

_SHAPES = "torch.fx.experimental.symbolic_shapes"
_DYNAMO = "torch._dynamo"
_KERNELS = ("torch._prims", "torch._refs", "torch._decomp", "torch._meta_registrations")


class _StandIn(types.ModuleType):
    """A module that knows a few answers; for all others it becomes the real one."""

    def __init__(self, name: str, answers: Mapping[str, Any]) -> None:
        super().__init__(name)
        self.__dict__.update(answers)
        self.__dict__["_answers"] = tuple(answers)

    def __getattr__(self, name: str) -> Any:
        # The import system asks for `__path__`: submodules are those of the real package.
        if name.startswith("__") and (name != "__path__" or self.__name__ == _SHAPES):
            raise AttributeError(name)
        return getattr(_real(self.__name__), name)

    def retire(self) -> None:
        """Know nothing any more, for those who still hold this module."""
        if sys.modules.get(self.__name__) is self:
            sys.modules.pop(self.__name__, None)
        for name in self._answers:
            self.__dict__.pop(name, None)


def _real(name: str) -> types.ModuleType:
    """Load a module; no stand-in stays, because from here on there may be symbols."""
    for module in [m for m in list(sys.modules.values()) if isinstance(m, _StandIn)]:
        module.retire()
    return importlib.import_module(name)


# --- the answers ------------------------------------------------------------------------------------------------------


class _Expression:
    """What nothing is an instance of, as long as nobody has loaded sympy."""


def _itself(name: str) -> Callable[[Any], Any]:
    def asked(value: Any) -> Any:
        return value if type(value) in (bool, int) else getattr(_real(_SHAPES), name)(value)

    return asked


def _known(name: str) -> Callable[[Any], Any]:
    def asked(value: Any) -> Any:
        return type(value) in (bool, int) or getattr(_real(_SHAPES), name)(value)

    return asked


def _joined(name: str, join: Callable[[Any, Any], Any]) -> Callable[..., Any]:
    def asked(*values: Any) -> Any:
        if all(type(value) is bool for value in values):
            return functools.reduce(join, values)
        return getattr(_real(_SHAPES), name)(*values)

    return asked


def _equal(x: Any, y: Any) -> Any:
    sides = [tuple(v) if isinstance(v, (tuple, list)) else (v,) for v in (x, y)]
    if all(type(v) in (bool, int) for side in sides for v in side):
        return sides[0] == sides[1]
    return _real(_SHAPES).sym_eq(x, y)


def _symbols_of(value: Any) -> Any:
    if isinstance(value, Tensor) and all(type(n) is int for n in value.shape):
        return set()
    return _real(_SHAPES).free_unbacked_symbols(value)


_NUMBERS: dict[str, Callable[..., Any]] = {
    **{
        name: _itself(name)
        for name in "guard_or_false guard_or_true guard_size_oblivious guard_int statically_known_true expect_true "
        "guarding_hint_or_throw size_hint".split()
    },
    "sym_and": _joined("sym_and", operator.and_),
    "sym_or": _joined("sym_or", operator.or_),
    "sym_eq": _equal,
    "has_guarding_hint": _known("has_guarding_hint"),
    "has_hint": _known("has_hint"),  # what torch 2.11 asks in its place
    "free_unbacked_symbols": _symbols_of,
    "is_nested_int": lambda value: type(value) is not int and _real(_SHAPES).is_nested_int(value),
}


def _disable(left: list[Any], function: Any, recursive: bool = True, **options: Any) -> Any:
    """Leave a kernel as it is, because nothing traces it here; other functions get what they asked for."""
    if not getattr(function, "__module__", "").startswith(_KERNELS):
        return _real(_DYNAMO).disable(function, recursive, **options)
    left.append(function)
    return function


@contextlib.contextmanager
def light_kernels() -> Iterator[None]:
    """Run meta kernels without loading sympy and Dynamo, where they are not loaded yet."""
    left: list[Any] = []
    answers: Mapping[str, Mapping[str, Any]] = {
        "sympy": {"Basic": _Expression},
        _SHAPES: _NUMBERS,
        _DYNAMO: {"disable": functools.partial(_disable, left)},
    }
    made = [_StandIn(name, known) for name, known in answers.items() if name not in sys.modules]
    sys.modules.update({module.__name__: module for module in made})
    try:
        yield
    finally:
        for module in made:
            module.retire()
        for function in left:
            # Torch remembers the answer on the function; the next who asks may be tracing.
            vars(function).pop("__dynamo_disable", None)
