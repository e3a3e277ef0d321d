"""Rules of split tensors for views: other shapes, orders of dims, slices, and tensors put side by side."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from purestep.parallel.split_tensor import Split, aligned, each, named, rule, split, split_of
from purestep.parallel.team import Blocks


def _like(value: Split, parts: Sequence[Tensor], at: int | None = None, blocks: Blocks | None = None) -> Split:
    return split(parts, value.at if at is None else at, value.blocks if blocks is None else blocks, value.team)


# --- other shapes -----------------------------------------------------------------------------------------------------


@rule(*named("view", "reshape"))
def _view(func: Any, value: Any, *shape: Any, **kwargs: Any) -> Any:
    shape = kwargs.get("shape", kwargs.get("size", shape))
    if len(shape) == 1 and not isinstance(shape[0], int):
        shape = shape[0]
    if isinstance(shape, torch.dtype) or not isinstance(value, Split):
        return NotImplemented
    return _shaped(value, shape)


def _shaped(value: Split, shape: Sequence[int]) -> Any:
    """Return a tensor in another shape, if the parts are still parts of it along one dim."""
    shape = [int(n) for n in shape]
    if -1 in shape:
        shape[shape.index(-1)] = value.numel() // math.prod(n for n in shape if n != -1)
    found = _moved(value, shape)
    if found is None:
        return NotImplemented
    at, blocks = found
    local = [n // value.team.parts if d == at else n for d, n in enumerate(shape)]
    return _like(value, [x.reshape(local) for x in value.parts], at, blocks)


def _moved(value: Split, shape: Sequence[int]) -> tuple[int, Blocks] | None:
    """Return where in another shape the parts lie.

    Blocks of one length are a dim outside of the one that is cut, so what counts is how many elements there are outside
    of the cut: another shape has the same parts along a dim whose outer dims, and blocks, are as many.
    """
    count, parts = len(value.blocks), value.team.parts
    if len(set(value.blocks)) > 1:
        same = list(shape[: value.at + 1]) == list(value.shape[: value.at + 1])
        return (value.at, value.blocks) if same else None
    outside = math.prod(value.shape[: value.at]) * count
    best = None
    for at, length in enumerate(shape):
        before = math.prod(shape[:at])
        if before == 0 or outside % before:
            continue
        blocks = outside // before
        if length % blocks == 0 and (length // blocks) % parts == 0 and length // blocks > 0:
            best = at, (length // blocks,) * blocks
    return best


@rule(*named("flatten"))
def _flatten(func: Any, value: Any, start_dim: int = 0, end_dim: int = -1) -> Any:
    start, end = start_dim % value.ndim, end_dim % value.ndim
    return _shaped(value, [*value.shape[:start], math.prod(value.shape[start : end + 1]), *value.shape[end + 1 :]])


@rule(*named("unflatten"))
def _unflatten(func: Any, value: Any, dim: int, sizes: Sequence[int]) -> Any:
    dim, sizes = dim % value.ndim, list(sizes)
    if -1 in sizes:
        sizes[sizes.index(-1)] = value.shape[dim] // math.prod(n for n in sizes if n != -1)
    return _shaped(value, [*value.shape[:dim], *sizes, *value.shape[dim + 1 :]])


@rule(*named("view_as", "reshape_as"))
def _view_as(func: Any, value: Any, other: Tensor) -> Any:
    return _shaped(value, other.shape) if isinstance(value, Split) else func(value, torch.empty(other.shape))


@rule(*named("unsqueeze"))
def _unsqueeze(func: Any, value: Any, dim: int) -> Any:
    dim %= value.ndim + 1
    return _like(value, [x.unsqueeze(dim) for x in value.parts], value.at + (dim <= value.at))


@rule(*named("squeeze"))
def _squeeze(func: Any, value: Any, dim: Any = None) -> Any:
    dims = range(value.ndim) if dim is None else (dim,) if isinstance(dim, int) else dim
    gone = tuple(d % value.ndim for d in dims if value.shape[d] == 1)
    return _like(value, [x.squeeze(gone) for x in value.parts], value.at - sum(d < value.at for d in gone))


@rule(*named("expand", "broadcast_to", "expand_as"))
def _expand(func: Any, value: Any, *sizes: Any) -> Any:
    if not isinstance(value, Split):
        return func(value, sizes[0].shape) if func is not Tensor.expand_as else value.expand(sizes[0].shape)
    shape = list(sizes[0].shape if isinstance(sizes[0], Tensor) else sizes[0] if len(sizes) == 1 else sizes)
    if isinstance(shape[0] if shape else 0, (list, tuple)):
        shape = list(shape[0])
    at = value.at + len(shape) - value.ndim
    shape[at] = -1
    return _like(value, [x.expand(shape) for x in value.parts], at)


@rule(*named("repeat_interleave"))
def _repeat_interleave(func: Any, value: Any, repeats: Any, dim: int | None = None, **kwargs: Any) -> Any:
    if not isinstance(value, Split) or not isinstance(repeats, int) or dim is None or kwargs:
        return NotImplemented
    # Each element is followed by its copies, so parts stay parts.
    blocks = tuple(n * repeats for n in value.blocks) if dim % value.ndim == value.at else value.blocks
    return _like(value, [x.repeat_interleave(repeats, dim) for x in value.parts], None, blocks)


# --- other orders of dims ---------------------------------------------------------------------------------------------


def _permuted(value: Split, order: Sequence[int]) -> Split:
    order = [d % value.ndim for d in order]
    return _like(value, [x.permute(order) for x in value.parts], order.index(value.at))


@rule(*named("permute"))
def _permute(func: Any, value: Any, *dims: Any, **kwargs: Any) -> Any:
    dims = kwargs.get("dims", dims)
    return _permuted(value, dims[0] if len(dims) == 1 and not isinstance(dims[0], int) else dims)


@rule(*named("transpose", "swapaxes", "swapdims"))
def _transpose(
    func: Any, value: Any, a: int = 0, b: int = 1, *, dim0: int | None = None, dim1: int | None = None
) -> Any:
    order = list(range(value.ndim))
    a, b = a if dim0 is None else dim0, b if dim1 is None else dim1
    order[a], order[b] = order[b], order[a]
    return _permuted(value, order)


@rule(*named("t"), Tensor.T.__get__, Tensor.mT.__get__)  # type: ignore[attr-defined]
def _last_two(func: Any, value: Any) -> Any:
    if value.ndim != 2 and func in (Tensor.T.__get__, Tensor.t):  # type: ignore[attr-defined]
        return NotImplemented
    return _transpose(func, value, -2, -1)


@rule(*named("movedim", "moveaxis"))
def _movedim(func: Any, value: Any, source: Any, destination: Any) -> Any:
    order = list(torch.empty(tuple(range(2, value.ndim + 2)), device="meta").movedim(source, destination).shape)
    return _permuted(value, [n - 2 for n in order])


# --- slices -----------------------------------------------------------------------------------------------------------


def section(value: Split, dim: int, start: int, length: int) -> Any:
    """Return a run along a dim; along the one that is cut, if it is a run of whole blocks."""
    dim %= value.ndim
    if dim != value.at:
        return _like(value, [x.narrow(dim, start, length) for x in value.parts])
    edges = [sum(value.blocks[:i]) for i in range(len(value.blocks) + 1)]
    if start not in edges or start + length not in edges or not length:
        return NotImplemented
    blocks, parts = value.blocks[edges.index(start) : edges.index(start + length)], value.team.parts
    return _like(value, [x.narrow(dim, start // parts, length // parts) for x in value.parts], None, blocks)


@rule(*named("narrow"))
def _narrow(func: Any, value: Any, dim: int, start: Any, length: int) -> Any:
    return section(value, dim, start % value.shape[dim], length) if isinstance(start, int) else NotImplemented


@rule(*named("split", "split_with_sizes", "chunk"))
def _sections(func: Any, value: Any, sizes: Any, dim: int = 0) -> Any:
    total = value.shape[dim]
    if isinstance(sizes, int):
        step = -(-total // sizes) if func.__name__ == "chunk" else sizes
        sizes = [min(step, total - start) for start in range(0, total, step)]
    found, start = [], 0
    for length in sizes:
        found.append(section(value, dim, start, length))
        start += length
    return NotImplemented if any(x is NotImplemented for x in found) else tuple(found)


@rule(*named("unbind"))
def _unbind(func: Any, value: Any, dim: int = 0) -> Any:
    return (
        NotImplemented
        if dim % value.ndim == value.at
        else tuple(_select(func, value, dim, i) for i in range(value.shape[dim]))
    )


@rule(Tensor.__iter__)
def _iter(func: Any, value: Any) -> Any:
    return NotImplemented if value.at == 0 else iter(_unbind(func, value))


@rule(*named("select"))
def _select(func: Any, value: Any, dim: int, index: Any) -> Any:
    dim %= value.ndim
    if dim == value.at or not isinstance(index, int):
        return NotImplemented
    return _like(value, [x.select(dim, index) for x in value.parts], value.at - (dim < value.at))


@rule(Tensor.__getitem__)
def _getitem(func: Any, value: Any, index: Any) -> Any:
    entries = list(index) if isinstance(index, tuple) else [index]
    if not isinstance(value, Split) or not all(
        x is None or x is Ellipsis or isinstance(x, (int, slice)) for x in entries
    ):
        return NotImplemented
    taken = sum(x is not None and x is not Ellipsis for x in entries)
    rest = [slice(None)] * (value.ndim - taken)
    if Ellipsis in entries:
        place = entries.index(Ellipsis)
        entries[place : place + 1] = rest
    else:
        entries += rest
    # From the last dim to the first, so that a dim that goes leaves the numbers of those before it.
    numbers, dim = [], 0
    for entry in entries:
        numbers.append(dim)
        dim += entry is not None
    result: Any = value
    for entry, d in reversed(list(zip(entries, numbers, strict=True))):
        if result is NotImplemented:
            return result
        if entry is None:
            result = _unsqueeze(func, result, d)
        elif isinstance(entry, int):
            result = _select(func, result, d, entry)
        elif entry != slice(None):
            result = _sliced(result, d, entry)
    return result


def _sliced(value: Split, dim: int, entry: slice) -> Any:
    start, stop, step = entry.indices(value.shape[dim])
    if step == 1:
        return section(value, dim, start, max(stop - start, 0))
    if dim == value.at:
        return NotImplemented
    index = (slice(None),) * dim + (entry,)
    return _like(value, [x[index] for x in value.parts])


# --- side by side -----------------------------------------------------------------------------------------------------


@rule(*named("cat", "concat", "concatenate"))
def _cat(func: Any, tensors: Sequence[Any], dim: int = 0, **kwargs: Any) -> Any:
    # An empty tensor [0] beside others of more dims, with which caches of keys and values begin, counts for nothing.
    tensors = [x for x in tensors if tuple(x.shape) != (0,)]
    like = split_of(tensors)
    if dim % like.ndim == like.at or kwargs or any(x.ndim != like.ndim for x in tensors):
        return NotImplemented
    outs = each(lambda *parts: torch.cat(parts, dim), [aligned(x, like) for x in tensors])
    return _like(like, outs)


@rule(*named("stack"))
def _stack(func: Any, tensors: Sequence[Any], dim: int = 0, **kwargs: Any) -> Any:
    if kwargs:
        return NotImplemented
    like = split_of(tensors)
    dim %= like.ndim + 1
    outs = each(lambda *parts: torch.stack(parts, dim), [aligned(x, like) for x in tensors])
    return _like(like, outs, like.at + (dim <= like.at))
