"""What models remember in Python attributes, which no state holds and no snapshot saves.

Owns the comparison of a model's attributes before and after calls, and the words for one that a step changes. A cache
that is built once and stays is fine; an attribute that the same call changes again, or whose first change makes the same
call compute other numbers, is not. `dry`, `run` and `testing.check_pure` ask.
"""

from __future__ import annotations

import collections
import copy
import dataclasses
import random as python_random
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from purestep import tree
from purestep.errors import StepError, explain

Modules = dict[str, nn.Module]
_LARGE = 1 << 16  # elements of a tensor, or items of a container, of which only the size is compared
_DEPTH = 4
# What torch keeps in a module, and what `functional.bind` puts there and takes out again.
_TORCHS = frozenset(vars(nn.Module())) | {"_flat_weights", "_flat_weight_refs", "_forward_hooks_with_kwargs"}
_PLAIN = (bool, int, float, complex, str, bytes, type(None), torch.dtype, torch.device, torch.Size, type, range, slice)
_MUTABLE = (dict, list, set, collections.deque)
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
        f"{path}.{name}": _Value(_frozen(value, 0), _shown(value), type(module).__qualname__)
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
    """The attributes of modules as they are now, to put them back: everything in a module, and what its containers hold."""

    def __init__(self, modules: Mapping[str, nn.Module]) -> None:
        self._saved = [
            (m, dict(vars(m)), [(v, copy.copy(v)) for v in vars(m).values() if type(v) in _MUTABLE])
            for m in modules.values()
        ]

    def put_back(self) -> None:
        """Put them back."""
        for module, own, containers in self._saved:
            for name in vars(module).keys() - own.keys():
                del vars(module)[name]
            vars(module).update(own)
            for container, content in containers:
                container.clear()
                (container.extend if isinstance(container, (list, collections.deque)) else container.update)(content)


def _frozen(value: Any, depth: int) -> Any:
    """Return a value that later changes of the original do not reach, with what of it can be compared."""
    if isinstance(value, _PLAIN):
        return repr(value) if isinstance(value, float) else value  # NaN is not equal to itself
    if isinstance(value, Tensor):
        return _tensor(value)
    if isinstance(value, np.ndarray):
        return "array", value.shape, value.dtype.str, value.tobytes() if value.size <= _LARGE else None
    if isinstance(value, (torch.Generator, np.random.Generator, np.random.RandomState, python_random.Random)):
        return type(value), _generator(value)
    if depth >= _DEPTH:
        return type(value)
    if isinstance(value, (dict, *_CONTAINERS)) and len(value) > _LARGE:
        return type(value), len(value)
    if isinstance(value, dict):
        return dict, [(_frozen(k, depth + 1), _frozen(v, depth + 1)) for k, v in value.items()]
    if isinstance(value, (set, frozenset)):
        return set, sorted(repr(x) for x in value if isinstance(x, _PLAIN)), len(value)
    if isinstance(value, _CONTAINERS):
        return type(value), [_frozen(x, depth + 1) for x in value]
    if isinstance(value, nn.Module) or not hasattr(value, "__dict__") or callable(value):
        return type(value)  # a module in a list is not part of the model; a closure may be made anew each time
    return type(value), _frozen(dict(vars(value)), depth + 1)


def _tensor(value: Tensor) -> Any:
    shape = type(value).__name__, tuple(value.shape), value.dtype, value.device.type
    plain = type(value) in (Tensor, nn.Parameter) and value.layout is torch.strided and not value.is_meta
    if not plain or value.numel() > _LARGE or torch._C._len_torch_dispatch_stack() > 0:
        return shape
    with torch.no_grad():
        return (*shape, value.detach().clone())


def _generator(value: Any) -> Any:
    if isinstance(value, torch.Generator):
        return value.get_state().numpy().tobytes()
    if isinstance(value, python_random.Random):
        return value.getstate()
    return repr(value.bit_generator.state if isinstance(value, np.random.Generator) else value.get_state())


def _same(a: Any, b: Any) -> bool:
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


def _shown(value: Any) -> str:
    text = tree.describe(value) if isinstance(value, Tensor) else repr(value) if isinstance(value, _PLAIN) else ""
    if isinstance(value, Tensor) and value.numel() == 1 and not value.is_meta and type(value) is Tensor:
        text = f"{text} {value.item():.6g}"
    if isinstance(value, (dict, *_CONTAINERS)):
        text = f"{type(value).__name__} of {len(value)}"
        if len(value) <= 8 and all(isinstance(x, _PLAIN) for x in (value.values() if isinstance(value, dict) else value)):
            text = repr(value)
    text = text or type(value).__name__
    return text if len(text) <= 60 else text[:57] + "..."


# --- the words --------------------------------------------------------------------------------------------------------

_WHY = (
    "a step is a function of state and batch: an attribute is in no snapshot, so that a resumed run, where the model "
    "is new, differs from a straight one"
)


def _instead(changes: tuple[Change, ...]) -> str:
    name = changes[0].path.rpartition(".")[2]
    return (
        f'self.register_buffer("{name}", torch.zeros(()))   # in __init__: then it is in the state\n'
        f"a field of the state, or of the batch, that the step reads: ps.TrainState can be extended\n"
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
