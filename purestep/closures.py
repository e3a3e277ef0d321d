"""What a function may use besides its arguments: the variables of its closure, and the globals that its code names."""

from __future__ import annotations

from collections.abc import Iterator
from types import CodeType, FunctionType
from typing import Any


def nested_code(code: CodeType) -> Iterator[CodeType]:
    """Yield some code, and that of the functions defined in it."""
    yield code
    for constant in code.co_consts:
        if isinstance(constant, CodeType):
            yield from nested_code(constant)


def free_variables(function: FunctionType) -> dict[str, Any]:
    """Return the variables of a function's closure that are assigned.

    Examples:
        >>> def make(scale):
        ...     return lambda x: scale * x
        >>> free_variables(make(3))
        {'scale': 3}
    """
    found = {}
    for name, cell in zip(function.__code__.co_freevars, function.__closure__ or (), strict=True):
        try:
            found[name] = cell.cell_contents
        except ValueError:  # it is not assigned yet
            continue
    return found


def named_globals(function: FunctionType) -> dict[str, Any]:
    """Return the globals whose names are in the code of a function and of functions in it; attributes count, too."""
    around = function.__globals__
    return {name: around[name] for code in nested_code(function.__code__) for name in code.co_names if name in around}
