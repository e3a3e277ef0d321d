"""Names that a package offers, imported when they are first used.

A package lists them as ordinary imports under `if TYPE_CHECKING:`, where type checkers read them, and calls `attach`.
So importing purestep, in every worker process too, does not build what most programs never use.
"""

from __future__ import annotations

import ast
import functools
import gc
import importlib
import sys
from collections.abc import Callable
from types import ModuleType
from typing import Any


def attach(package: str) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return the `__getattr__` and `__dir__` of a package.

    Args:
        package: its `__name__`.

    Raises:
        AttributeError: when a name is used that the package does not list.
    """

    def names() -> dict[str, tuple[str, str]]:
        return _listed(package)

    def get(name: str) -> Any:
        if name.startswith("__") or name not in names():
            raise AttributeError(f"module {package!r} has no attribute {name!r}")
        home, original = names()[name]
        with Uncollected():
            # The package itself would ask this function again for a module that is not loaded yet.
            value = None if home == package else getattr(importlib.import_module(home), original, None)
            if value is None:
                value = importlib.import_module(f"{home}.{original}")
        setattr(sys.modules[package], name, value)
        return value

    def directory() -> list[str]:
        return sorted({*vars(sys.modules[package]), *names()})

    sys.modules[package].__class__ = _Package
    return get, directory


class Uncollected:
    """No garbage is collected while modules are loaded or a step is compiled: what they make stays for long, and a
    collection looks at all that torch has made, which takes 0.1 s."""

    def __enter__(self) -> None:
        self._on = gc.isenabled()
        gc.disable()

    def __exit__(self, *error: object) -> None:
        if self._on:
            gc.enable()


class Lasting(Uncollected):
    """And what is made within goes to the oldest objects, which the next collection does not look at."""

    def __enter__(self) -> None:
        super().__enter__()
        if self._on:
            gc.collect(1)  # garbage from before, which may hold tensors, is not to become old with it

    def __exit__(self, *error: object) -> None:
        if self._on and not gc.get_freeze_count():  # what a program has frozen stays so
            gc.freeze()
            gc.unfreeze()
        super().__exit__(*error)


class _Package(ModuleType):
    """A package in which a listed name stays what is listed when a submodule of the same name is imported.

    `purestep.jit` is a function of the module `purestep.jit`. Python binds a module to its package when it is imported,
    by whomever.
    """

    def __reduce__(self) -> tuple[Callable[[str], ModuleType], tuple[str]]:
        """Pickle it by name, as cloudpickle does modules, with a function of a script that uses `ps`."""
        return importlib.import_module, (self.__name__,)

    def __setattr__(self, name: str, value: Any) -> None:
        if isinstance(value, ModuleType) and value.__name__ == f"{self.__name__}.{name}":
            home, original = _listed(self.__name__).get(name, (self.__name__, name))
            if (home, original) != (self.__name__, name):
                return
        super().__setattr__(name, value)


@functools.cache
def _listed(package: str) -> dict[str, tuple[str, str]]:
    """Read the imports under `if TYPE_CHECKING:` from the source of a package."""
    source = sys.modules[package].__loader__.get_source(package)  # type: ignore[union-attr]
    return {
        alias.asname or alias.name: (node.module or "", alias.name)
        for block in ast.parse(source).body
        if isinstance(block, ast.If) and isinstance(block.test, ast.Name) and block.test.id == "TYPE_CHECKING"
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
