"""Triton kernels of the Philox block function: the integer arithmetic of `philox`, a whole draw in one launch.

Imported only where a draw is made on a card, because Triton is not there on every machine. `TRITON_INTERPRET=1` runs
them without a card, and `tests/device/test_draws.py` compares them with the CPU's draws there.
"""

from __future__ import annotations

import math

import triton
import triton.language as tl

# As in `philox`, which leads here and so cannot be imported.
_M0, _M1 = tl.constexpr(0xD2511F53), tl.constexpr(0xCD9E8D57)
_W0, _W1 = tl.constexpr(0x9E3779B9), tl.constexpr(0xBB67AE85)
_DRAW = tl.constexpr(0)
_UNIT, _ANGLE = tl.constexpr(2.0**-32), tl.constexpr(2.0 * math.pi * 2.0**-32)
BITS, MASK, UNIFORM, NORMAL = (tl.constexpr(kind) for kind in range(4))
BLOCKS = 256  # blocks of four words, or elements of an indexed draw, of one program


@triton.jit
def _philox(c0, c1, c2, c3, k0, k1):
    """The ten rounds, on uint32 words of one shape."""
    m0, m1 = tl.full((), _M0, tl.uint32), tl.full((), _M1, tl.uint32)
    w0, w1 = tl.full((), _W0, tl.uint32), tl.full((), _W1, tl.uint32)
    for _ in tl.static_range(10):
        high0, high1 = tl.umulhi(c0, m0), tl.umulhi(c2, m1)
        c0, c1, c2, c3 = high1 ^ c1 ^ k0, c2 * m1, high0 ^ c3 ^ k1, c0 * m0
        k0, k1 = k0 + w0, k1 + w1
    return c0, c1, c2, c3


@triton.jit
def _key_words(key, k0, k1, HOST: tl.constexpr):
    """The two words of a key: arguments of the kernel, or in memory."""
    if HOST:
        first, second = k0, k1
    else:
        first, second = tl.load(key), tl.load(key + 1)
    return first.to(tl.uint32), second.to(tl.uint32)


@triton.jit
def _value(first, second, threshold, KIND: tl.constexpr, WIDTH: tl.constexpr):
    """An element of a draw, from one word or, in float64 and for the normal distribution, two."""
    # One return: what a kernel returns in branches must be of one type, even in those that are not taken.
    if KIND == MASK:
        value = first.to(tl.int64) < threshold.to(tl.int64)
    elif KIND == UNIFORM and WIDTH == 53:
        whole = (first.to(tl.int64) << 21) | (second.to(tl.int64) >> 11)
        value = whole.to(tl.float64) * tl.full((), 2.0**-53, tl.float64)
    elif KIND == UNIFORM:
        value = (first >> (32 - WIDTH)).to(tl.float32) * tl.full((), 2.0**-WIDTH, tl.float32)
    elif KIND == NORMAL:
        unit = (first.to(tl.int64) + 1).to(tl.float64) * tl.full((), _UNIT, tl.float64)
        angle = second.to(tl.int64).to(tl.float64) * tl.full((), _ANGLE, tl.float64)
        value = tl.sqrt(tl.log(unit) * tl.full((), -2.0, tl.float64)) * tl.cos(angle)
    else:
        value = first.to(tl.int64)
    return value


@triton.jit
def _word(word, number, at, inside, KIND: tl.constexpr):
    """One word of a block: a number (0), the one element of a tensor (1), or the element at a place (2)."""
    if KIND == 0:
        found = number + at * 0
    elif KIND == 1:
        found = tl.load(word) + at * 0
    else:
        found = tl.load(word + at, mask=inside, other=0)
    return found.to(tl.uint32)


@triton.jit(do_not_specialize=["count", "n0", "n1", "n2", "n3", "n4", "n5"])
def block(
    out,
    count,
    w0,
    w1,
    w2,
    w3,
    w4,
    w5,
    n0,
    n1,
    n2,
    n3,
    n4,
    n5,
    K0: tl.constexpr,
    K1: tl.constexpr,
    K2: tl.constexpr,
    K3: tl.constexpr,
    K4: tl.constexpr,
    K5: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write the four words of `count` blocks one after another to `out`: int64[4, count]. Each word of the counters and
    keys is a number or a tensor, see `_word`."""
    at = tl.program_id(0).to(tl.int64) * BLOCKS + tl.arange(0, BLOCKS)
    inside = at < count
    c0, c1 = _word(w0, n0, at, inside, K0), _word(w1, n1, at, inside, K1)
    c2, c3 = _word(w2, n2, at, inside, K2), _word(w3, n3, at, inside, K3)
    k0, k1 = _word(w4, n4, at, inside, K4), _word(w5, n5, at, inside, K5)
    a, b, c, d = _philox(c0, c1, c2, c3, k0, k1)
    tl.store(out + at, a.to(tl.int64), mask=inside)
    tl.store(out + count + at, b.to(tl.int64), mask=inside)
    tl.store(out + 2 * count + at, c.to(tl.int64), mask=inside)
    tl.store(out + 3 * count + at, d.to(tl.int64), mask=inside)


@triton.jit(do_not_specialize=["count", "threshold", "k0", "k1"])
def draw(
    out,
    key,
    index,
    count,
    threshold,
    k0,
    k1,
    KIND: tl.constexpr,
    WIDTH: tl.constexpr,
    PER_ELEMENT: tl.constexpr,
    HOST: tl.constexpr,
    INDEXED: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Fill `out`, of `count` elements, with a draw: element i, or that at `index[i]`, of the draw of a key."""
    k0, k1 = _key_words(key, k0, k1, HOST)
    start = tl.program_id(0).to(tl.int64) * BLOCKS
    at = start + tl.arange(0, BLOCKS)
    if INDEXED:
        position = tl.load(index + at, mask=at < count, other=0) * PER_ELEMENT
        block = position >> 2
    else:
        block = at
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    zero = low ^ low
    a, b, c, d = _philox(low, high, zero, zero + _DRAW, k0, k1)
    if INDEXED:
        lane = position & 3
        first = tl.where(lane == 0, a, tl.where(lane == 1, b, tl.where(lane == 2, c, d)))
        second = tl.where(lane == 0, b, d)  # of two words an element, which begin at lane 0 or 2
        place = at
    elif PER_ELEMENT == 2:
        first, second = tl.interleave(a, c), tl.interleave(b, d)
        place = start * 2 + tl.arange(0, 2 * BLOCKS)
    else:
        first = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
        second = first
        place = start * 4 + tl.arange(0, 4 * BLOCKS)
    value = _value(first, second, threshold, KIND, WIDTH)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place < count)


@triton.jit(do_not_specialize=["count", "threshold", "scale", "k0", "k1"])
def dropout(
    out,
    x,
    key,
    count,
    threshold,
    scale,
    k0,
    k1,
    WIDE: tl.constexpr,
    HOST: tl.constexpr,
    BLOCKS: tl.constexpr,
):
    """Write 0 where words of a key are below a threshold, `x` times a scale elsewhere; `scale` is bits of float64."""
    k0, k1 = _key_words(key, k0, k1, HOST)
    start = tl.program_id(0).to(tl.int64) * BLOCKS
    block = start + tl.arange(0, BLOCKS)
    low, high = block.to(tl.uint32), (block >> 32).to(tl.uint32)
    zero = low ^ low
    a, b, c, d = _philox(low, high, zero, zero + _DRAW, k0, k1)
    words = tl.interleave(tl.interleave(a, c), tl.interleave(b, d))
    place = start * 4 + tl.arange(0, 4 * BLOCKS)
    given = tl.load(x + place, mask=place < count, other=0)
    factor = scale.to(tl.int64).to(tl.float64, bitcast=True)
    # torch multiplies half dtypes in float32 and rounds once.
    if WIDE:
        kept = given * factor
    else:
        kept = given.to(tl.float32) * factor.to(tl.float32)
    value = tl.where(words.to(tl.int64) < threshold.to(tl.int64), 0.0, kept)
    tl.store(out + place, value.to(out.dtype.element_ty), mask=place < count)


@triton.jit(do_not_specialize=["c0", "c1", "c2", "c3"])
def fold(out, key, value, c0, c1, c2, c3, VALUE: tl.constexpr):
    """Write the first two words of the block of a counter to `out`; of a value on the card, the words it is made of."""
    k0, k1 = _key_words(key, 0, 0, False)
    if VALUE:
        folded = tl.load(value).to(tl.int64)
        low, high = folded.to(tl.uint32), (folded >> 32).to(tl.uint32)
    else:
        low, high = c0.to(tl.uint32), c1.to(tl.uint32)
    first, second, _, _ = _philox(low, high, c2.to(tl.uint32), c3.to(tl.uint32), k0, k1)
    tl.store(out, first.to(tl.int64))
    tl.store(out + 1, second.to(tl.int64))
