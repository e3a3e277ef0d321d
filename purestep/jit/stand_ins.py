"""Modules of torch that a trace imports and hardly uses: small ones stand in for them until something needs more.

Torch's tracer imports Dynamo and Inductor, most of a second of CPU time, for their settings and for a decorator that
does nothing in a process without Dynamo. `tried` runs a function with modules that have just that. If anything asks for
more, or fails, the real modules are imported and the function runs again, so its result, and its error, are those of
the real modules. When `tried` returns, no stand-in is left in `sys.modules`, nor in a module that was first imported
meanwhile. `trace` and `backends` call it for a trace and for a look into the disk cache.
"""

from __future__ import annotations

import contextlib
import importlib
import importlib.abc
import importlib.util
import os
import sys
import threading
import types
from collections.abc import Callable, Iterator, Sequence
from importlib.machinery import ModuleSpec
from pathlib import Path
from typing import Any, TypeVar

from purestep.jit._torch import DISABLED, LIGHT, STOOD_IN

T = TypeVar("T")
_lock = threading.RLock()


class Needed(BaseException):
    """The real modules are needed. Not an Exception, so that code which tries an import does not catch it."""


def tried(run: Callable[[], T]) -> T:
    """Return `run()`, without importing the modules that stand-ins can replace if possible.

    Args:
        run: pure; called a second time, with the real modules, if it raises or needs more than the stand-ins have.
    """
    with _lock:
        if _loaded():
            return run()
        with _session() as session, contextlib.suppress(Exception, Needed):
            result = run()
            if not session.more:
                return result
        for name in STOOD_IN:
            importlib.import_module(name)
    return run()


def _loaded() -> bool:
    """Tell whether any of the real modules is there; each imports the others, sooner or later."""
    return any(name in sys.modules for name in STOOD_IN)


@contextlib.contextmanager
def _session() -> Iterator[_Session]:
    before = set(sys.modules)
    session = _Session()
    try:
        session.begin()
        yield session
    finally:
        session.end()
        session.repair(set(sys.modules) - before)


class _StandIn(types.ModuleType):
    """A module that has a few of the attributes of the real one."""

    def __init__(self, name: str, session: _Session) -> None:
        super().__init__(name)
        self._session = session
        # Submodules are those of the real package; the session decides which of them may be imported.
        top, *rest = name.split(".")
        self.__path__ = [str(Path(folder, *rest)) for folder in sys.modules[top].__path__]
        vars(self).update(STOOD_IN[name])

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self._session.active and f"{self.__name__}.{name}" in LIGHT:
            return importlib.import_module(f"{self.__name__}.{name}")
        return getattr(self._session.real(self.__name__), name)


class _Session(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    """The stand-ins while one function runs.

    Attributes:
        active: whether they are in `sys.modules`.
        more: whether more was asked for than they have.
    """

    def __init__(self) -> None:
        self.active = self.more = False
        self._thread = threading.get_ident()
        self._guard = threading.RLock()
        self._undecorated: list[Callable[..., Any]] = []
        self._stand_ins = {name: _StandIn(name, self) for name in STOOD_IN}
        setattr(self._stand_ins[DISABLED[0]], DISABLED[1], self.disable)

    def begin(self) -> None:
        """Put the stand-ins into `sys.modules`, and the submodules that an earlier session has imported."""
        sys.meta_path.insert(0, self)
        self.active = True
        modules = {**self._stand_ins, **_kept()}
        sys.modules.update(modules)
        for name, module in modules.items():
            parent, _, child = name.rpartition(".")
            if parent != "torch":  # torch finds its own packages in `sys.modules`
                setattr(sys.modules[parent], child, module)

    def end(self) -> None:
        """Take out the stand-ins, and the submodules that were imported beside them."""
        with self._guard:
            if not self.active:
                return
            self.active = False
        sys.meta_path.remove(self)
        _keep({name: sys.modules.pop(name) for name in LIGHT if name in sys.modules})
        for name, module in self._stand_ins.items():
            sys.modules.pop(name, None)
            parent, _, child = name.rpartition(".")
            if vars(sys.modules[parent]).get(child) is module:
                delattr(sys.modules[parent], child)
        for function in self._undecorated:
            vars(function).pop(DISABLED[2], None)

    def real(self, name: str) -> Any:
        """Import a real module and return it; in the thread of the function, raise instead, so that it runs again."""
        if self.active:
            self.more = True
            if threading.get_ident() == self._thread:
                raise Needed(name)
            self.end()
        return importlib.import_module(name)

    def disable(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Callable[..., Any]:
        """Return a function that Dynamo is to leave alone: itself, because there is no Dynamo yet."""
        if not self.active:
            decorated: Callable[..., Any] = getattr(self.real(DISABLED[0]), DISABLED[1])(function, *args, **kwargs)
            return decorated
        self._undecorated.append(function)
        return function

    def repair(self, names: set[str]) -> None:
        """Put real objects in place of ours into the modules that were first imported in this session."""
        for module in [sys.modules[name] for name in names if name in sys.modules]:
            for key, value in list(vars(module).items()):
                origin = self._origin(value)
                if origin is not None:
                    name, attribute = origin
                    real = importlib.import_module(name)
                    setattr(module, key, getattr(real, attribute) if attribute else real)

    def _origin(self, value: object) -> tuple[str, str] | None:
        """Return the module and the attribute that an object of this session stands for."""
        if isinstance(value, types.ModuleType):
            return (value.__name__, "") if isinstance(value, _StandIn) or value.__name__ in LIGHT else None
        if isinstance(value, types.MethodType):
            return (DISABLED[0], DISABLED[1]) if value.__self__ is self else None
        owned = ((name, key) for name, has in STOOD_IN.items() for key, known in has.items() if known is value)
        return next(owned, None)

    # --- as a finder and loader of submodules -------------------------------------------------------------------------

    def find_spec(self, name: str, path: Sequence[str] | None, target: Any = None) -> ModuleSpec | None:
        """Leave light submodules to Python; for others import the real packages."""
        if name in LIGHT or not any(name.startswith(f"{root}.") for root in self._stand_ins):
            return None
        self.real(name)
        return importlib.util.spec_from_loader(name, self)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType:
        return sys.modules[spec.name]

    def exec_module(self, module: types.ModuleType) -> None:
        """Do nothing, because `real` has imported the module."""


# --- real submodules, from one session to the next --------------------------------------------------------------------


_light: tuple[dict[str, str], dict[str, types.ModuleType]] = ({}, {})


def _keep(modules: dict[str, types.ModuleType]) -> None:
    global _light
    _light = dict(os.environ), modules


def _kept() -> dict[str, types.ModuleType]:
    """Return the submodules of the last session, unless the environment, which settings are read from, has changed."""
    environment, modules = _light
    return modules if environment == dict(os.environ) else {}
