"""Sums of squares that are the same bits for any placement: exact in every order, because they are rounded before.

A square is exact in float64. Rounded to a multiple of a number that depends on the largest element and the count of the
whole tensor only, any sum of them is exact, so it does not matter who adds what first.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from purestep import _torch, transforms
from purestep.distributed._torch import foreach_copy_, foreach_norm

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
    if tensors[0].device.type == "mps":  # which has no float64
        tensors = [x.cpu() for x in tensors]
    card = _on_card(tensors)
    largest = _largest_at_once(tensors) if card else _largest(tensors)
    isnan = torch.isnan(largest)
    # A maximum over ranks may swallow a NaN, so it goes as a number of its own.
    known = reduce(torch.cat([torch.where(isnan, 0.0, largest), isnan.to(largest.dtype)]), "max")
    largest, isnan = known[: len(tensors)], known[len(tensors) :] > 0
    constants = _constants(largest, counts)
    if card:
        sums = _rounded_at_once(tensors, constants, mine)
    else:
        sums = torch.stack(
            [
                _rounded(x, c) if own else torch.zeros_like(c)
                for x, c, own in zip(tensors, constants.unbind(), mine, strict=True)
            ]
        )
    total = reduce(sums, "sum")
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
    above = exponent + _integers(tuple(bits), largest.device)
    return torch.where(largest == 0, 0.0, 1.5 * _power_of_two(exponent) * _power_of_two(above))


def _power_of_two(exponent: Tensor) -> Tensor:
    return ((exponent.clamp(-1022, 1023) + 1023) << 52).view(torch.float64)


def _rounded(values: Tensor, constant: Tensor) -> Tensor:
    flat = _real(values).reshape(-1)
    if _torch.dispatch_modes() > 0 or not flat.is_cpu:
        wide = flat.to(torch.float64)
        return ((wide * wide + constant) - constant).sum()
    buffer = torch.empty(min(_CHUNK, flat.numel()), dtype=torch.float64)
    sums = []
    for part in flat.split(_CHUNK):
        wide = buffer[: part.numel()].copy_(part)
        sums.append(wide.mul_(wide).add_(constant).sub_(constant).sum())
    return sums[0] if len(sums) == 1 else torch.stack(sums).sum()


# --- on a card, where a launch costs more than the arithmetic of a small tensor ---------------------------------------

_AT_ONCE = 1 << 25  # elements that are rounded together: two temporary buffers of 256 MiB


def _on_card(tensors: Sequence[Tensor]) -> bool:
    return not tensors[0].is_cpu and _torch.dispatch_modes() == 0 and not transforms.active()


def _largest_at_once(tensors: Sequence[Tensor]) -> Tensor:
    """Return what `_largest` does, with a few launches for all tensors of a dtype."""
    real = [_real(x) for x in tensors]
    found = torch.zeros(len(real), dtype=torch.float64, device=real[0].device)
    for dtype in dict.fromkeys(x.dtype for x in real):
        at = [i for i, x in enumerate(real) if x.dtype == dtype and x.numel()]
        if at:
            norms = torch.stack(foreach_norm([real[i] for i in at], math.inf, dtype=None)).to(torch.float64)
            found = norms if len(at) == len(real) else found.index_copy(0, _integers(tuple(at), found.device), norms)
    return found


def _rounded_at_once(tensors: Sequence[Tensor], constants: Tensor, mine: Sequence[bool]) -> Tensor:
    """Return what `_rounded` does for each tensor that is this rank's, 0 for the others. Sums are exact in any order,
    so tensors lie one after the other in one vector, and large ones are cut."""
    pieces = [
        (i, part)
        for i, (x, own) in enumerate(zip(tensors, mine, strict=True))
        if own and x.numel()
        for part in _real(x).reshape(-1).split(_AT_ONCE)
    ]
    total = torch.zeros_like(constants)
    while pieces:
        count = next((n for n in range(1, len(pieces)) if sum(len(p) for _, p in pieces[: n + 1]) > _AT_ONCE), None)
        taken, pieces = pieces[:count], pieces[len(pieces) if count is None else count :]
        lengths = [len(part) for _, part in taken]
        owners = _integers(tuple(i for i, _ in taken), constants.device)
        counts = _integers(tuple(lengths), constants.device)
        wide = torch.empty(sum(lengths), dtype=torch.float64, device=constants.device)
        foreach_copy_(list(wide.split(lengths)), [part for _, part in taken])
        constant = constants.index_select(0, owners).repeat_interleave(counts, output_size=len(wide))
        wide.mul_(wide).add_(constant).sub_(constant)
        sums = torch.segment_reduce(wide, "sum", lengths=counts, unsafe=True)
        total = total.index_add(0, owners, sums)
    return total


def _integers(values: tuple[int, ...], device: torch.device) -> Tensor:
    """Return integers on a device, copied there once; in a trace they are constants of the graph."""
    if device.type == "cpu" or transforms.active():
        return torch.tensor(values, device=device)
    if _torch.dispatch_modes() == 0:
        return _kept(values, device)
    # A copy from the host cannot be recorded in a CUDA graph; filled constants are part of a compiled kernel.
    return torch.stack([torch.full((), value, dtype=torch.int64, device=device) for value in values])


@functools.lru_cache(maxsize=256)
def _kept(values: tuple[int, ...], device: torch.device) -> Tensor:
    return torch.tensor(values, device=device)


def wide(device: torch.device) -> torch.dtype:
    """Return the widest floating dtype of a device."""
    return torch.float32 if device.type == "mps" else torch.float64


def _real(values: Tensor) -> Tensor:
    return torch.view_as_real(values) if values.is_complex() else values
