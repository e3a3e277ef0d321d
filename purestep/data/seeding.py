"""Randomness of samples: keys and seeds as a function of (seed, epoch, index), and the global generators restored.

Owns the 32-bit words of the keys and seeds under which third-party code (a data set, a collate function, a loader)
runs. `loading` and `adapters` call it; `random.global_generators` seeds and restores the generators.
"""

from __future__ import annotations

import functools

import numpy as np

from purestep import random
from purestep.random.global_generators import preserved as preserved
from purestep.random.global_generators import seed_globals as seed_globals
from purestep.random.philox import FOLD_INT, MASK, philox, philox_int

Words = tuple[int, int]


@functools.lru_cache(maxsize=256)
def epoch_words(seed: int, purpose: str, epoch: int) -> Words:
    """Return the two 32-bit words of `fold_in(key(seed), purpose, epoch)`."""
    return fold_words(_purpose_words(seed, purpose), epoch)


@functools.lru_cache(maxsize=256)
def _purpose_words(seed: int, purpose: str) -> Words:
    first, second = random.fold_in(random.key(seed), purpose).tolist()
    return first, second


def fold_words(key: Words, number: int) -> Words:
    """Return the words of `fold_in(key, number)` for a number of 0 or more, without making a tensor."""
    return philox_int((number & MASK, number >> 32, 0, FOLD_INT), key)


def sample_words(key: Words, indices: np.ndarray) -> np.ndarray:
    """Fold each index into a key, all at once.

    Args:
        key: the two words of a key.
        indices: int64[b].

    Returns:
        int64[b, 4]. Words 0 and 1 are those of `fold_in(key, index)`; words 2 and 3, the other half of the same Philox
        block, seed the global generators.

    Examples:
        >>> sample_words((0, 0), np.array([7]))[0, :2].tolist() == random.fold_in(random.key(0), 7).tolist()
        True
    """
    counter = (indices & MASK, (indices >> 32) & MASK, np.zeros_like(indices), FOLD_INT)
    return np.stack(np.broadcast_arrays(*philox(counter, key)), axis=-1)
