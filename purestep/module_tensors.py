"""Where the tensors of an `nn.Module` live, and what of a module is not tensors.

Owns `slots`, the cached places of parameters and buffers, and `Definition`, the static part of a model in a state.
Nothing here calls a module or changes one; `functional` does.
"""

from __future__ import annotations

import copy
import threading
import weakref
from collections.abc import Callable
from typing import Any, cast

import torch
from torch import Tensor, nn

from purestep import _torch
from purestep.errors import StepError, explain
from purestep.random.host_draws import Habits
from purestep.random.torch_watch import TorchHabits

# By name: the dicts in which modules keep a tensor, and its key there; several where it is tied.
Places = dict[str, list[tuple[dict[str, Tensor], str]]]


class InParts(Tensor):
    """A tensor of which several ranks have parts while a model computes with it; `parallel.split_tensor` makes them."""


class Slots:
    """Where the named parameters and buffers of a module live: found once, checked at every use.

    A tied parameter has several places under its first name, so it is passed once and put everywhere.
    """

    def __init__(self, module: nn.Module) -> None:
        self._now = [_torch.children_of(m) for m in module.modules()]
        self._then = [dict(children) for children in self._now]
        self.params = _places(module, _torch.parameters_of)
        self.buffers = _places(module, _torch.buffers_of)
        self.names = dict.fromkeys((*self.params, *self.buffers)).keys()
        self.places = [
            (name, place, key)
            for group in (self.params, self.buffers)
            for name, places in group.items()
            for place, key in places
        ]
        self.rnns = [m for m in module.modules() if isinstance(m, nn.RNNBase)]
        # A bound module belongs to one thread; another one waits until it is put back.
        self.lock = threading.RLock()
        self.habits = Habits()
        self._torch_habits: weakref.WeakKeyDictionary[Any, tuple[TorchHabits, TorchHabits]] = (
            weakref.WeakKeyDictionary()
        )
        # Whether a call has shown that the model leaves its parameters as they are.
        self.writes_nothing = False

    def stale(self) -> bool:
        """Tell whether a submodule was added, removed or replaced since the places were found."""
        return self._now != self._then

    def torch_habits(self, function: Callable[..., Any], train: bool) -> TorchHabits | None:
        """Return what is known of the torch draws of a function on this module; None for one that nothing can be
        known of from call to call."""
        try:
            found = self._torch_habits.get(function)
            if found is None:
                found = self._torch_habits[function] = TorchHabits(), TorchHabits()
        except TypeError:  # it cannot be hashed, or not be referred to weakly
            return None
        return found[train]


def _places(module: nn.Module, tensors_of: Callable[[nn.Module], _torch.Slots]) -> Places:
    places: Places = {}
    first: dict[int, str] = {}
    for prefix, owner in module.named_modules():
        for key, tensor in tensors_of(owner).items():
            if tensor is not None:
                name = first.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                places.setdefault(name, []).append((cast(dict[str, Tensor], tensors_of(owner)), key))
    return places


_slots: weakref.WeakKeyDictionary[nn.Module, Slots] = weakref.WeakKeyDictionary()


def slots(module: nn.Module, *, fresh: bool = False) -> Slots:
    """Return the places of a module's tensors, from a cache that notices replaced submodules, or looked up afresh."""
    found = _slots.get(module)
    if found is None or fresh or found.stale():
        found = _slots[module] = Slots(module)
    return found


def module_of(model: object) -> nn.Module:
    """Return the module of a model: itself, or that of a `Definition` or of a state which carries one.

    Raises:
        StepError: there is none.
    """
    if isinstance(model, nn.Module):
        return model
    inner = getattr(model, "model", model)
    inner = inner.module if isinstance(inner, Definition) else inner
    if not isinstance(inner, nn.Module):
        what, kind = "this is no model", f"{type(model).__module__}.{type(model).__qualname__}"
        raise StepError(explain(what, where=kind, instead="a module, state.model, or a state that ps.init made"))
    return inner


class Adapted(nn.Module):
    """A module with parameters that a file of the weights of the model does not have: they keep their values then.

    Attributes:
        adapters: names of these parameters in the module.
    """

    adapters: tuple[str, ...] = ()


class Definition:
    """The static part of a model: its module without the weights.

    Two definitions are equal when class, printed structure, plain attributes (numbers, strings, functions by name) and
    the names and shapes of their tensors are, so that states of separately built models of one architecture have one
    tree structure (they can be mapped together and stacked for vmap).
    """

    def __init__(self, module: nn.Module) -> None:
        tensors = [
            t
            for m in module.modules()
            for kind in (_torch.parameters_of(m), _torch.buffers_of(m))
            for t in kind.values()
        ]
        memo: dict[int, Any] = {id(t): _weightless(t) for t in tensors if t is not None}
        # A tensor that a hook computes (torch.nn.utils.weight_norm) is part of a graph, which deepcopy refuses.
        held = [t for m in module.modules() for t in vars(m).values() if isinstance(t, Tensor) and not t.is_leaf]
        memo.update((id(t), t.detach().clone()) for t in held)
        self.module: nn.Module = copy.deepcopy(module, memo)
        self._signature: tuple[Any, ...] | None = None

    def signature(self) -> tuple[Any, ...]:
        """Return what equality compares."""
        if self._signature is None:
            found = slots(self.module)
            tensors = [
                (n, tuple(places[0][0][places[0][1]].shape)) for n, places in (found.params | found.buffers).items()
            ]
            plain = [_plain(vars(m)) for m in self.module.modules()]
            self._signature = (type(self.module), repr(self.module), plain, tensors)
        return self._signature

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Definition) and self.signature() == other.signature())

    def __hash__(self) -> int:
        return hash(type(self.module))

    def __repr__(self) -> str:
        return f"<{type(self.module).__qualname__}>"


def _plain(value: object) -> object:
    """Reduce an attribute to what two modules of one architecture share: numbers and texts, functions by their name."""
    if isinstance(value, (bool, int, float, complex, str, bytes, torch.dtype, torch.device, type, type(None))):
        return value
    if isinstance(value, (tuple, list)):
        return [_plain(v) for v in value]
    if isinstance(value, dict):
        return {k: _plain(v) for k, v in value.items() if isinstance(k, str)}
    return type(value), getattr(value, "__module__", None), getattr(value, "__qualname__", None)


def _weightless(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty
