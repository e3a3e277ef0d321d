"""A function of elements over lists of small tensors on a device: a few kernels in place of one for each tensor.

The tensors are copied into one flat tensor, the function computes all elements at once, and the results are copied into
tensors of their own. Each element goes through the same operations, so bits do not change. Large tensors, of which the
arithmetic takes longer than a launch, are computed one by one, and so are all on the CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from purestep.optim import _torch as kernels

_SMALL = 1 << 16  # elements from which a kernel takes longer than its launch
_FEW = 6  # tensors up to which packing, computing and copying take as many launches

Lists = Sequence[Sequence[Tensor]]


def elementwise(
    function: Callable[..., Tensor], lists: Lists, factors: Sequence[Tensor] | None = None, *, reuse: bool = False
) -> list[Tensor]:
    """Return `function(x, y, ...)` of the tensors at each place of some lists; the caller knows that they are plain.

    Args:
        function: computes each element of its result from those elements of its arguments.
        lists: lists of one length; the tensors at one place have one shape.
        factors: 0-d tensors, one for each place, which the function takes last.
        reuse: whether the results overwrite the tensors of the first list.

    Examples:
        >>> elementwise(torch.add, [[torch.ones(2)], [torch.ones(2)]])
        [tensor([2., 2.])]
    """
    rows = list(zip(*lists, strict=True))
    given = rows if factors is None else [(*row, factor) for row, factor in zip(rows, factors, strict=True)]
    found: list[Tensor | None] = [None] * len(rows)
    for at in _groups(rows, given):
        columns = list(zip(*(rows[i] for i in at), strict=True))
        shapes = [x.shape for x in columns[0]]
        lengths = [shape.numel() for shape in shapes]
        flats = [torch.cat([x.reshape(-1) for x in column]) for column in columns]
        if factors is not None:
            flats.append(_spread(torch.stack([factors[i] for i in at]), lengths))
        flat = function(*flats)
        made = list(columns[0]) if reuse else [torch.empty_like(x, dtype=flat.dtype) for x in columns[0]]
        pieces = zip(flat.split(lengths), shapes, strict=True)
        kernels.foreach_copy_(made, [piece.view(shape) for piece, shape in pieces])
        for i, x in zip(at, made, strict=True):
            found[i] = x
    return [_one(function, given[i], reuse) if x is None else x for i, x in enumerate(found)]


def _one(function: Callable[..., Tensor], row: Sequence[Tensor], reuse: bool) -> Tensor:
    result = function(*row)
    return row[0].copy_(result) if reuse and result is not row[0] else result


def _groups(rows: Sequence[Sequence[Tensor]], given: Sequence[Sequence[Tensor]]) -> list[list[int]]:
    """Return the positions of small tensors that are computed together: of the same dtypes on one device."""
    groups: dict[object, list[int]] = {}
    for i, (x, *others) in enumerate(rows):
        alike = all(y.shape == x.shape and y.device == x.device for y in others)
        if alike and _gains(x):
            groups.setdefault((x.device, *(y.dtype for y in given[i])), []).append(i)
    return [at for at in groups.values() if len(at) > _FEW]


def _gains(x: Tensor) -> bool:
    """Tell whether a launch for this tensor costs more than its copy into a flat one."""
    return not x.is_cpu and 0 < x.numel() <= _SMALL and x.is_contiguous()


def _spread(numbers: Tensor, lengths: Sequence[int]) -> Tensor:
    """Return each of some numbers so many times as its tensor has elements."""
    counts = _counts(tuple(lengths), numbers.device)
    return torch.repeat_interleave(numbers, counts, output_size=sum(lengths))


@functools.lru_cache(maxsize=64)
def _counts(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(lengths, device=device)
