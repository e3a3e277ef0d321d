"""Keys: made from a seed, derived from one another, never advanced.

Owns `key`, `fold_in` and `split`. A key on the host is folded in Python ints, one on a CUDA card by a kernel of `card`,
anything else in tensor operations that trace, compile and batch; the bits are the same.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purestep import _torch
from purestep.arguments import Device, Seed, checked
from purestep.errors import KeyShapeError, explain
from purestep.random import card, card_dropout, remembered
from purestep.random.philox import FOLD_INT, FOLD_STR, MASK, SPLIT, philox, philox_int


@checked(KeyShapeError)
def key(seed: Seed, *, device: Device | None = None) -> Tensor:
    """Make a key from a seed.

    Args:
        seed: an integer in [0, 2**64).
        device: where the key lives; the CPU by default, where folding costs the least.

    Returns:
        int64[2], two 32-bit words.

    Raises:
        KeyShapeError: the seed is not an integer of that range.

    Examples:
        >>> key(7)
        tensor([7, 0])
    """
    if isinstance(seed, bool) or not isinstance(seed, (int, np.integer)) or not 0 <= int(seed) < 2**64:
        raise KeyShapeError(
            explain("a seed must be an integer in [0, 2**64)", where=f"seed={seed!r}", instead="ps.random.key(0)")
        )
    return torch.tensor([int(seed) & MASK, int(seed) >> 32], device=device or "cpu")


def check_key(rng: Tensor) -> None:
    """Raise KeyShapeError unless this is one key."""
    if not isinstance(rng, Tensor) or rng.shape != (2,) or rng.dtype != torch.int64:
        shown = f"{rng.dtype}{list(rng.shape)}" if isinstance(rng, Tensor) else f"{type(rng).__name__} {rng!r}"
        raise KeyShapeError(
            explain(
                "a PRNG key is an int64 tensor of shape (2,)",
                where=f"key: {shown}",
                instead="make one with ps.random.key(seed); take one of ps.random.split(key, n) by indexing it",
            )
        )


def is_host(*tensors: Tensor) -> bool:
    """Tell whether tensors can be read now, without a device sync: plain CPU tensors outside tracing and transforms."""
    if torch.compiler.is_compiling():
        return False
    for t in tensors:
        if type(t) is not Tensor or not t.is_cpu:
            return False
    return _torch.transform_level() is None and _torch.dispatch_modes() == 0


# Dynamo cannot trace a hash.
@_torch.mark_constant
def _text_words(part: str) -> tuple[int, int, int]:
    hashed = hashlib.blake2b(part.encode(errors="surrogatepass"), digest_size=12).digest()
    return tuple(int.from_bytes(hashed[i : i + 4], "little") for i in (0, 4, 8))  # type: ignore[return-value]


@checked(KeyShapeError, failed=True)
def fold_in(key: Tensor, *data: int | str | Tensor) -> Tensor:
    """Derive a key from a key and data; other data give an independent key.

    `fold_in(key, a, b)` is `fold_in(fold_in(key, a), b)`, so `("a", "b")` and `("ab",)` differ. Integers, strings,
    `split` and draws use separate domains, so none of them collides with another.

    Args:
        key: int64[2].
        data: integers in [-2**63, 2**64), which count modulo 2**64; 0-d integer tensors; or strings.

    Returns:
        int64[2], on the device of `key`.

    Raises:
        KeyShapeError: `key` is not a key, or a part of `data` is of another kind.

    Examples:
        >>> fold_in(key(0), 3, "dropout")
        tensor([3413589608, 3874771151])
    """
    check_key(key)
    tensors = [d for d in data if isinstance(d, Tensor)]
    host = is_host(key, *tensors)
    if not host and card.draws(key.device, key, *tensors):
        return _folded_on_card(key, data)
    words: tuple[Any, Any] = tuple(key.tolist()) if host else (key[0], key[1])
    for part in data:
        counter = _counter(part)
        if isinstance(part, Tensor):
            value = int(part) if host else part.to(torch.int64).to(key.device)
            counter = (value & MASK, (value >> 32) & MASK, *counter[2:])
        if not host and not any(isinstance(c, Tensor) for c in counter):
            counter = (torch.full_like(key[0], counter[0]), *counter[1:])
        words = philox_int(counter, words) if host else philox(counter, words)[:2]
    return _on_host(words) if host else torch.stack(words)


def _on_host(words: Sequence[int]) -> Tensor:
    # Not torch.tensor: it takes five times as long, and follows torch.set_default_device.
    return torch.from_numpy(np.array(words, dtype=np.int64))


def step_key(rng: Tensor, step: Tensor, *more: int | Tensor) -> Tensor:
    """Return `fold_in(rng, step, *more)`, on the host where both are known there without waiting for the card.

    Inside `device_dropout` the host waits once to learn them, because it seeds the kernels.
    """
    if not rng.is_cpu and not step.is_cpu and card.plain(rng, step):
        find = remembered.read if card_dropout.asked() and not card.is_capturing() else remembered.known
        words = find(rng)
        number = None if words is None else find(step)
        if number is not None:
            rng, step = _on_host(words), number
    return fold_in(rng, step, *more)


def _folded_on_card(key: Tensor, data: Sequence[Any]) -> Tensor:
    for part in data:
        counter = _counter(part)
        if isinstance(part, Tensor):
            counter = _counter(int(part)) if is_host(part) else (part.to(key.device), *counter[1:])
        key = card.fold(key, counter)
    return key


def _counter(part: object) -> tuple[Any, ...]:
    """Return the block that stands for a part of a path; of a tensor, whose value it does not look at, that of 0."""
    if isinstance(part, str):
        return (*_text_words(part), FOLD_STR)
    if isinstance(part, Tensor) and part.ndim == 0 and not part.is_floating_point() and not part.is_complex():
        return 0, 0, 0, FOLD_INT
    if isinstance(part, (int, np.integer)) and not isinstance(part, bool) and -(2**63) <= int(part) < 2**64:
        return int(part) & MASK, (int(part) >> 32) & MASK, 0, FOLD_INT
    raise KeyShapeError(
        explain(
            "only integers, 0-d integer tensors and strings can be folded into a key",
            where=f"{type(part).__name__} {part!r}",
            instead='ps.random.fold_in(key, step, "dropout")',
        )
    )


@checked(KeyShapeError, failed=True)
def split(key: Tensor, n: int = 2) -> Tensor:
    """Derive `n` independent keys. `split(key, n)[i]` does not depend on `n`.

    Returns:
        int64[n, 2].

    Examples:
        >>> split(key(0), 3).shape
        torch.Size([3, 2])
    """
    check_key(key)
    if n < 0:
        raise KeyShapeError(explain("a key is split into n keys, from 0 up", where=f"{n=}", instead="split(key, 2)"))
    index = torch.arange(n, device=key.device)
    words = philox((index, 0, 0, SPLIT), (key[0], key[1]))
    return torch.stack(words[:2], dim=-1)


def host_words(key: Tensor, purpose: str) -> tuple[int, int] | None:
    """Return the two words of `fold_in(key, purpose)` as ints, wherever the key lies; None where it has no value.

    A key without memory stands for any key: its words are 0.

    Examples:
        >>> host_words(key(0), "dropout") == tuple(fold_in(key(0), "dropout").tolist())
        True
    """
    if key.is_meta:
        return 0, 0
    try:
        first, second = remembered.known(key) or key.tolist()
    except Exception:  # a tensor of a transform or of a trace
        return None
    return philox_int((*_text_words(purpose), FOLD_STR), (first, second))
