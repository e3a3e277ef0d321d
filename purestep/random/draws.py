"""Draws from a key: bits, and the distributions made of them.

Every draw is a function of (key, position of the element), so `index=` gives any part of a larger draw. The dtypes are
those asked for; the arithmetic is exact or in float64. On a CUDA card `card` makes a whole draw in one kernel, of the
same bits; what traces and batches are the operations that are written out here.
"""

from __future__ import annotations

import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from purestep.arguments import Device, checked
from purestep.errors import KeyShapeError, explain
from purestep.random import card
from purestep.random.keys import check_key, is_host
from purestep.random.philox import DRAW, MASK, philox, philox_numpy

_FLOAT_BITS = {torch.float16: 11, torch.bfloat16: 8, torch.float32: 24, torch.float64: 53}


def _source(
    key: Tensor, shape: Sequence[int], index: Tensor | None, device: Device | None
) -> tuple[Tensor, card.Draw | None]:
    """Return the key where it is drawn from, and what draws in one kernel: None where operations do."""
    check_key(key)
    if index is not None and (index.dtype != torch.int64 or tuple(index.shape) != tuple(shape)):
        raise KeyShapeError(
            explain(
                "index= gives the position of each element in the larger draw, so it has the shape of the draw",
                where=f"index: {index.dtype}{list(index.shape)}, shape: {list(shape)}",
                instead="index=torch.arange(start, stop).reshape(shape)",
            )
        )
    target = key.device if device is None else torch.device(device)
    if card.draws(target, key, *(() if index is None else (index,))):
        return key, card.Draw(key, shape, index, target)
    return (key if device is None else key.to(target)), None


def _words(
    key: Tensor, shape: Sequence[int], index: Tensor | None, per_element: int, device: Device | None
) -> tuple[Tensor, ...]:
    """Return `per_element` (1 or 2) words for each element; element i uses words i * per_element and following."""
    key, kernel = _source(key, shape, index, device)
    if kernel is not None:
        return kernel.words(per_element)
    if index is None:
        count = math.prod(shape)
        blocks = -(-count * per_element // 4)
        if is_host(key):
            words = torch.from_numpy(philox_numpy(blocks, tuple(key.tolist())))
        else:
            counter = torch.arange(blocks, device=key.device)
            words = torch.stack(philox((counter, 0, 0, DRAW), (key[0], key[1])), dim=-1).reshape(-1)
        words = words[: count * per_element].reshape(*shape, per_element)
    else:
        position = index * per_element
        block, lane = position // 4, position % 4
        words = torch.stack(philox((block & MASK, (block >> 32) & MASK, 0, DRAW), (key[0], key[1])), dim=-1)
        lanes = torch.stack([lane + i for i in range(per_element)], dim=-1)
        words = words.gather(-1, lanes)
    return tuple(words[..., i] for i in range(per_element))


@checked(KeyShapeError, failed=True)
def bits(
    key: Tensor, shape: Sequence[int] = (), *, index: Tensor | None = None, device: Device | None = None
) -> Tensor:
    """Draw 32 uniform random bits an element.

    Args:
        key: int64[2]. Use a key for one draw only; fold or split to get more.
        shape: shape of the result.
        index: int64 tensor of that shape: which elements of a larger (flat) draw these are. By default 0, 1, 2, ...
            `bits(key, (100,))[10:20]` equals `bits(key, (10,), index=torch.arange(10, 20))`. All draws take it.
        device: where to draw; by default where the key is. The bits are the same everywhere. A key on the host is best
            also for draws on a card: it is folded in Python, and one kernel makes the draw.

    Returns:
        int64 tensor of values in [0, 2**32).

    Examples:
        >>> from purestep.random import key
        >>> bits(key(0), (2,))
        tensor([1713891541, 3781805453])
    """
    return _words(key, shape, index, 1, device)[0]


@checked(KeyShapeError, failed=True)
def uniform(
    key: Tensor,
    shape: Sequence[int] = (),
    *,
    minval: float | Tensor = 0.0,
    maxval: float | Tensor = 1.0,
    dtype: torch.dtype = torch.float32,
    index: Tensor | None = None,
    device: Device | None = None,
) -> Tensor:
    """Draw from the uniform distribution on [minval, maxval), with as many random bits as the significand of dtype
    holds.

    Raises:
        KeyShapeError: the range is empty, or the dtype is not a floating one.

    Examples:
        >>> from purestep.random import key
        >>> uniform(key(0), (3,))
        tensor([0.3990, 0.8805, 0.7357])
    """
    width = _float_bits(dtype)
    key, kernel = _source(key, shape, index, device)
    if kernel is not None:
        unit = kernel.uniform(dtype, width)
    elif width == 53:
        high, low = _words(key, shape, index, 2, None)
        unit = ((high << 21) | (low >> 11)).to(dtype) * 2.0**-53
    else:
        unit = (bits(key, shape, index=index) >> (32 - width)).to(dtype) * 2.0**-width
    if isinstance(minval, float | int) and isinstance(maxval, float | int):
        if (minval, maxval) == (0, 1):
            return unit
        if not minval < maxval:
            raise KeyShapeError(
                explain(
                    "uniform draws from [minval, maxval), which is empty", where=f"minval={minval}, maxval={maxval}"
                )
            )
    if isinstance(minval, complex) or isinstance(maxval, complex):
        raise KeyShapeError(explain("uniform draws real numbers", where=f"minval={minval!r}, maxval={maxval!r}"))
    scaled = (unit * (maxval - minval) + minval).to(dtype)
    # Rounding can reach maxval. What it adds there is what it takes from minval, so it goes there.
    return torch.where(scaled < maxval, scaled, minval.to(dtype) if isinstance(minval, Tensor) else minval)


def _float_bits(dtype: torch.dtype) -> int:
    if dtype not in _FLOAT_BITS:
        raise KeyShapeError(
            explain(
                f"no draw of dtype {dtype}",
                why=f"the floating dtypes are {', '.join(str(d).removeprefix('torch.') for d in _FLOAT_BITS)}",
                instead="draw in float32 and cast the result",
            )
        )
    return _FLOAT_BITS[dtype]


@checked(KeyShapeError, failed=True)
def normal(
    key: Tensor,
    shape: Sequence[int] = (),
    *,
    dtype: torch.dtype = torch.float32,
    index: Tensor | None = None,
    device: Device | None = None,
) -> Tensor:
    """Draw from the standard normal distribution, by the Box-Muller transform in float64.

    Magnitudes reach 6.66, the limit of 32-bit uniforms. Rounding to `dtype` comes last.

    Examples:
        >>> from purestep.random import key
        >>> normal(key(0), (3,))
        tensor([ 0.9911, -0.6176, -0.1536])
    """
    _float_bits(dtype)
    key, kernel = _source(key, shape, index, device)
    if kernel is not None:
        return kernel.normal(dtype)
    first, second = _words(key, shape, index, 2, None)
    radius = torch.sqrt(-2.0 * torch.log((first + 1).to(torch.float64) * 2.0**-32))
    return (radius * torch.cos(second.to(torch.float64) * (2.0 * math.pi * 2.0**-32))).to(dtype)


@checked(KeyShapeError, failed=True)
def bernoulli(
    key: Tensor,
    p: float | Tensor = 0.5,
    shape: Sequence[int] | None = None,
    *,
    index: Tensor | None = None,
    device: Device | None = None,
) -> Tensor:
    """Draw booleans that are True with probability `p` (to 2**-32).

    A probability in a tensor is not checked, because that would read it on the host.

    Args:
        key: int64[2].
        p: probability, a number or a tensor that broadcasts to `shape`.
        shape: shape of the result; that of `p` by default.
        index, device: see `bits`.

    Raises:
        KeyShapeError: `p` is a number outside [0, 1].

    Examples:
        >>> from purestep.random import key
        >>> bernoulli(key(0), 0.5, (4,))
        tensor([ True, False, False, False])
    """
    if shape is None:
        shape = p.shape if isinstance(p, Tensor) else ()
    if isinstance(p, Tensor):
        threshold: Any = torch.round(p.to(torch.float64) * 2.0**32).to(torch.int64)
    elif not 0.0 <= p <= 1.0:
        raise KeyShapeError(explain("a probability lies in [0, 1]", where=f"p={p}"))
    else:
        threshold = _threshold(float(p))
        key, kernel = _source(key, shape, index, device)
        if kernel is not None:
            return kernel.mask(threshold)
    return _words(key, shape, index, 1, device)[0] < threshold


@checked(KeyShapeError, failed=True)
def randint(
    key: Tensor,
    shape: Sequence[int] = (),
    low: int = 0,
    high: int = 2**31,
    *,
    index: Tensor | None = None,
    device: Device | None = None,
) -> Tensor:
    """Draw integers from [low, high), with a bias below (high - low) / 2**63.

    Raises:
        KeyShapeError: the range is empty, or wider than int64 can count.

    Examples:
        >>> from purestep.random import key
        >>> randint(key(0), (3,), 0, 10)
        tensor([4, 4, 1])
    """
    if not (isinstance(low, int) and isinstance(high, int)):
        raise KeyShapeError(explain("randint draws integers between integers", where=f"low={low!r}, high={high!r}"))
    if not low < high:
        raise KeyShapeError(explain("randint draws from [low, high), which is empty", where=f"low={low}, high={high}"))
    if low < -(2**63) or high > 2**63 or high - low >= 2**63:
        raise KeyShapeError(
            explain(
                "randint draws int64 values from less than 2**63 of them",
                where=f"low={low}, high={high}",
                instead="ps.random.bits(key, shape)   # 32 random bits an element",
            )
        )
    first, second = _words(key, shape, index, 2, device)
    return ((first << 31) | (second >> 1)) % (high - low) + low


@checked(KeyShapeError, failed=True)
def permutation(key: Tensor, x: int | Tensor, *, device: Device | None = None) -> Tensor:
    """Return a random permutation of `range(x)`, or of the rows of `x`, which stay on their device.

    Examples:
        >>> from purestep.random import key
        >>> permutation(key(0), 5)
        tensor([4, 3, 1, 0, 2])
    """
    n = x.shape[0] if isinstance(x, Tensor) else operator.index(x)
    order = torch.argsort(randint(key, (n,), 0, 2**62, device=device), stable=True)
    return x[order.to(x.device)] if isinstance(x, Tensor) else order


@checked(KeyShapeError, failed=True)
def categorical(
    key: Tensor, logits: Tensor, *, dim: int = -1, shape: Sequence[int] | None = None, index: Tensor | None = None
) -> Tensor:
    """Draw indices with probability softmax(logits) along `dim`, by the Gumbel-max trick.

    Args:
        key: int64[2].
        logits: floating tensor of unnormalised log probabilities.
        dim: the dim that is drawn from.
        shape: leading batch shape to draw in addition to the shape of `logits` without `dim`; none by default.
        index: positions of the underlying uniforms, of shape `shape + logits.shape`; see `bits`.

    Returns:
        int64 tensor.

    Examples:
        >>> from purestep.random import key
        >>> categorical(key(0), torch.tensor([0.0, 100.0, 0.0]))
        tensor(1)
    """
    full = (*(shape or ()), *logits.shape)
    unit = (bits(key, full, index=index, device=logits.device).to(torch.float64) + 0.5) * 2.0**-32
    return torch.argmax(logits - torch.log(-torch.log(unit)), dim=dim if dim < 0 else dim + len(full) - logits.ndim)


@checked(KeyShapeError, failed=True)
def dropout(key: Tensor, x: Tensor, rate: float, *, index: Tensor | None = None) -> Tensor:
    """Zero each element of `x` with probability `rate` and scale the others by 1 / (1 - rate).

    The mask is drawn on the device of `x`, wherever the key is.

    Examples:
        >>> from purestep.random import key
        >>> dropout(key(0), torch.ones(4), 0.5)
        tensor([0., 2., 2., 2.])
    """
    if not 0.0 <= rate <= 1.0:
        raise KeyShapeError(explain("a dropout rate lies in [0, 1]", where=f"rate={rate}"))
    if rate == 0.0:
        return x
    if rate == 1.0:
        return x.masked_fill(
            torch.ones((), dtype=torch.bool, device=x.device), 0.0
        )  # a part of the graph, with gradient 0
    scale = 1.0 / (1.0 - rate)
    if index is None and x.dtype in card.FLOATS and card.draws(x.device, key, x):
        check_key(key)
        return card.dropout(key, x, _threshold(rate), scale)
    drop = bernoulli(key, rate, x.shape, index=index, device=x.device)
    return torch.where(drop, 0.0, x * scale)


def _threshold(p: float) -> int:
    return round(p * 2**32)
