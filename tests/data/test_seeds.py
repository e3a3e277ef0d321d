"""Keys of samples are folded keys, and the global generators are put back bit by bit."""

from __future__ import annotations

import random as python_random
import warnings

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from purestep import data, random
from purestep.data import seeding
from purestep.random import global_generators


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


@pytest.mark.parametrize("quick", [True, False])
@settings(max_examples=20)
@given(first=st.integers(0, 2**32 - 1), second=st.integers(0, 2**32 - 1))
def test_seeding_is_that_of_the_libraries(quick: bool, first: int, second: int) -> None:
    own = global_generators._Generators()
    own.quick = quick
    with seeding.preserved():
        np.random.randn(), python_random.gauss(0, 1)
        own.seed(first, second)
        found = python_random.getstate(), str(np.random.get_state()), np.random.randn(3).tolist()
        np.random.randn(), python_random.gauss(0, 1)
        python_random.seed(first | second << 32)
        np.random.seed((first, second, 1))
        assert found == (python_random.getstate(), str(np.random.get_state()), np.random.randn(3).tolist())


class Drawing:
    """Samples that draw from every global generator, as augmentation does."""

    def __len__(self) -> int:
        return 12

    def __getitem__(self, index: int) -> torch.Tensor:
        return torch.tensor([index, python_random.random(), np.random.randn(), float(torch.rand(()))])


@pytest.mark.parametrize("kind", ["torch's loader", "samples"])
def test_draws_between_the_batches_and_in_them_do_not_meet(kind: str) -> None:
    def source() -> data.Source:
        if kind == "samples":
            return data.batches(Drawing(), 3, seed=4)
        return data.as_source(torch.utils.data.DataLoader(Drawing(), 3, shuffle=True))

    def own(draws: int) -> list:
        return [(python_random.random(), np.random.randn(), float(torch.rand(()))) for _ in range(draws)]

    def read(draws: int, until: int = 4) -> list:
        return [(batch.tolist(), own(draws))[0] for batch, _ in zip(source().open(0, 0), range(until), strict=False)]

    with seeding.preserved():
        own(1)
        expected = own(9)
    with seeding.preserved():
        own(1)
        found = [draw for batch in source().open(0, 0) for draw in own(2)]
    assert found == expected[:8]
    assert read(0) == read(2)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", data.ReplayWarning)  # torch's loader has no state
        assert [batch.tolist() for batch in source().open(0, 2)] == read(2)[2:]
