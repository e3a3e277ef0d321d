"""State nodes whose parts are named at run time, so that a chain's state reads `opt_state.adamw.mu['0.weight']`.

Each combination of names becomes one `@pytree` class of this module, made on first use. Pickle finds the class by name.
Only transformations with named parts call this module.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any

from purestep import tree
from purestep.arguments import checked
from purestep.errors import OptimError, explain

_PREFIX, _BETWEEN = "Parts__", "__"


@checked(OptimError)
def parts(names: Sequence[str], values: Sequence[Any]) -> Any:
    """Return a frozen node with the given children as attributes.

    Examples:
        >>> parts(["clip", "adam"], [1, 2]).adam
        2
    """
    return parts_class(tuple(names))(*values)


@functools.cache
def parts_class(names: tuple[str, ...]) -> Any:
    """Return the `@pytree` class whose fields have these names, in this order.

    Raises:
        OptimError: a name is not an identifier, holds two underscores in a row, or comes twice.
    """
    for position, name in enumerate(names):
        if not name.isidentifier() or _BETWEEN in name or name.startswith("_") or name.endswith("_"):
            raise OptimError(
                explain(
                    f"{name!r} cannot name a part of a chain",
                    where=f"part {position} of {list(names)}",
                    why="names become attributes of the state, joined by two underscores in the name of its class",
                    instead="letters, digits and single underscores inside: ('clip_1', optim.clip_by_global_norm(1.0))",
                )
            )
        if name in names[:position]:
            raise OptimError(explain(f"two parts of a chain are named {name!r}", instead="give each part its own name"))
    label = _PREFIX + _BETWEEN.join(names)
    namespace = {"__annotations__": dict.fromkeys(names, Any), "__module__": __name__, "__qualname__": label}
    return tree.pytree(type(label, (_Parts,), namespace))


def unique(names: Sequence[str]) -> tuple[str, ...]:
    """Return the names, numbering those that come again.

    Examples:
        >>> unique(["scale", "adam", "scale"])
        ('scale', 'adam', 'scale_2')
    """
    taken: list[str] = []
    for name in names:
        candidate, number = name, 1
        while candidate in taken:
            number += 1
            candidate = f"{name}_{number}"
        taken.append(candidate)
    return tuple(taken)


class _Parts:
    """Base of these nodes, with a `repr` that shows names and values."""

    def __repr__(self) -> str:
        return f"Parts({', '.join(f'{name}={value!r}' for name, value in self.__dict__.items())})"


def __getattr__(name: str) -> Any:
    if name.startswith(_PREFIX):
        rest = name.removeprefix(_PREFIX)
        return parts_class(tuple(rest.split(_BETWEEN)) if rest else ())
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
