"""Shapes of calls on meta tensors from the CPU kernels themselves, where those are quick.

Torch computes the shapes of meta tensors with Python kernels, which import sympy and Dynamo: 1.4 CPU seconds of a
process that compiles nothing. Within `small_kernels` a call is instead run on zeros of its shapes, and the caller gets
meta tensors of the shapes that came out; of an elementwise call one element is enough. What is large, depends on values
or fails is left to torch's kernels, and the imports are paid there. Nothing of torch is changed, and other threads see
nothing of it. `dry_run` uses it.
"""

from __future__ import annotations

import math
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from purestep import _torch

_ELEMENTS = 1 << 24  # of the arguments or the result of a call: 64 MB, for as long as the call takes
_WORK = 1 << 30  # multiplications, roughly: 50 ms of one core
_SECONDS = 0.5  # of the CPU, in all calls of one dry run: a third of what the imports cost
_META, _CPU = torch.device("meta"), torch.device("cpu")

_BY_VALUE = frozenset({torch.Tag.data_dependent_output, torch.Tag.dynamic_output_shape})
# Elementwise, though torch has no such tag on them.
_COPIES = frozenset("_to_copy copy_ fill_ zero_ empty_like zeros_like ones_like full_like".split())
_EMPTY = frozenset({"empty", "empty_strided"})
_REDUCTIONS = ("_foreach_norm", "_foreach_max")
# A product of (m, k) and (k, n) is m * k * n multiplications.
_PRODUCTS = frozenset(
    "mm bmm addmm baddbmm mv addmv dot vdot convolution convolution_backward _cdist_forward _cdist_backward".split()
)
_LOOKUPS = frozenset("embedding index_select index".split())
# Calls whose lists of numbers say how large the result is.
_SIZED = ("repeat", "upsample_", "new_", "constant_pad", "reflection_pad", "replication_pad", "im2col", "col2im")


class small_kernels(_torch.DispatchMode):
    """Compute shapes with CPU kernels on zeros while active, where that is quick."""

    def __init__(self) -> None:
        super().__init__()
        self._left = _SECONDS

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        # Torch would wrap the method below so that Dynamo leaves it alone, and import Dynamo to do so.
        return False

    def __torch_dispatch__(
        self, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        # A call that comes here has passed the function modes. What it is answered with may not go through them again:
        # an operation that TorchScript hid from `random.torch_mode` would be refused there.
        with _torch.no_torch_function():
            return self._answer(func, args, kwargs or {})

    def _answer(self, func: _torch.OpOverload, args: tuple[object, ...], kwargs: dict[str, object]) -> object:
        if self._left > 0 and _is_answered_by_zeros(func, args, kwargs):
            began = time.thread_time()
            try:
                if _is_elementwise(func, args, kwargs):
                    return _Call(func, elementwise=True).shapes(args, kwargs)
                if _is_quick(func, args, kwargs):
                    return _Call(func, elementwise=False).shapes(args, kwargs)
            except Exception:  # zeros may be what it cannot do, and the words for what it refuses are those of torch
                pass
            finally:
                self._left -= time.thread_time() - began
        return func(*args, **kwargs)


# --- which calls ------------------------------------------------------------------------------------------------------


def _values(args: tuple[Any, ...], kwargs: Mapping[str, object]) -> Iterator[object]:
    """The arguments of a call, with those that are in lists."""
    for value in (*args, *kwargs.values()):
        if isinstance(value, (list, tuple)):
            yield from value
        else:
            yield value


def _tensors(args: tuple[Any, ...], kwargs: Mapping[str, object]) -> list[Tensor]:
    return [value for value in _values(args, kwargs) if isinstance(value, Tensor)]


def _is_answered_by_zeros(func: _torch.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, object]) -> bool:
    """Tell whether the CPU kernel says of zeros what torch's kernel says of meta tensors."""
    # Views and new memory are C++ on meta tensors too; and a view has to share their storage.
    if not isinstance(func, _torch.OpOverload) or func.is_view or func.overloadpacket.__name__ in _EMPTY:
        return False
    if _depends_on_values(func, args):
        return False
    meta = False
    for value in _values(args, kwargs):
        if isinstance(value, Tensor):
            if type(value) not in (Tensor, nn.Parameter) or value.layout is not torch.strided:
                return False
            if value.is_meta:
                meta = True
            elif value.dim() or _torch.schema_of(func).is_mutable:
                return False  # whether real numbers may be mixed in is for torch's kernel to say
        elif isinstance(value, torch.Generator):
            return False  # it would be drawn from
        elif isinstance(value, torch.device):
            if value != _META:
                return False
            meta = True
    return meta


def _depends_on_values(func: _torch.OpOverload, args: tuple[Any, ...]) -> bool:
    """Tell whether the shape of the result depends on the numbers in a tensor."""
    if func.overloadpacket is torch.ops.aten.index:
        return any(x is not None and x.dtype in (torch.bool, torch.uint8) for x in args[1])
    return not _BY_VALUE.isdisjoint(func.tags)


def _is_elementwise(func: _torch.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, object]) -> bool:
    """Tell whether each result is laid out like the first argument, or like the tensors of the first list."""
    name = func.overloadpacket.__name__
    if kwargs.get("memory_format", torch.preserve_format) is not torch.preserve_format:
        return False
    lists = [x for x in (*args, *kwargs.values()) if isinstance(x, (list, tuple)) and isinstance((*x, None)[0], Tensor)]
    if lists:
        same = all(_alike(row) for row in zip(*lists, strict=False)) and len({len(x) for x in lists}) == 1
        return name.startswith("_foreach_") and not name.startswith(_REDUCTIONS) and same
    elementwise = torch.Tag.pointwise in func.tags or name in _COPIES
    return elementwise and bool(args) and isinstance(args[0], Tensor) and _alike(_tensors(args, kwargs))


def _alike(tensors: Sequence[Tensor]) -> bool:
    """Tell whether tensors, scalars left out, have one shape and are contiguous."""
    first = tensors[0]
    return all(x.is_contiguous() and x.shape == first.shape for x in tensors if x.dim() or x is first)


def _is_quick(func: _torch.OpOverload, args: tuple[Any, ...], kwargs: Mapping[str, object]) -> bool:
    """Tell whether a call needs little memory and time for real."""
    name, tensors = func.overloadpacket.__name__, _tensors(args, kwargs)
    total = sum(_span(x) for x in tensors)
    if total > _ELEMENTS:
        return False
    if name in _PRODUCTS:
        *_, first, second = sorted(tensors, key=Tensor.numel)
        return first.numel() * second.numel() // max({1, *first.shape} & {1, *second.shape}) <= _WORK
    if name in _LOOKUPS:
        return math.prod(tensors[0].shape[1:]) * sum(x.numel() for x in tensors[1:]) <= _ELEMENTS
    if "linalg" in name:
        return 8 * total * max((n for x in tensors for n in x.shape), default=1) <= _WORK
    if not tensors or name.startswith(_SIZED):
        numbers = [x for x in _values(args, kwargs) if isinstance(x, (int, float)) and math.isfinite(x)]
        return math.prod(max(int(abs(x)), 1) for x in numbers) * max(total, 1) <= _ELEMENTS
    return _broadcast([x.shape for x in tensors]) <= _ELEMENTS or torch.Tag.pointwise not in func.tags


def _span(tensor: Tensor) -> int:
    """How many elements lie between the first and the last one of a tensor."""
    return 1 + sum((n - 1) * stride for n, stride in zip(tensor.shape, tensor.stride(), strict=True) if n)


def _broadcast(shapes: Sequence[torch.Size]) -> int:
    longest = max(map(len, shapes))
    return math.prod(map(max, zip(*[(1,) * (longest - len(shape)) + shape for shape in shapes], strict=True)))


# --- one call ---------------------------------------------------------------------------------------------------------


class _Call:
    """One call: zeros in the place of meta tensors, and meta tensors in the place of what comes out.

    Args:
        func: the operator.
        elementwise: whether one element stands for all of a tensor.
    """

    def __init__(self, func: _torch.OpOverload, *, elementwise: bool) -> None:
        self._func, self._elementwise = func, elementwise
        self._zeros: list[tuple[Tensor, Tensor]] = []  # with the meta tensor that each is for

    def shapes(self, args: tuple[object, ...], kwargs: Mapping[str, object]) -> object:
        """Return what the call returns, as meta tensors."""
        returned = self._func(*map(self._real, args), **{name: self._real(x) for name, x in kwargs.items()})
        if isinstance(returned, (list, tuple)):
            return [self._meta(x, index) for index, x in enumerate(returned)]
        return self._meta(returned, 0)

    def _real(self, value: object) -> object:
        if isinstance(value, (list, tuple)):
            return [self._real(x) for x in value]
        if not isinstance(value, Tensor):
            return _CPU if isinstance(value, torch.device) else value
        if not value.is_meta:
            return value
        if self._elementwise:
            made = torch.zeros((1,) * value.dim(), dtype=value.dtype, device=_CPU)
        else:
            made = torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_CPU).zero_()
        self._zeros.append((made, value))
        return made

    def _meta(self, value: object, index: int) -> object:
        if isinstance(value, (list, tuple)):
            return [self._meta(x, i) for i, x in enumerate(value)]
        if not isinstance(value, Tensor):
            return value
        for made, meta in self._zeros:
            if value is made:
                return meta  # it was written in place
            if value.numel() and value.untyped_storage().data_ptr() == made.untyped_storage().data_ptr():
                return meta.as_strided(value.shape, value.stride(), meta.storage_offset() + value.storage_offset())
        like = self._zeros[index][1] if self._elementwise else value
        return torch.empty_strided(like.shape, like.stride(), dtype=value.dtype, device=_META)
