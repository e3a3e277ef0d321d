"""State that the components of a loader keep and the loader does not save: random generators, stateful data sets.

Owns the search through the attributes of a data set, a sampler or a function, and the capture of the states in them.
Plain numbers that change are reported only: they may be a position, or a mere count. It sees this process, no workers.
"""

from __future__ import annotations

import dataclasses
import functools
import inspect
import json
import random as python_random
from collections.abc import Callable, Iterable, Iterator
from types import FunctionType, MethodType, ModuleType
from typing import Any

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset

from purestep.data.loader_protocols import is_stateful
from purestep.data.plain_state import pack, unpack
from purestep.errors import DataError

# Data sets are small trees of wrappers around one large container. These limits end the search before it walks that.
_DEPTH, _OBJECTS, _ITEMS = 5, 500, 16


@dataclasses.dataclass(frozen=True)
class StateAccess:
    """How to read the state of one object, as plain values, and how to set it."""

    get: Callable[[], Any]
    set: Callable[[Any], object]


class HiddenState:
    """The states in the components of a loader.

    Args:
        components: by the names that messages use.
        known: objects whose state the caller saves itself: the search does not enter them.
    """

    def __init__(self, components: dict[str, object], known: Iterable[object] = ()) -> None:
        self._states: dict[str, StateAccess] = {}
        self._owners: dict[str, object] = {}
        self._unsaved: list[str] = []
        self._remaining = _OBJECTS
        self._seen = {id(component) for component in (*known, *_GLOBALS)}
        for name, component in components.items():
            self._search(name, component, 0)
        del self._seen  # ids mean nothing once objects are collected
        self._numbers = dict(self._read_numbers())

    def capture(self) -> dict[str, Any]:
        """Return all states that were found, by path, as plain values and tensors."""
        captured = {}
        for path, state in list(self._states.items()):
            try:
                captured[path] = pack(state.get(), path)
            except DataError:  # the state contains a value of a type that a snapshot cannot hold
                del self._states[path]
                self._unsaved.append(path)
        return captured

    def restore(self, captured: dict[str, Any]) -> None:
        """Set the states as they were captured; paths that no longer exist are ignored."""
        for path in captured.keys() & self._states.keys():
            self._states[path].set(unpack(captured[path]))

    def changed(self) -> list[str]:
        """Return the paths of what cannot be captured: states of other types, and attributes that are numbers or
        strings and have changed since the search."""
        return [*self._unsaved, *(p for p, value in self._read_numbers() if self._numbers.get(p, value) != value)]

    def _search(self, path: str, value: object, depth: int) -> None:
        if id(value) in self._seen or depth > _DEPTH or self._remaining == 0 or isinstance(value, _OPAQUE):
            return
        self._seen.add(id(value))
        self._remaining -= 1
        state = _state_of(value, is_component=depth == 0)
        if state is not None:
            self._states[path] = state
            return
        # An object with `set_epoch` keeps the epoch as a number, which the adapter sets itself. The type is asked,
        # because the `__getattr__` of an object may answer to any name.
        if not hasattr(type(value), "set_epoch") and not type(value).__module__.startswith("torch"):
            self._owners[path] = value
        # The globals that a function uses may lead through its whole module, so only one level below it is searched.
        depth = max(depth + 1, _DEPTH - 1) if isinstance(value, FunctionType) else depth + 1
        for name, inner in _attributes(value):
            self._search(f"{path}{name}", inner, depth)

    def _read_numbers(self) -> Iterator[tuple[str, Any]]:
        for path, owner in self._owners.items():
            for name, value in list(getattr(owner, "__dict__", {}).items()):
                if type(value) in (int, float, str) and value == value:  # no NaN
                    yield f"{path}.{name}", value


_OPAQUE = (
    *(int, float, complex, str, bytes, type(None), type, ModuleType),
    *(torch.Tensor, torch.nn.Module, np.ndarray, np.generic, DataLoader),
)
# The global generators: the adapter seeds them before each batch, so their state is never needed.
_GLOBALS = (python_random._inst, np.random.mtrand._rand, torch.default_generator)


def _attributes(value: Any) -> Iterator[tuple[str, object]]:
    """What an object refers to, with the suffix of its path."""
    # Of the plain types only: a subclass may read data when it is iterated.
    if type(value) in (list, tuple):
        if len(value) <= _ITEMS:
            yield from ((f"[{i}]", item) for i, item in enumerate(value))
    elif type(value) is dict:
        if len(value) <= _ITEMS:
            yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, functools.partial):
        yield from ((f".{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
    elif isinstance(value, MethodType):
        yield ".__self__", value.__self__
    elif isinstance(value, FunctionType):
        yield from ((f".{name}", item) for name, item in _free_variables(value).items())
    else:
        yield from ((f".{name}", item) for name, item in list(getattr(value, "__dict__", {}).items()))


def _free_variables(function: FunctionType) -> dict[str, object]:
    """The globals and closure variables that a function uses."""
    try:
        variables = inspect.getclosurevars(function)
    except ValueError:  # a closure variable without a value yet
        return {}
    return {**variables.globals, **variables.nonlocals}


def _state_of(value: object, *, is_component: bool) -> StateAccess | None:
    """The access to the state of an object, None if it has no state of its own."""
    if isinstance(value, python_random.Random):
        return None if isinstance(value, python_random.SystemRandom) else _python(value)
    if isinstance(value, np.random.Generator):
        bits: Any = value.bit_generator
        return _numpy(lambda: bits.state, lambda state: setattr(bits, "state", state))
    if isinstance(value, np.random.RandomState):
        return _numpy(lambda: value.get_state(legacy=False), value.set_state)
    if isinstance(value, torch.Generator):
        return StateAccess(value.get_state, value.set_state)
    if is_component:
        return StateAccess(value.state_dict, value.load_state_dict) if is_stateful(value) else None
    # Below the components only data sets: models and optimizers have a `state_dict` too. Again the type is asked.
    if isinstance(value, Dataset) and is_stateful(type(value)) and is_stateful(value):
        return StateAccess(value.state_dict, value.load_state_dict)
    return None


def _python(generator: python_random.Random) -> StateAccess:
    def get() -> tuple[int, np.ndarray, float | None]:
        version, words, next_gauss = generator.getstate()
        return version, np.array(words, np.uint32), next_gauss

    def set_(state: tuple[int, np.ndarray, float | None]) -> None:
        version, words, next_gauss = state
        generator.setstate((version, tuple(words.tolist()), next_gauss))

    return StateAccess(get, set_)


def _numpy(get: Callable[[], Any], set_: Callable[[Any], object]) -> StateAccess:
    # As JSON text, because some of the integers have 128 bits, which no tensor holds.
    return StateAccess(
        lambda: json.dumps(get(), default=lambda array: array.tolist()), lambda state: set_(json.loads(state))
    )
