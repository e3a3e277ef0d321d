"""State that the parts of a loader keep and the loader does not save: random generators, data sets with a state.

Owns the search through the attributes of a data set, a sampler or a function, and the capture of what is found. Plain
numbers that change are told of, since nothing says whether they matter. It sees this process only, not the workers.
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

from purestep.data.parts import is_stateful
from purestep.data.portable import pack, unpack
from purestep.errors import DataError

# Data sets are small trees of wrappers around one large thing. The search ends before it goes through the latter.
_DEPTH, _OBJECTS, _ITEMS = 5, 500, 16


@dataclasses.dataclass(frozen=True)
class Holder:
    """Something with a state: how to read it, as plain values, and how to set it."""

    get: Callable[[], Any]
    set: Callable[[Any], Any]


class Hidden:
    """What is hidden in the parts of a loader.

    Args:
        parts: by the name that messages give them.
        known: what is taken care of elsewhere: it is left alone, with all that it holds.
    """

    def __init__(self, parts: dict[str, Any], known: Iterable[Any] = ()) -> None:
        self._holders: dict[str, Holder] = {}
        self._owners: dict[str, Any] = {}
        self._unsaved: list[str] = []
        self._left = _OBJECTS
        self._seen = {id(part) for part in (*known, *_GLOBALS)}
        for name, part in parts.items():
            self._search(name, part, 0)
        del self._seen
        self._numbers = dict(self._read_numbers())

    def capture(self) -> dict[str, Any]:
        """Return the states of all that was found, by path, as plain values and tensors."""
        captured = {}
        for path, holder in list(self._holders.items()):
            try:
                captured[path] = pack(holder.get(), path)
            except DataError:  # of a kind that no snapshot can hold
                del self._holders[path]
                self._unsaved.append(path)
        return captured

    def put_back(self, captured: dict[str, Any]) -> None:
        """Set the states as they were captured; what is not here any more is left out."""
        for path in captured.keys() & self._holders.keys():
            self._holders[path].set(unpack(captured[path]))

    def changed(self) -> list[str]:
        """Return the paths of what cannot be captured: states of other kinds, and numbers and strings that are not what
        they were when the search was made."""
        return [*self._unsaved, *(p for p, value in self._read_numbers() if self._numbers.get(p, value) != value)]

    def _search(self, path: str, value: Any, depth: int) -> None:
        if id(value) in self._seen or depth > _DEPTH or self._left == 0 or isinstance(value, _OPAQUE):
            return
        self._seen.add(id(value))
        self._left -= 1
        holder = _holder(value, part=depth == 0)
        if holder is not None:
            self._holders[path] = holder
            return
        # What is told the epoch has it as a number. The type is asked, since objects may answer to any name.
        if not hasattr(type(value), "set_epoch") and not type(value).__module__.startswith("torch"):
            self._owners[path] = value
        # What a function uses of its module may lead anywhere.
        depth = max(depth + 1, _DEPTH - 1) if isinstance(value, FunctionType) else depth + 1
        for name, inner in _inside(value):
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
# These are seeded while a loader works.
_GLOBALS = (python_random._inst, np.random.mtrand._rand, torch.default_generator)


def _inside(value: Any) -> Iterator[tuple[str, Any]]:
    """What an object holds, with what to add to its path."""
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
        yield from ((f".{name}", item) for name, item in _reached(value).items())
    else:
        yield from ((f".{name}", item) for name, item in list(getattr(value, "__dict__", {}).items()))


def _reached(function: FunctionType) -> dict[str, Any]:
    """The variables of its surroundings that a function uses."""
    try:
        found = inspect.getclosurevars(function)
    except ValueError:  # a variable that has no value yet
        return {}
    return {**found.globals, **found.nonlocals}


def _holder(value: Any, *, part: bool) -> Holder | None:
    if isinstance(value, python_random.Random):
        return None if isinstance(value, python_random.SystemRandom) else _python(value)
    if isinstance(value, np.random.Generator):
        bits: Any = value.bit_generator
        return _numpy(lambda: bits.state, lambda state: setattr(bits, "state", state))
    if isinstance(value, np.random.RandomState):
        return _numpy(lambda: value.get_state(legacy=False), value.set_state)
    if isinstance(value, torch.Generator):
        return Holder(value.get_state, value.set_state)
    stateful = is_stateful(value if part else type(value)) and (part or isinstance(value, Dataset))
    return Holder(value.state_dict, value.load_state_dict) if stateful else None


def _python(generator: python_random.Random) -> Holder:
    def get() -> Any:
        version, words, rest = generator.getstate()
        return version, np.array(words, np.uint32), rest

    def set_(state: Any) -> None:
        generator.setstate((state[0], tuple(state[1].tolist()), state[2]))

    return Holder(get, set_)


def _numpy(get: Callable[[], Any], set_: Callable[[Any], Any]) -> Holder:
    # As text, because some of the numbers have 128 bits.
    return Holder(
        lambda: json.dumps(get(), default=lambda array: array.tolist()), lambda state: set_(json.loads(state))
    )
