"""Sums of squares that are the same bits for any placement: exact in every order, because they are rounded before.

A square is exact in float64. Rounded to a multiple of a number that depends on the largest element and the count of the
whole tensor only, any sum of them is exact, so it does not matter who adds what first.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from purestep import _torch

Reduce = Callable[[Tensor, str], Tensor]
_CHUNK = 1 << 15  # elements: few enough that all passes over them stay in a core's cache


def squares(tensors: Sequence[Tensor], counts: Sequence[int], mine: Sequence[bool], reduce: Reduce) -> Tensor:
    """Return the sum of squares of each tensor, float64 [len(tensors)]; NaN or infinity where it holds one.

    Args:
        tensors: local parts.
        counts: elements of each whole tensor.
        mine: whether this rank contributes its part: of several that hold the same, one does.
        reduce: `(values, "max" or "sum")` over all ranks that hold parts.

    Examples:
        >>> alone = lambda values, op: values
        >>> whole = squares([torch.tensor([1e-3, 3.0, 4.0])], [3], [True], alone)
        >>> told = lambda values, op: torch.tensor([4.0, 0.0]).double() if op == "max" else values
        >>> parts = [squares([x], [3], [True], told) for x in (torch.tensor([1e-3]), torch.tensor([3.0, 4.0]))]
        >>> bool(whole == parts[0] + parts[1])
        True
    """
    largest = _largest(tensors)
    isnan = torch.isnan(largest)
    # A maximum over ranks may swallow a NaN, so it goes as a number of its own.
    known = reduce(torch.cat([torch.where(isnan, 0.0, largest), isnan.to(largest.dtype)]), "max")
    largest, isnan = known[: len(tensors)], known[len(tensors) :] > 0
    constants = _constants(largest, counts)
    sums = [
        _rounded(x, c) if own else torch.zeros_like(c)
        for x, c, own in zip(tensors, constants.unbind(), mine, strict=True)
    ]
    total = reduce(torch.stack(sums), "sum")
    return torch.where(isnan, math.nan, torch.where(torch.isinf(largest), math.inf, total))


def _largest(tensors: Sequence[Tensor]) -> Tensor:
    # One pass each; the norm of order infinity would say the same, and takes ten times as long on a CPU.
    found = []
    for x in map(_real, tensors):
        low, high = torch.aminmax(x) if x.numel() else (x.new_zeros(()), x.new_zeros(()))
        found.append(torch.maximum(high, -low).to(torch.float64))
    return torch.stack(found)


def _constants(largest: Tensor, counts: Sequence[int]) -> Tensor:
    """Return for each tensor the number whose addition and subtraction rounds squares to a fixed multiple.

    With squares up to 4**e and n of them, `1.5 * 2**(2 e + log2 n)` leaves their sum below one bit more than it has.
    """
    # Exponents are read from and written into the bits: Inductor's vector code for frexp does not compile (torch 2.13).
    exponent = ((largest.view(torch.int64) >> 52) & 0x7FF) - 1022
    bits = [max(1, n - 1).bit_length() + 1 for n in counts]
    above = exponent + torch.tensor(bits, device=largest.device)
    return torch.where(largest == 0, 0.0, 1.5 * _power_of_two(exponent) * _power_of_two(above))


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent.clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def _rounded(values: Tensor, constant: Tensor) -> Tensor:
    flat = _real(values).reshape(-1)
    if _torch.dispatch_modes() > 0 or flat.is_cuda:
        wide = flat.to(torch.float64)
        return ((wide * wide + constant) - constant).sum()
    buffer = torch.empty(min(_CHUNK, flat.numel()), dtype=torch.float64)
    sums = []
    for part in flat.split(_CHUNK):
        wide = buffer[: part.numel()].copy_(part)
        sums.append(wide.mul_(wide).add_(constant).sub_(constant).sum())
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


def _real(values: Tensor) -> Tensor:
    return torch.view_as_real(values) if values.is_complex() else values
