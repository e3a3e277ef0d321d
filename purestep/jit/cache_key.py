"""The signature by which a compiled call is looked up, and the reason why a call has a new one.

A signature is all that tracing may bake into a graph: structure, shapes, dtypes, devices, strides, Python values and
the code of the modules inside. Nothing here traces or compiles; `function` calls it.
"""

from __future__ import annotations

import dataclasses
import weakref
from collections.abc import Callable, Collection, Hashable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from purestep import _torch, tree
from purestep.errors import ConfigError, TraceError, explain
from purestep.functional import Definition
from purestep.random import card_dropout
from purestep.sharding.placement import is_split, needs_plan

_COMMON = {Tensor, nn.Parameter, int, float, bool, type(None)}
_PLAIN = (str, bytes, int, float, complex, bool, type(None), torch.dtype, torch.device)


def leaf_signature(leaf: object) -> Hashable:
    """Return the part of a leaf that a graph depends on: all but the elements of a tensor, or the value itself."""
    if isinstance(leaf, Tensor):
        if leaf.is_contiguous():
            return leaf.dtype, leaf.shape, leaf.device
        return leaf.dtype, leaf.shape, leaf.device, leaf.stride()
    return type(leaf), leaf


def check_whole(leaves: Sequence[Any], paths: Callable[[], list[str]]) -> None:
    """Refuse leaves that are split over processes: a DTensor has the shape of the full tensor, which no rank holds.

    Raises:
        ConfigError: a leaf is a DTensor. A step with a plan passes local tensors instead.
    """
    if set(map(type, leaves)) - _COMMON:
        for i, leaf in enumerate(leaves):
            if is_split(leaf):
                raise ConfigError(needs_plan(paths()[i], leaf))


def check_leaves(leaves: Sequence[Any], paths: Callable[[], list[str]]) -> None:
    """Refuse leaves that a graph can neither take as an input nor hold as a constant.

    Raises:
        TraceError: a numpy array, a tensor subclass, a lazily conjugated tensor, or a value that has no hash.
    """
    for i, leaf in enumerate(leaves):
        if type(leaf) in (Tensor, nn.Parameter):
            if leaf.layout == torch.strided and not (leaf.is_conj() or leaf.is_neg()):
                continue
            what, instead = "jit takes dense tensors whose memory holds their values", "x.to_dense(), x.resolve_conj()"
        elif isinstance(leaf, Tensor):
            what = f"jit takes plain tensors, not {type(leaf).__name__}"
            instead = "pass its plain tensors, for example x.to_local()"
        elif isinstance(leaf, (np.ndarray, np.generic)):
            what, instead = "a numpy array is no tensor", "torch.as_tensor(array)"
        elif not _hashable(leaf):
            what = "a value that is not a tensor belongs to the signature of a call, and this one has no hash"
            instead = "make it a tensor, or a pytree of tensors with @ps.pytree"
        else:
            continue
        raise TraceError(explain(what, where=f"{paths()[i]}: {tree.describe(leaf)}", instead=instead))


def _hashable(value: object) -> bool:
    try:
        hash(value)
    except TypeError:
        return False
    return True


def ambient() -> Hashable:
    """Return the settings of the process and of this thread that change what is traced."""
    mixed = None
    if _torch.autocast_enabled():
        devices = ("cpu", "cuda")
        mixed = tuple((torch.is_autocast_enabled(d), torch.get_autocast_dtype(d)) for d in devices)
    return torch.get_default_dtype(), mixed, card_dropout.asked()


# --- static values ----------------------------------------------------------------------------------------------------


_fields: dict[type, tuple[tuple[str, ...], tuple[str, ...]] | None] = {}


def static_values(value: object) -> list[Any]:
    """Return the static fields of all nodes of a tree that are more than plain values: modules, functions, objects."""
    found: list[Any] = []
    _collect(value, found)
    return found


def _collect(value: object, found: list[Any]) -> None:
    cls = type(value)
    if cls is Tensor:
        return
    if type(value) is dict:
        for child in value.values():
            _collect(child, found)
    elif isinstance(value, (list, tuple)):
        for child in value:
            _collect(child, found)
    else:
        if cls not in _fields:
            _fields[cls] = tree.node_fields(cls) if tree.node_name(cls) else None
        names = _fields[cls]
        if names is not None:
            for name in names[0]:
                _collect(value.__dict__[name], found)
            found.extend(v for name in names[1] if not is_plain(v := value.__dict__[name]))


def is_plain(value: object) -> bool:
    """Tell whether `==` compares a value completely, as for numbers and strings."""
    return isinstance(value, _PLAIN) or (type(value) is tuple and all(map(is_plain, value)))


_fingerprints: dict[int, tuple[weakref.ref[Definition], Hashable]] = {}


def fingerprint(value: object) -> Hashable:
    """Return a key that is equal for static values which run the same code: a model's classes and settings, else the
    identity of the object."""
    if not isinstance(value, Definition):
        return id(value)
    known = _fingerprints.get(id(value))
    if known is None or known[0]() is not value:
        number = id(value)
        reference = weakref.ref(value, lambda _: _fingerprints.pop(number, None))
        _fingerprints[number] = known = (reference, module_fingerprint(value.module))
    return known[1]


def module_fingerprint(module: nn.Module, ignored: Collection[str] = ()) -> Hashable:
    """Return a key that is equal for modules which run the same code.

    Args:
        module: any module.
        ignored: names of its own attributes that are no part of the key; those of its submodules are.
    """
    parts: list[Hashable] = []
    for name, child in module.named_modules(remove_duplicate=False):
        settings = []
        for key, value in child.__dict__.items():
            if key not in ("_parameters", "_buffers", "_modules") and (name or key not in ignored):
                settings.append((key, _setting(value)))
        shapes = [
            (key, None if t is None else (t.dtype, tuple(t.shape), t.requires_grad))
            for kind in (_torch.parameters_of(child), _torch.buffers_of(child))
            for key, t in kind.items()
        ]
        parts.append((name, type(child), tuple(settings), tuple(shapes)))
    return tuple(parts)


def _setting(value: object) -> Hashable:
    if is_plain(value):
        return type(value), value
    if isinstance(value, (dict, set, list, tuple)):
        if not value:
            return type(value), ()
        items = value.items() if isinstance(value, dict) else list(value)
        if all(is_plain(v) for item in items for v in (item if isinstance(item, tuple) else (item,))):
            return type(value), tuple(items)
    return id(value)


# --- why a call was traced again --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Shape:
    """The readable side of a signature: one line a leaf."""

    leaves: dict[str, str]

    @classmethod
    def of(cls, names: Sequence[str], leaves: Sequence[Any], given: Sequence[tuple[str, type, Any]]) -> Shape:
        """Describe the leaves of a call under their paths, and the static arguments under their names."""
        lines = {n: _describe(leaf) for n, leaf in zip(names, leaves, strict=True)}
        return cls(lines | {name: repr(value) for name, _, value in given})

    def changes(self, new: Shape) -> list[str]:
        """Return one sentence for each difference, at most one for each leaf."""
        found = [
            f"{p} changed from {self.leaves[p]} to {d}" for p, d in new.leaves.items() if self.leaves.get(p, d) != d
        ]
        found += [f"{p} is new" for p in new.leaves if p not in self.leaves]
        found += [f"{p} is gone" for p in self.leaves if p not in new.leaves]
        return found or ["the model, another static value or a setting of torch is not the same object or value"]


def _describe(leaf: object) -> str:
    text = tree.describe(leaf)
    if isinstance(leaf, Tensor):
        text += "" if leaf.device.type == "cpu" else f" on {leaf.device}"
        text += "" if leaf.is_contiguous() else f" of strides {tuple(leaf.stride())}"
    return text


def why(new: Shape, known: Sequence[Shape]) -> str:
    """Return how a call differs from the most similar of the known signatures."""
    changes = min((old.changes(new) for old in reversed(known)), key=len)
    more = f" and {len(changes) - 3} more" if len(changes) > 3 else ""
    return "; ".join(changes[:3]) + more
