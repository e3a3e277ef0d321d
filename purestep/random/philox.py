"""The Philox4x32-10 block function, in three forms that give the same words: tensors, Python ints and numpy.

Salmon et al., "Parallel random numbers: as easy as 1, 2, 3" (2011). `keys` and `draws` call it; they also see to it
that the last counter word separates the uses of one key.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from torch import Tensor
from torch.overrides import handle_torch_function, has_torch_function

from purestep.random import card

MASK = 0xFFFFFFFF
_M0, _M1 = 0xD2511F53, 0xCD9E8D57
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
# The last counter word: what is drawn, folded and split under one key never shares a block.
DRAW, FOLD_INT, FOLD_STR, SPLIT = 0, 1, 2, 3


def philox(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Any, Any, Any, Any]:
    """Apply the Philox4x32-10 block function.

    Args:
        counter: four 32-bit words, each a Python int or an int64 tensor (they broadcast).
        key: two 32-bit words, likewise.

    Returns:
        Four 32-bit words in [0, 2**32), of the type of the inputs.

    Examples:
        >>> [hex(word) for word in philox((0, 0, 0, 0), (0, 0))]
        ['0x6627e8d5', '0xe169c58d', '0xbc57ac4c', '0x9b00dbd8']
    """
    tensors = [word for word in (*counter, *key) if isinstance(word, Tensor)]
    if tensors and has_torch_function(tensors):
        # A trace has a mode for it: two hundred operations are traced once, and repeated in the graph after that.
        words: tuple[Any, Any, Any, Any] = handle_torch_function(philox, tensors, counter, key)
        return words
    c0, c1, c2, c3 = counter
    k0, k1 = key
    if getattr(k0, "device", None) is not None and k0.device.type == "meta":
        word = c0 ^ c1 ^ c2 ^ c3 ^ k0 ^ k1  # shapes without values: two hundred operations would say no more
        return word, word, word, word
    if tensors and all(word.is_cuda for word in tensors) and card.draws(tensors[0].device, *tensors):
        return card.block(counter, key)  # type: ignore[return-value]
    # Inductor multiplies an arange by a constant in 32 bits; an operation between the two keeps it from that.
    c0 = c0 ^ 0
    for _ in range(10):
        # c * m would pass 2**63, which compiled C++ may take for impossible and then drop a mask (Inductor's did). With
        # m - 2**32 it stays within 2**62; the low words agree, and c more gives the high one.
        p0, p1 = c0 * (_M0 - 2**32), c2 * (_M1 - 2**32)
        high0, high1 = (p0 >> 32) + c0 & MASK, (p1 >> 32) + c2 & MASK
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, p1 & MASK, high0 ^ c3 ^ k1, p0 & MASK
        k0, k1 = (k0 + _W0) & MASK, (k1 + _W1) & MASK
    return c0, c1, c2, c3


_KEYS = tuple((i * _W0 & MASK, i * _W1 & MASK) for i in range(10))


def philox_int(counter: Sequence[int], key: Sequence[int]) -> tuple[int, int]:
    """Return the first two words of `philox` for Python ints in range, fast: a host key is folded at every step."""
    c0, c1, c2, c3 = counter
    k0, k1 = key
    m0, m1, mask = _M0, _M1, MASK
    for w0, w1 in _KEYS:
        p0, p1 = c0 * m0, c2 * m1
        c0, c1, c2, c3 = (p1 >> 32) ^ c1 ^ (k0 + w0 & mask), p1 & mask, (p0 >> 32) ^ c3 ^ (k1 + w1 & mask), p0 & mask
    return c0, c1


def philox_numpy(count: int, key: tuple[int, int]) -> np.ndarray:
    """Words of blocks 0..count-1 of the draw domain, in order: `philox` with one scratch buffer and no Python ints."""
    # 64-bit words with 32-bit contents, so that a product keeps its high half. `out=` everywhere, because a fresh array
    # for each of some hundred operations would have to be fetched from the system.
    c0 = np.arange(count, dtype=np.uint64)
    c1, c2, c3 = np.zeros_like(c0), np.zeros_like(c0), np.full_like(c0, DRAW)
    k0, k1 = key
    mask, half, m0, m1 = np.uint64(MASK), np.uint64(32), np.uint64(_M0), np.uint64(_M1)
    p0, p1 = np.empty_like(c0), np.empty_like(c0)
    for _ in range(10):
        np.multiply(c0, m0, out=p0)
        np.multiply(c2, m1, out=p1)
        np.right_shift(p1, half, out=c0)
        np.bitwise_xor(c0, c1, out=c0)
        np.bitwise_xor(c0, np.uint64(k0), out=c0)
        np.right_shift(p0, half, out=c2)
        np.bitwise_xor(c2, c3, out=c2)
        np.bitwise_xor(c2, np.uint64(k1), out=c2)
        np.bitwise_and(p1, mask, out=c1)
        np.bitwise_and(p0, mask, out=c3)
        k0, k1 = (k0 + _W0) & MASK, (k1 + _W1) & MASK
    return np.stack((c0, c1, c2, c3), axis=-1).reshape(-1).view(np.int64)
