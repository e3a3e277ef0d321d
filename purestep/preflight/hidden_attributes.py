"""What models remember in Python attributes, which no state holds and no snapshot saves.

Owns the comparison of a model's attributes before and after calls, and the words for one that a step changes. A cache
that is built once and stays is fine; an attribute that the same call changes again, or whose first change makes the
same call compute other numbers, is not. `dry_run`, `run` and `testing.check_pure` ask.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import random as python_random
import types
from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from purestep import _torch, tree
from purestep.errors import StepError, explain

Modules = dict[str, nn.Module]
_LARGE = 1 << 16  # elements of a tensor, or items of a container, of which only the size is compared
_DEPTH = 4
_BUDGET = 1 << 16  # items of an attribute that are looked at
# What torch keeps in a module, and what `functional.bind` puts there and takes out again.
_TORCHS = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs", "_forward_hooks_with_kwargs"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type, range, slice)
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, python_random.Random)
_CONTAINERS = (list, tuple, set, frozenset, collections.deque)


class HiddenStateWarning(UserWarning):
    """A model changes an attribute of itself in each call."""


@dataclasses.dataclass(frozen=True)
class Change:
    """An attribute of a module that changed.

    Attributes:
        path: where it is, `model.encoder.calls`.
        kind: class of the module.
        old, new: its values, as text.
    """

    path: str
    kind: str
    old: str
    new: str

    def __str__(self) -> str:
        return f"{self.path} ({self.kind}): {self.old}, then {self.new}"


@dataclasses.dataclass(frozen=True)
class _Value:
    """An attribute at some time: what is compared, and what is shown."""

    compared: Any
    shown: str
    kind: str


Attributes = dict[str, _Value]


def attributes(modules: Mapping[str, nn.Module]) -> Attributes:
    """Return what modules hold besides parameters, buffers, submodules, flags and hooks, as values of this moment."""
    return {
        f"{path}.{name}": _Value(_Frozen().of(value), _shown(value), type(module).__qualname__)
        for path, module in modules.items()
        for name, value in vars(module).items()
        if name not in _TORCHS
    }


def changed(before: Attributes, after: Attributes) -> tuple[Change, ...]:
    """Return the attributes that differ; those that are gone are not among them."""
    return tuple(
        Change(path, now.kind, "not there" if path not in before else before[path].shown, now.shown)
        for path, now in after.items()
        if path not in before or not _same(before[path].compared, now.compared)
    )


class Saved:
    """The attributes of modules as they are now, with what is in them, to put them back.

    What did not change meanwhile is not written: it may be used by others.
    """

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._resets: list[Callable[[], Any]] = []
        for module in modules.values():
            self._budget = _BUDGET
            self._resets.append(_resetting_dict(vars(module)))
            for name, value in list(vars(module).items()):
                self._keep(value, 0 if name not in _TORCHS else _DEPTH)

    def put_back(self) -> None:
        """Put them back."""
        for reset in self._resets:
            reset()

    def _keep(self, value: Any, depth: int) -> None:
        """Remember what is in a value; of a container at the largest depth, which items it has."""
        self._budget -= 1
        if self._budget < 0 or isinstance(value, (*_PLAIN, Tensor)):
            return
        inner: Any = ()
        if isinstance(value, _GENERATORS):
            self._resets.append(_resetting_generator(value))
        elif type(value) is dict:
            inner = list(value.values())
            self._resets.append(_resetting_dict(value))
        elif type(value) is set:
            self._resets.append(_resetting_set(value))
        elif type(value) in (list, collections.deque):
            inner = list(value)
            self._resets.append(_resetting_sequence(value))
        elif isinstance(value, tuple):
            inner = value
        elif _has_fields(value):
            inner = [vars(value)]
        if depth < _DEPTH:
            for item in inner:
                self._keep(item, depth + 1)


def _resetting_dict(value: dict[Any, Any]) -> Callable[[], Any]:
    content = dict(value)

    def reset() -> None:
        for key in value.keys() - content.keys():
            del value[key]
        for key, item in content.items():
            if key not in value or value[key] is not item:
                value[key] = item

    return reset


def _resetting_set(value: set[Any]) -> Callable[[], Any]:
    content = set(value)

    def reset() -> None:
        value.intersection_update(content)
        value.update(content)

    return reset


def _resetting_sequence(value: Any) -> Callable[[], Any]:
    content = list(value)

    def reset() -> None:
        if len(value) != len(content) or any(a is not b for a, b in zip(value, content, strict=True)):
            value.clear()
            value.extend(content)

    return reset


def _resetting_generator(generator: Any) -> Callable[[], Any]:
    if isinstance(generator, np.random.Generator):
        state = generator.bit_generator.state
        return lambda: setattr(generator.bit_generator, "state", state)
    if isinstance(generator, python_random.Random):
        return functools.partial(generator.setstate, generator.getstate())
    return functools.partial(generator.set_state, generator.get_state())


def _has_fields(value: object) -> bool:
    # A module in a list is not part of the model; a closure may be made anew each time.
    without = (*_PLAIN, Tensor, nn.Module, types.ModuleType)
    return hasattr(value, "__dict__") and not callable(value) and not isinstance(value, without)


class _Frozen:
    """Turns a value into one that later changes of it do not reach, with what of it can be compared."""

    def __init__(self) -> None:
        self._budget = _BUDGET

    def of(self, value: object, depth: int = 0) -> Any:
        """Return the value; beyond some depth, and some number of items in all, its type."""
        self._budget -= 1
        if isinstance(value, _PLAIN):
            return repr(value) if isinstance(value, float) else value  # NaN is not equal to itself
        if isinstance(value, Tensor):
            return _tensor(value)
        if isinstance(value, np.ndarray):
            return "array", value.shape, value.dtype.str, value.tobytes() if value.size <= _LARGE else None
        if isinstance(value, _GENERATORS):
            return type(value), _generator(value)
        if depth >= _DEPTH or self._budget < 0:
            return type(value)
        inner = depth + 1
        if isinstance(value, dict):
            return dict, len(value), [(self.of(k, inner), self.of(v, inner)) for k, v in list(value.items())[:_LARGE]]
        if isinstance(value, (set, frozenset)):
            return set, len(value), sorted(repr(x) for x in value if isinstance(x, _PLAIN))
        if isinstance(value, _CONTAINERS):
            return type(value), len(value), [self.of(x, inner) for x in list(value)[:_LARGE]]
        return (type(value), self.of(dict(vars(value)), inner)) if _has_fields(value) else type(value)


def _tensor(value: Tensor) -> Any:
    shape = type(value).__name__, tuple(value.shape), value.dtype, value.device.type
    plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta
    if not plain or value.numel() > _LARGE or _torch.dispatch_modes() > 0:
        return shape
    with torch.no_grad():
        return (*shape, value.detach().clone())


def _generator(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, python_random.Random):
        return value.getstate()
    return repr(value.bit_generator.state if isinstance(value, np.random.Generator) else value.get_state())


def _same(a: object, b: object) -> bool:
    if isinstance(a, Tensor) or isinstance(b, Tensor):
        return isinstance(a, Tensor) and isinstance(b, Tensor) and _same_numbers(a, b)
    if isinstance(a, (tuple, list)) and isinstance(b, (tuple, list)):
        return len(a) == len(b) and all(map(_same, a, b))
    return type(a) is type(b) and bool(a == b)


def _same_numbers(a: Tensor, b: Tensor) -> bool:
    if not a.is_floating_point():
        return torch.equal(a, b)
    # Kernels of devices may add up in any order.
    tolerance = 0.0 if a.device.type == "cpu" else 1e-2
    return torch.allclose(a, b, rtol=tolerance, atol=tolerance, equal_nan=True)


def _shown(value: object) -> str:
    text = type(value).__name__
    if isinstance(value, Tensor):
        text = tree.describe(value)
        if value.numel() == 1 and not value.is_meta and type(value) is Tensor:
            text = f"{text} {value.item():.6g}"
    elif isinstance(value, _PLAIN):
        text = repr(value)
    elif isinstance(value, _GENERATORS):
        text = f"{text} in state {hashlib.blake2b(repr(_generator(value)).encode(), digest_size=4).hexdigest()}"
    elif isinstance(value, (dict, *_CONTAINERS)):
        items = value.values() if isinstance(value, dict) else value
        plain = len(value) <= 8 and all(isinstance(x, _PLAIN) for x in items)
        text = repr(value) if plain else f"{text} of {len(value)}"
    elif _has_fields(value):
        fields = ", ".join(f"{k}={v!r}" for k, v in vars(value).items() if isinstance(v, _PLAIN))
        text = f"{text}({fields})"
    return text if len(text) <= 60 else text[:57] + "..."


# --- the words --------------------------------------------------------------------------------------------------------

_WHY = "an attribute is in no snapshot: a resumed run, where the model is new, differs from a straight one"


def _instead(changes: tuple[Change, ...]) -> str:
    name = changes[0].path.rpartition(".")[2]
    return (
        f'self.register_buffer("{name}", torch.zeros(()))   # in __init__: then it is in the state\n'
        f"a field of the state or of the batch that the step reads; TrainState can be extended\n"
        f"or leave the attribute as it is after its first call, as a cache does"
    )


def _where(changes: tuple[Change, ...]) -> str:
    shown = "\n".join(map(str, changes[:4]))
    return shown + (f"\n... and {len(changes) - 4} more" if len(changes) > 4 else "")


def error(changes: tuple[Change, ...]) -> StepError:
    """Return the error for attributes that make a step compute other numbers when it is called again."""
    return StepError(
        explain(
            "the model changes an attribute of itself, and computes other numbers because of it",
            where=_where(changes),
            why=_WHY,
            instead=_instead(changes),
        )
    )


def message(changes: tuple[Change, ...]) -> str:
    """Return the warning for attributes that change in each call, of which it is not known what they do."""
    return explain(
        "the model changes an attribute of itself each time it is called",
        where=_where(changes),
        why=_WHY + ", if a result depends on it",
        instead=_instead(changes),
    )
