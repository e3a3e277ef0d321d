"""`Split`: an activation or a parameter of which each rank of a team has parts, with the shape of the whole.

A model computes with it as with any tensor. Each function of torch is looked up in a table of rules, which compute with
the parts, plain tensors that autograd knows; a function without a rule gets the whole. A plain tensor is whole on every
rank. `split_math`, `split_views` and `split_layers` hold the rules.
"""

from __future__ import annotations

import functools
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, TypeGuard

import torch
from torch import Tensor
from torch.nn import functional as F

from purestep import tree
from purestep._torch import writes
from purestep.errors import ConfigError, explain
from purestep.module_tensors import InParts
from purestep.parallel import _torch
from purestep.parallel.team import Blocks, Parts, Team
from purestep.random.torch_mode import undispatched

Rule = Callable[..., Any]
_RULES: dict[Any, Rule] = {}


def rule(*functions: Any) -> Callable[[Rule], Rule]:
    """Register a rule, `(func, *args, **kwargs)`, for functions of torch; it may return NotImplemented."""

    def register(found: Rule) -> Rule:
        _RULES.update(dict.fromkeys((f for f in functions if f is not None), found))
        return found

    return register


def named(*names: str) -> Iterator[Any]:
    """Yield the functions of these names that torch has: as functions, methods, and in `torch.nn.functional`."""
    for name in names:
        for place in (torch, Tensor, F, torch.special, torch.linalg, _torch.nn_functions):
            found = getattr(place, name, None)
            if callable(found):
                yield found


class Split(InParts):
    """A tensor of which this rank has parts. Made by `split`.

    Attributes:
        parts: this rank's parts, of one shape.
        at: the dim that is cut.
        blocks: lengths along that dim, each of which is cut into all parts: one, or several where a matrix holds
            several side by side, as those of query, key and value.
        team: the ranks.
    """

    parts: Parts
    at: int
    blocks: Blocks
    team: Team
    known: tuple[object, Tensor] | None  # the whole, and what it was made of

    def keyed_attention(self, *args: Any) -> Tensor | None:
        """Attend with dropout, see `random.torch_layers.Attending`."""
        out: Tensor | None = _RULES[Split.keyed_attention](self, *args)
        return out

    @property
    def cut(self) -> tuple[int, Blocks]:
        """The dim that is cut, counted from the last, and its blocks."""
        return self.at - self.ndim, self.blocks

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        raise _unseen(str(func))

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        kinds: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = kwargs or {}
        found = _RULES.get(func)
        if found is None:
            if _is_asked(func):
                with _torch.no_subclass():
                    return func(*args, **kwargs)
            if type(func) is types.FunctionType and func.__module__ == F.__name__:
                return _body(func)(*args, **kwargs)
        _refuse_opaque(args)
        if found is not None:
            out = found(func, *args, **kwargs)
            if out is not NotImplemented:
                return out
        return on_whole(func, *args, **kwargs)


def split(parts: Sequence[Tensor], at: int, blocks: Blocks, team: Team) -> Split:
    """Return the tensor of these parts, cut along a dim."""
    shape = list(parts[0].shape)
    at %= len(shape)
    shape[at] = sum(blocks)
    made = _torch.wrapper(Split, shape, parts[0])
    made.parts, made.at, made.blocks, made.team, made.known = tuple(parts), at, blocks, team, None
    return made


def is_split(value: object) -> TypeGuard[Split]:
    """Tell whether ranks of a team have parts of a tensor."""
    return isinstance(value, Split)


def whole(value: Any) -> Any:
    """Return the whole tensor of a Split, on every rank; anything else is itself."""
    if not isinstance(value, Split):
        return value
    # Several functions may take the whole of one tensor, which a write into it, or into a view of it, changes.
    made_of = torch.is_grad_enabled(), *map(writes, value.parts)
    if value.known is None or value.known[0] != made_of:
        value.known = made_of, value.team.gather(value.parts, value.at, value.blocks)
    return value.known[1]


def aligned(value: Any, like: Split, ndim: int | None = None) -> Sequence[Any]:
    """Return for each part of `like` what of another operand meets it: of a tensor the elements, else the value itself.

    Args:
        value: an operand; the trailing dims of tensors meet, as in broadcasting.
        like: the operand that decides how the result is cut.
        ndim: dims of `like` to count with; those it has by default.
    """
    if not isinstance(value, Tensor):
        return (value,) * like.team.own
    back, blocks = like.at - (like.ndim if ndim is None else ndim), like.blocks
    if isinstance(value, Split):
        if value.cut == (back, blocks):
            return value.parts
        value = whole(value)
    if value.ndim < -back or value.shape[back] == 1:
        return like.team.enter(value)
    return like.team.cut(value, value.ndim + back, blocks)


def each(func: Callable[..., Any], columns: Sequence[Sequence[Any]], **named: Sequence[Any]) -> list[Any]:
    """Call a function once for each part, with its own arguments."""
    count = len((*columns, *named.values())[0])
    return [func(*(c[i] for c in columns), **{k: c[i] for k, c in named.items()}) for i in range(count)]


def on_whole(func: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Call a function with whole tensors in place of those that are split."""
    name = getattr(func, "__name__", str(func))
    target = kwargs.get("out", args[0] if args and _writes(name) else None)
    if isinstance(target, Split):
        raise ConfigError(
            explain(
                f"{name} writes into a tensor that is split over ranks",
                where=f"{tuple(target.shape)}, cut along dim {target.at} into {target.team.parts} parts",
                why="each rank has a part of it, and this function writes across them",
                instead="torch.where(mask, a, b), torch.cat(...)   # a new tensor",
            )
        )
    args, kwargs = tree.map(whole, (args, kwargs))
    return func(*args, **kwargs)


def _writes(name: str) -> bool:
    return name == "__setitem__" or (name.endswith("_") and not name.endswith("__"))


# --- what torch is asked of the shape ---------------------------------------------------------------------------------

_KNOWN = {"shape", "dtype", "device", "ndim", "layout", "is_cuda", "is_cpu", "is_sparse", "is_quantized", "is_mps"}
_KNOWN |= {"is_meta", "is_nested", "is_mkldnn", "is_xpu", "is_complex", "itemsize", "nbytes", "names"}
_ASKED = {Tensor.size, Tensor.dim, Tensor.ndimension, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex}
_ASKED |= {Tensor.element_size, Tensor.get_device, Tensor.__hash__, Tensor.__len__, Tensor.is_signed, Tensor.stride}
_ASKED |= {torch.is_floating_point, torch.is_complex, torch.numel, torch.is_tensor, Tensor.is_contiguous}
_OF_PARTS = {"requires_grad", "is_leaf", "grad_fn", "_version"}


def _is_asked(func: Any) -> bool:
    return func in _ASKED or (getattr(func, "__name__", "") == "__get__" and _property(func) in _KNOWN)


def _property(func: Any) -> str:
    return getattr(getattr(func, "__self__", None), "__name__", "")


def _of_parts(func: Any, value: Split) -> Any:
    return func(value.parts[0])


for _name in _OF_PARTS:
    rule(getattr(Tensor, _name).__get__)(_of_parts)


@rule(getattr(Tensor, "grad").__get__)  # noqa: B009, mypy takes the property for a tensor
def _grad(func: Any, value: Split) -> None:
    return None


@rule(Tensor.new_zeros, Tensor.new_ones, Tensor.new_full, Tensor.new_empty, Tensor.new_tensor)
def _new(func: Any, value: Split, *args: Any, **kwargs: Any) -> Any:
    return func(value.parts[0], *args, **kwargs)


@functools.cache
def _body(func: types.FunctionType) -> Callable[..., Any]:
    """Return a function of `torch.nn.functional` that runs its body: what it calls is looked up in turn."""
    return undispatched(func, has_torch_function_unary=lambda x: False, has_torch_function_variadic=lambda *x: False)


# --- what cannot be seen ----------------------------------------------------------------------------------------------


def _refuse_opaque(args: Sequence[Any]) -> None:
    """Refuse what came out of an autograd function that was given a split tensor, and what runs inside of one: the
    gradients of the parts would be lost."""
    splits = [x for x in args if isinstance(x, Split)]
    with _torch.no_subclass():
        outside = any(x.requires_grad for x in splits)  # autograd knows the parts, and nothing of what has no memory
    if outside or (
        not torch.is_grad_enabled() and any(p.requires_grad for x in splits for p in x.parts) and _applied()
    ):
        raise _unseen("a torch.autograd.Function of the model")


def _applied() -> bool:
    """Tell whether an autograd function calls, and not a block under no_grad."""
    codes = set(_forwards(torch.autograd.Function))
    frame: types.FrameType | None = sys._getframe(3)
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame is not None


def _forwards(kind: type[Any]) -> Iterator[types.CodeType]:
    """Yield the code of the forward function of all autograd functions that there are."""
    functions: list[type[Any]] = kind.__subclasses__()
    for function in functions:
        forward = getattr(function, "forward", None)
        if isinstance(forward, types.FunctionType):
            yield forward.__code__
        yield from _forwards(function)


def _unseen(what: str) -> ConfigError:
    return ConfigError(
        explain(
            f"{what} was given a tensor that is split over ranks",
            where="under a plan of tensor parallelism",
            why="it sees the parts of one rank only, and the others' gradients would be missing",
            instead="split no weight whose product it is given: leave the layer out of the rules",
        )
    )


def split_of(values: Sequence[Any]) -> Split:
    """Return the first split tensor among operands."""
    return next(x for x in values if isinstance(x, Split))
