"""Static arguments: a function is traced anew for each of their values."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

from purestep.errors import ConfigError, TraceError, explain


class Statics:
    """Which arguments of a function are static, and the names of all of them.

    Args:
        function: the function.
        static: positions or names of its static arguments.

    Raises:
        ConfigError: the function has no such argument.
    """

    def __init__(self, function: Callable[..., Any], static: Sequence[int | str]) -> None:
        try:
            parameters = list(inspect.signature(function).parameters.values())
        except (TypeError, ValueError):
            parameters = []
        positional = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
        self.order = [p.name for p in parameters if p.kind in positional]
        known = {p.name for p in parameters}
        self.static: set[str] = set()
        for each in static:
            name = self.order[each] if isinstance(each, int) and each < len(self.order) else each
            if name not in known:
                raise ConfigError(
                    explain(
                        "static= names no argument of the function",
                        where=f"static={each!r}; arguments: {', '.join(self.order)}",
                        instead='ps.jit(f, static=("training",)), or static=(2,)',
                    )
                )
            self.static.add(str(name))

    def __bool__(self) -> bool:
        return bool(self.static)

    def split(
        self, args: tuple[Any, ...], kwargs: dict[str, Any]
    ) -> tuple[tuple[Any, ...], dict[str, Any], tuple[tuple[str, type, Any], ...]]:
        """Return the traced arguments, and the static ones by name.

        Raises:
            TraceError: a static argument has no hash.
        """
        given = {n: v for n, v in zip(self.order, args, strict=False) if n in self.static}
        traced = tuple(v for i, v in enumerate(args) if i >= len(self.order) or self.order[i] not in self.static)
        given |= {n: v for n, v in kwargs.items() if n in self.static}
        for name, value in given.items():
            try:
                hash(value)
            except TypeError as error:
                raise TraceError(
                    explain(
                        "a static argument has to have a hash",
                        where=f"{name}: {type(value).__name__}",
                        instead="pass a tuple in place of a list, or leave the argument out of static=",
                    )
                ) from error
        rest = {n: v for n, v in kwargs.items() if n not in self.static}
        return traced, rest, tuple((n, type(given[n]), given[n]) for n in sorted(given))

    def bound(self, function: Callable[..., Any], given: Sequence[Any]) -> Callable[..., Any]:
        """Return the function with its static arguments bound, which takes the traced arguments only."""
        if not given:
            return function
        values = {name: value for name, _, value in given}

        @functools.wraps(function)
        def call(*args: Any, **kwargs: Any) -> Any:
            rest = iter(args)
            placed: list[Any] = []
            for name in self.order:
                if name in values and name not in kwargs:
                    placed.append((name, values[name]))
                else:
                    value = next(rest, inspect.Parameter.empty)
                    if value is inspect.Parameter.empty:
                        break
                    placed.append((name, value))
            by_name = {n: v for n, v in values.items() if n not in dict(placed)}
            return function(*(v for _, v in placed), *rest, **by_name, **kwargs)

        return call

    def names(self, count: int) -> list[str]:
        """Return the names of the first traced arguments, for paths."""
        names = [n for n in self.order if n not in self.static][:count]
        return names + [f"args[{i}]" for i in range(len(names), count)]
