"""Keys of samples are folded keys, and the global generators are put back bit by bit."""

from __future__ import annotations

import random as python_random

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purestep import random
from purestep.data import seeding


def globals_now() -> tuple:
    return python_random.getstate(), str(np.random.get_state()), torch.get_rng_state().tolist()


@settings(max_examples=30)
@given(seed=st.integers(0, 2**64 - 1), indices=st.lists(st.integers(0, 2**63 - 1), min_size=1, max_size=9))
def test_sample_words_are_folded_keys(seed: int, indices: list[int]) -> None:
    key = random.fold_in(random.key(seed), "augment", 3)
    words = seeding.sample_words(seeding.epoch_words(seed, "augment", 3), np.array(indices))
    assert words[:, :2].tolist() == [random.fold_in(key, i).tolist() for i in indices]
    assert list(seeding.fold_words(seeding.epoch_words(seed, "augment", 3), indices[0])) == words[0, :2].tolist()
    assert len(np.unique(words[:, 2:], axis=0)) == len(set(indices))


def test_seeded_globals_are_a_function_of_the_words() -> None:
    def draw(first: int, second: int) -> tuple:
        with seeding.preserved():
            seeding.seed_globals(first, second)
            return python_random.random(), float(np.random.rand()), float(torch.rand(()))

    assert draw(1, 2) == draw(1, 2)
    for other in ((2, 1), (3, 3), (0, 2)):
        assert all(a != b for a, b in zip(draw(1, 2), draw(*other), strict=True))


@pytest.mark.parametrize("fails", [False, True])
def test_the_globals_are_put_back(fails: bool) -> None:
    np.random.randn()  # leaves a cached second value behind, which is state as well
    before = globals_now()
    try:
        with seeding.preserved():
            seeding.seed_globals(5, 6)
            np.random.randn(), python_random.gauss(0, 1), torch.rand(3)
            assert globals_now() != before
            if fails:
                raise KeyError
    except KeyError:
        pass
    assert globals_now() == before
