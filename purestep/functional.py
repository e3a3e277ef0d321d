"""Calling an `nn.Module` as a pure function: the one place that does it.

`bind` puts tensors in the places of a module's parameters and buffers for the duration of a `with` block and takes them out
again; `apply` is one such call. Buffers go in as clones, randomness comes from a key, and nothing of the module is left
changed. `grad`, `step` and users' own steps call it.
"""

from __future__ import annotations

import contextlib
import copy
import threading
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from purestep import random
from purestep.errors import StepError, explain
from purestep.keyed import KeyedRandom

Tensors = Mapping[str, Tensor]


class Slots:
    """Where the named parameters and buffers of a module live: found once, checked at every use.

    A tied parameter has several places under its first name, so it is passed once and put everywhere.
    """

    def __init__(self, module: nn.Module) -> None:
        self.links = [(m._modules, n, c) for m in module.modules() for n, c in m._modules.items()]
        self.params = _places(module, "_parameters")
        self.buffers = _places(module, "_buffers")
        self.rnns = [m for m in module.modules() if isinstance(m, nn.RNNBase)]

    def stale(self) -> bool:
        """Tell whether a submodule was replaced since the places were found."""
        return any(children.get(name) is not child for children, name, child in self.links)


def _places(module: nn.Module, kind: str) -> dict[str, list[tuple[dict[str, Any], str]]]:
    places: dict[str, list[tuple[dict[str, Any], str]]] = {}
    first: dict[int, str] = {}
    for prefix, owner in module.named_modules():
        for key, tensor in getattr(owner, kind).items():
            if tensor is not None:
                name = first.setdefault(id(tensor), f"{prefix}.{key}" if prefix else key)
                places.setdefault(name, []).append((getattr(owner, kind), key))
    return places


_slots: weakref.WeakKeyDictionary[nn.Module, Slots] = weakref.WeakKeyDictionary()


def slots(module: nn.Module) -> Slots:
    """Return the places of a module's tensors, from a cache that notices replaced submodules."""
    found = _slots.get(module)
    if found is None or found.stale():
        found = _slots[module] = Slots(module)
    return found


class Definition:
    """The static part of a model: its module without the weights.

    Two definitions are equal when class, printed structure and the names and shapes of their tensors are, so that states of
    separately built models of one architecture have one tree structure (they can be mapped together and stacked for vmap).
    """

    def __init__(self, module: nn.Module) -> None:
        tensors = [t for m in module.modules() for kind in (m._parameters, m._buffers) for t in kind.values()]
        memo: dict[int, Any] = {id(t): _weightless(t) for t in tensors if t is not None}
        self.module: nn.Module = copy.deepcopy(module, memo)
        self._signature: tuple[Any, ...] | None = None

    def signature(self) -> tuple[Any, ...]:
        """Return what equality compares."""
        if self._signature is None:
            found = slots(self.module)
            tensors = [
                (n, tuple(places[0][0][places[0][1]].shape)) for n, places in (found.params | found.buffers).items()
            ]
            self._signature = (type(self.module), repr(self.module), tuple(tensors))
        return self._signature

    def __eq__(self, other: object) -> bool:
        return self is other or (isinstance(other, Definition) and self.signature() == other.signature())

    def __hash__(self) -> int:
        return hash(type(self.module))

    def __repr__(self) -> str:
        return f"<{type(self.module).__qualname__}>"


def _weightless(tensor: Tensor) -> Tensor:
    empty = torch.empty_like(tensor, device="meta", requires_grad=False)
    return nn.Parameter(empty, requires_grad=tensor.requires_grad) if isinstance(tensor, nn.Parameter) else empty


_local = threading.local()


def _stack(name: str) -> list[Any]:
    if not hasattr(_local, name):
        setattr(_local, name, [])
    return getattr(_local, name)


class bind:
    """Put tensors in the places of a module's parameters and buffers for the duration of a `with` block.

    Inside the block the module itself is the bound model: its `forward`, other methods and attributes all see the given
    tensors, and all randomness of torch comes from the key. On leaving, everything is put back, whatever happened.

    Args:
        module: any module. It is not changed: flags, tensors and hooks are as before afterwards.
        params: tensors by parameter name, as `named_parameters` has them (a tied one once, under its first name).
        buffers: tensors by buffer name; parameters that are not trained may be among them. Buffers are cloned first.
        rng: int64[2] key of everything random, or None: then random operations raise RandomnessError.
        train: True runs in training mode (as `module.train()` would set it; if the module is in training mode already, the
            flags of its submodules are respected, so a frozen BatchNorm stays frozen). False runs in evaluation mode.

    Attributes:
        new_buffers: after the block, the buffers as the call left them, by name.

    Raises:
        StepError: a name is missing or unknown.

    Example:
        >>> model = nn.BatchNorm1d(2)
        >>> params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        >>> with bind(model, params, buffers) as net:
        ...     y = net(torch.ones(4, 2))
        >>> int(buffers["num_batches_tracked"]), int(net.num_batches_tracked)
        (0, 0)
    """

    def __init__(
        self, module: nn.Module, params: Tensors, buffers: Tensors | None = None, *, rng: Tensor | None = None, train: bool = True
    ) -> None:
        self.module = module
        self.slots = slots(module)
        self.original = buffers or {}
        self.given = {**params, **self.original}
        self.buffer_names = list(buffers or {})
        self.train = train
        self.mode = KeyedRandom(rng)
        self.new_buffers: dict[str, Tensor] = {}
        missing = [n for n in (*self.slots.params, *self.slots.buffers) if n not in self.given]
        if missing or len(self.given) != len(self.slots.params) + len(self.slots.buffers):
            raise self._name_error(missing)
        # A buffer may be written in place by the module; a frozen parameter among the buffers is never written.
        for name in self.buffer_names:
            if name in self.slots.buffers:
                self.given[name] = self.given[name].clone()

    def _name_error(self, missing: list[str]) -> StepError:
        known = self.slots.params.keys() | self.slots.buffers.keys()
        unknown = [n for n in self.given if n not in known]
        return StepError(
            explain(
                f"the tensors do not fit the module {type(self.module).__qualname__}",
                where="; ".join(
                    f"{label}: {', '.join(map(repr, group[:5]))}{', ...' if len(group) > 5 else ''}"
                    for label, group in (("missing", missing), ("unknown", unknown))
                    if group
                ),
                why="every parameter and buffer has to be passed, because a pure call uses none of the module's own",
                instead="pass the params and buffers of a state made for this module: state = ps.init(model, tx)",
            )
        )

    def __enter__(self) -> nn.Module:
        self._saved = [
            (place, key, place[key])
            for group in (self.slots.params, self.slots.buffers)
            for places in group.values()
            for place, key in places
        ]
        given = self.given
        for group in (self.slots.params, self.slots.buffers):
            for name, places in group.items():
                tensor = given[name]
                for place, key in places:
                    place[key] = tensor
        self._rnn_saved = [(m, m._flat_weights, m._flat_weight_refs) for m in self.slots.rnns]
        for rnn in self.slots.rnns:
            rnn._init_flat_weights()
        self._flags: list[nn.Module] = []
        if self.module.training != self.train:
            self._flags = [m for m in self.module.modules() if m.training != self.train]
            for m in self._flags:
                m.__dict__["training"] = self.train
        elif not self.train:
            self._flags = [m for m in self.module.modules() if m.training]
            for m in self._flags:
                m.__dict__["training"] = False
        _stack("active").append(self)
        self.mode.__enter__()
        return self.module

    def __exit__(self, kind: Any, error: Any, trace: Any) -> None:
        self.mode.__exit__(kind, error, trace)
        _stack("active").pop()
        for name in self.buffer_names:
            if name in self.slots.buffers:
                place, key = self.slots.buffers[name][0]
                self.new_buffers[name] = place[key].detach()
            else:
                self.new_buffers[name] = self.given[name]
        for place, key, tensor in self._saved:
            place[key] = tensor
        for m in self._flags:
            m.__dict__["training"] = not self.train
        for rnn, weights, refs in self._rnn_saved:
            rnn._flat_weights, rnn._flat_weight_refs = weights, refs
        scope = getattr(_local, "scope", None)
        if scope is not None:
            scope.append(self)

    def again(self, calls: int) -> contextlib.AbstractContextManager[Any]:
        """Return a context in which this binding is active once more, for a recomputation in the backward pass.

        Args:
            calls: how many random operations came before what is recomputed.
        """
        repeated = copy.copy(self)
        repeated.new_buffers = {}
        # Recomputation starts from the buffers of the forward pass and updates clones that nobody keeps.
        repeated.given = self.given | {n: t.clone() for n, t in self.original.items() if n in self.slots.buffers}
        repeated.mode = KeyedRandom(self.mode.key, calls)
        return repeated


def apply(
    module: nn.Module,
    params: Tensors,
    buffers: Tensors | None = None,
    *args: Any,
    rng: Tensor | None = None,
    train: bool = True,
    **kwargs: Any,
) -> tuple[Any, dict[str, Tensor]]:
    """Call a module as a pure function of its parameters, buffers and inputs.

    Args:
        module: any module; it is not changed.
        params: tensors by parameter name.
        buffers: tensors by buffer name; they are not changed either.
        *args, **kwargs: what `module.forward` takes.
        rng: int64[2] key of dropout and all other randomness of the call.
        train: training or evaluation mode, see `bind`.

    Returns:
        What the module returns, and the buffers after the call.

    Raises:
        StepError: the names of the tensors do not fit the module.
        RandomnessError: the module draws random numbers and `rng` is None.

    Example:
        >>> model = nn.Linear(3, 2)
        >>> y, buffers = apply(model, dict(model.named_parameters()), {}, torch.ones(4, 3))
        >>> y.shape, buffers
        (torch.Size([4, 2]), {})
    """
    bound = bind(module, params, buffers, rng=rng, train=train)
    with bound as net:
        out = net(*args, **kwargs)
    return out, bound.new_buffers


@contextlib.contextmanager
def gradient_scope() -> Iterator[list[bind]]:
    """Collect the bindings whose results are differentiated, so that `backward_scope` can restore them."""
    outer = getattr(_local, "scope", None)
    _local.scope = collected = []
    try:
        yield collected
    finally:
        _local.scope = outer


@contextlib.contextmanager
def backward_scope(collected: list[bind]) -> Iterator[None]:
    """Make the bindings of the forward pass active in the backward pass, where checkpoints call the module again."""
    _local.scope, outer = None, getattr(_local, "scope", None)
    try:
        with contextlib.ExitStack() as stack:
            for bound in collected:
                stack.enter_context(bound.again(0))
            yield
    finally:
        _local.scope = outer


def checkpoint(function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run a function without storing its activations; the backward pass recomputes them (activation checkpointing).

    Like `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`, but dropout and other randomness inside is drawn
    from the same keys again, and the module sees the same bound parameters.

    Args:
        function: a module or function of tensors, called inside a pure call of a model.
        *args, **kwargs: its arguments.

    Returns:
        What the function returns.

    Example:
        >>> block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.block = block
        ...     def forward(self, x):
        ...         return checkpoint(self.block, x)
        >>> net = Net()
        >>> y, _ = apply(net, dict(net.named_parameters()), {}, torch.ones(2, 4), rng=random.key(0))
        >>> y.shape
        torch.Size([2, 4])
    """
    from torch.utils.checkpoint import checkpoint as torch_checkpoint

    active = list(_stack("active"))
    calls = [bound.mode.calls for bound in active]

    def contexts() -> tuple[contextlib.AbstractContextManager[Any], contextlib.AbstractContextManager[Any]]:
        again = contextlib.ExitStack()
        return contextlib.nullcontext(), _Entering(again, [b.again(n) for b, n in zip(active, calls, strict=True)])

    return torch_checkpoint(
        function, *args, use_reentrant=False, preserve_rng_state=False, context_fn=contexts, **kwargs
    )


class _Entering:
    """Enter several contexts when entered itself."""

    def __init__(self, stack: contextlib.ExitStack, contexts: list[Any]) -> None:
        self.stack = stack
        self.contexts = contexts

    def __enter__(self) -> None:
        for context in self.contexts:
            self.stack.enter_context(context)

    def __exit__(self, *error: Any) -> None:
        self.stack.close()
