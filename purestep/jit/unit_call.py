"""One call of a unit, as a function of tensors: its parameters, its buffers, its arguments and a key.

Owns what makes such a function pure: where tensors are put and taken out again, which draws it makes, and what shows
that a unit does more than return a value. `unit_pieces` traces the function and calls what was compiled of it.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from purestep import _torch, tree
from purestep.errors import TraceError, explain
from purestep.jit import cache_key
from purestep.module_tensors import slots
from purestep.random.torch_mode import KeyedRandom

TENSOR = object()  # in place of a tensor among constants
_TENSORS = ("_parameters", "_buffers", "_modules")
_CONTAINERS = (list, dict, set)


class UnitCall:
    """A call of a unit.

    Args:
        module: the unit, with tensors in the places of its parameters.
        own: its forward.
        args, kwargs: of the call.
        mode: what redirects its random operations, if anything does.

    Attributes:
        inputs: parameters, buffers, tensors of the arguments, and with a mode a key and a number.
        wanted: which of them are differentiated.
        structure, constants: once it was traced, of what the unit returns.
        draws: once it was traced, how many random operations it made.
        met: once it was traced, whether it came upon a function that the mode handles.
    """

    def __init__(
        self, module: nn.Module, own: Callable[..., Any], args: Any, kwargs: Any, mode: KeyedRandom | None
    ) -> None:
        self.module, self.own, self.mode = module, own, mode
        self._slots = slots(module)
        self.params = [places[0][0][places[0][1]] for places in self._slots.params.values()]
        self.buffers = [places[0][0][places[0][1]] for places in self._slots.buffers.values()]
        self._leaves, self._structure = tree.flatten((args, kwargs))
        self._given = [x for x in self._leaves if isinstance(x, Tensor)]
        words = [] if mode is None else _no_draw()
        self.inputs: list[Tensor] = [*self.params, *self.buffers, *self._given, *words]
        grad = torch.is_grad_enabled()
        self.wanted = [grad and x.requires_grad for x in self.inputs]
        self.structure: Any = None
        self.constants: tuple[Any, ...] = ()
        self.results = 0
        self.draws, self.met = 0, False
        self._left: str | None = None

    def signature(self, any_mode: bool = False) -> Hashable:
        """Return what the graphs of the call depend on besides the code of the module.

        Args:
            any_mode: the signature of calls under any mode or none.
        """
        leaves = tuple([_signature(x) for x in (*self.params, *self.buffers, *self._leaves)])
        mode = "any" if any_mode else None if self.mode is None else id(self.mode.handlers)
        return leaves, self._structure, tuple(self.wanted), mode

    def paths(self, path: str) -> list[str]:
        """Return the printed path of each input."""
        names = [f"{path}.{name}" for name in (*self._slots.params, *self._slots.buffers)]
        given = [f"argument {i} of {path}" for i, x in enumerate(self._leaves) if isinstance(x, Tensor)]
        return [*names, *given, *([] if self.mode is None else ["the key", "the number of a draw"])]

    def check(self, path: str) -> None:
        """Refuse arguments that no graph takes.

        Raises:
            TraceError: a tensor subclass, an array, a value without a hash.
        """
        names = [f"{path}.{name}" for name in (*self._slots.params, *self._slots.buffers)]
        given = [f"argument {i} of {path}" for i in range(len(self._leaves))]
        for name, leaf in zip(given, self._leaves, strict=True):
            # A graph would miss what is written into it, and the trace would leave tensors without memory there.
            if not isinstance(leaf, Tensor) and not cache_key.is_plain(leaf):
                raise TraceError(
                    explain(
                        "a unit takes an object that it may write into",
                        where=f"{name}: {type(leaf).__module__}.{type(leaf).__qualname__}",
                        why="a compiled piece takes tensors and plain values, and hands out what it returns",
                        instead="model.config.use_cache = False   # of a model of transformers, whose cache it is\n"
                        "tensors in tuples, lists and dicts, or nodes made with @ps.pytree",
                    )
                )
        cache_key.check_leaves([*self.params, *self.buffers, *self._leaves], lambda: [*names, *given])

    # --- the function of tensors --------------------------------------------------------------------------------------

    def function(self, inputs: Sequence[Tensor]) -> list[Tensor]:
        """Call the unit with other tensors; return those of what it returns, then its buffers after the call."""
        counts = len(self.params), len(self.params) + len(self.buffers)
        params, buffers = inputs[: counts[0]], [x.clone() for x in inputs[counts[0] : counts[1]]]
        given = iter(inputs[counts[1] :])
        leaves = [next(given) if isinstance(x, Tensor) else x for x in self._leaves]
        args, kwargs = tree.unflatten(self._structure, leaves)
        mode = KeyedRandom(None) if self.mode is None else self._keyed(*given)
        before = _attributes(self.module)
        with _put(self._slots, [*params, *buffers]) as places:
            try:
                with mode:
                    out = self.own(*args, **kwargs)
                after = [place[key].detach() for place, key in places[counts[0] :]]
            finally:
                self._left = _restored(before)
        now, structure = tree.flatten((args, kwargs))
        if structure != self._structure or any(a is not b for a, b in zip(now, leaves, strict=True)):
            self._left = "a list or dict among its arguments"
        self.draws, self.met = mode.calls, mode.met
        found, self.structure = tree.flatten(out)
        self.constants = tuple([TENSOR if isinstance(x, Tensor) else x for x in found])
        results = [x for x in found if isinstance(x, Tensor)]
        self.results = len(results)
        self._check_buffers(buffers, after)
        return [*results, *after]

    def _keyed(self, key: Tensor, number: Tensor) -> KeyedRandom:
        return KeyedRandom(key, handlers=self.mode.handlers, first=number)  # type: ignore[union-attr]

    def _check_buffers(self, before: Sequence[Tensor], after: Sequence[Tensor]) -> None:
        for name, old, new in zip(self._slots.buffers, before, after, strict=True):
            if (old.shape, old.dtype, old.device) != (new.shape, new.dtype, new.device):
                raise TraceError(explain("a unit puts another kind of tensor in the place of a buffer", where=name))

    def check_traced(self, path: str) -> None:
        """Refuse a unit that did more than return a value while it was traced.

        Raises:
            TraceError: it has set an attribute of a module, or written into a list or dict there.
        """
        if self._left is not None:
            raise TraceError(
                explain(
                    "a unit leaves something behind",
                    where=f"{path}: {self._left}",
                    why="a compiled piece hands out what it returns, and nothing else",
                    instead="return it from the forward of the unit",
                )
            )
        if any(not cache_key.is_plain(x) for x in self.constants if x is not TENSOR):
            kinds = sorted({type(x).__name__ for x in self.constants if x is not TENSOR})
            raise TraceError(
                explain(
                    "a unit returns more than tensors and plain values",
                    where=f"{path}: {', '.join(kinds)}",
                    instead="tensors in tuples, lists and dicts, or nodes made with @ps.pytree",
                )
            )

    # --- one call -----------------------------------------------------------------------------------------------------

    def drawing(self, draws: int, met: bool) -> list[Tensor]:
        """Return the inputs of a call that makes a number of draws, which the mode then counts."""
        if self.mode is None:
            return self.inputs
        self.mode.met = self.mode.met or met
        if not draws:
            return self.inputs
        key, number = self.mode.taken(draws, type(self.module).__name__)
        return [*self.inputs[:-2], key, torch.full((), number, dtype=torch.int64, device=key.device)]


def _signature(leaf: object) -> Hashable:
    if isinstance(leaf, Tensor) or cache_key.is_plain(leaf):
        return cache_key.leaf_signature(leaf)
    kind: Hashable = type(leaf).__qualname__
    return "an object", kind  # refused, whichever it is


_nothing: list[Tensor] = []


def _no_draw() -> list[Tensor]:
    """Return the key and the number of a call that draws nothing."""
    if not _nothing:
        _nothing.extend((torch.zeros(2, dtype=torch.int64), torch.zeros((), dtype=torch.int64)))
    return _nothing


class _put:
    """Tensors in the places of a module's parameters and buffers; the block gets the first place of each."""

    def __init__(self, found: Any, tensors: Sequence[Tensor]) -> None:
        self._found = found
        self._groups = [*found.params.values(), *found.buffers.values()]
        self._tensors = tensors

    def __enter__(self) -> list[tuple[dict[str, Tensor], str]]:
        self._before = [(place, key, place[key]) for places in self._groups for place, key in places]
        self._rnns = [(rnn, _torch.flat_weights(rnn)) for rnn in self._found.rnns]
        for places, tensor in zip(self._groups, self._tensors, strict=True):
            for place, key in places:
                place[key] = tensor
        for rnn, _ in self._rnns:
            _torch.link_flat_weights(rnn)
        return [places[0] for places in self._groups]

    def __exit__(self, *error: object) -> None:
        for place, key, tensor in self._before:
            place[key] = tensor
        for rnn, weights in self._rnns:
            _torch.put_flat_weights(rnn, weights)


# --- what a unit does besides -----------------------------------------------------------------------------------------


def _attributes(module: nn.Module) -> list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """Return of each submodule its name, its attributes, these as they are now, and copies of containers in them."""
    found = []
    for name, child in module.named_modules():
        own = child.__dict__
        copies = {k: v.copy() for k, v in own.items() if k not in _TENSORS and isinstance(v, _CONTAINERS)}
        found.append((name, own, dict(own), copies))
    return found


def _restored(before: list[tuple[str, dict[str, Any], dict[str, Any], dict[str, Any]]]) -> str | None:
    """Put attributes back as they were, and return the name of one that was not."""
    changed = None
    for name, own, then, copies in before:
        for key in _changes(own, then, copies):
            changed = changed or (f"{name}.{key}" if name else key)
            if key not in then:
                del own[key]
                continue
            own[key] = then[key]
            if key in copies:
                _refill(then[key], copies[key])
    return changed


def _changes(own: Mapping[str, Any], then: Mapping[str, Any], copies: Mapping[str, Any]) -> Iterator[str]:
    for key in {**own, **then}:
        if key in _TENSORS or key == "_flat_weights":
            continue
        if key not in own or key not in then or own[key] is not then[key] or not _alike(own[key], copies.get(key)):
            yield key


def _alike(now: Any, then: Any) -> bool:
    if then is None:
        return True
    if isinstance(now, dict):
        return list(map(id, now)) == list(map(id, then)) and all(now[k] is then[k] for k in then)
    return list(map(id, now)) == list(map(id, then))


def _refill(container: Any, then: Any) -> None:
    container.clear()
    (container.extend if isinstance(container, list) else container.update)(then)
