"""Loaders that draw nothing from the global generators are not seeded; one that begins to is read again, seeded."""

from __future__ import annotations

import itertools
import random

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

from purestep import data
from purestep.data import adapters, seeding

DRAWS = {
    "python": lambda: random.random(),
    "numpy": lambda: float(np.random.rand()),
    "torch": lambda: float(torch.rand(())),
    "the second normal": lambda: float(np.random.randn()),
}


class Rows:
    """Adds a draw to some of its rows."""

    def __init__(self, draw, rows):
        self.draw, self.rows = draw, rows

    def __len__(self):
        return 120

    def __getitem__(self, i):
        return torch.tensor(i + (self.draw() if i in self.rows else 0.0), dtype=torch.float64)


def loader(draw, rows):
    return DataLoader(Rows(draw, rows), batch_size=2, shuffle=True)


def read(source, epochs=2, *, past=True):
    """Read epochs; `past`: up to the end of their iterators, and not to the last batch, as a run does."""
    length = None if past else source.length()
    return [b.tolist() for epoch in range(epochs) for b in itertools.islice(source.open(epoch, 0), length)]


def globals_now():
    return random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist()


@pytest.fixture
def seedings(monkeypatch):
    """Counts how often the global generators were seeded."""
    count, seed = [0], seeding.seed_globals
    monkeypatch.setattr(seeding, "seed_globals", lambda *words: count.append(count.pop() + 1) or seed(*words))
    return count


@pytest.mark.parametrize("past", [True, False])
def test_a_loader_that_draws_nothing_is_seeded_at_first_only(seedings, past):
    before = globals_now()
    found = read(data.as_source(loader(None, ())), past=past)
    assert globals_now() == before
    assert seedings[0] == adapters._TRIED + 4  # and where its two iterations begin, and their first batches
    assert sorted(x for batch in found[:60] for x in batch) == list(range(120))
    assert found[:60] != found[60:]


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("rows", [{5}, set(range(0, 120, 7))], ids=["one", "many"])
def test_one_that_begins_to_draw_gives_what_it_gives_when_it_is_always_seeded(monkeypatch, draw, rows):
    before = globals_now()
    found = read(data.as_source(loader(DRAWS[draw], rows)), epochs=3)
    assert globals_now() == before
    monkeypatch.setattr(adapters, "_TRIED", 10**9)
    assert found == read(data.as_source(loader(DRAWS[draw], rows)), epochs=3)


def test_it_is_seeded_from_the_first_draw_on(seedings):
    class Late(Rows):
        late = False

        def __getitem__(self, i):
            return torch.tensor(random.random() if self.late else 0.0)

    rows = Late(None, ())
    source = data.as_source(DataLoader(rows, batch_size=2))
    batches = source.open(0, 0)
    for _ in range(40):
        next(batches)
    seedings[0], rows.late = 0, True
    drawn = [next(batches), next(batches)]
    assert seedings[0] == 40 + 1 + 2  # the batches before, the start of the iteration, and two more
    assert not torch.equal(*drawn)
    assert list(drawn[0]) != list(drawn[0].flip(0))


@pytest.mark.parametrize("past", [True, False])
def test_a_draw_at_the_end_of_an_epoch_is_seeded(monkeypatch, past):
    class Ends:
        """A loader whose next epoch depends on a draw at the end of this one."""

        def __init__(self):
            self.first = 0.0

        def __len__(self):
            return 40

        def __iter__(self):
            for i in range(40):
                yield torch.tensor([self.first + i], dtype=torch.float64)
            self.first = random.random()

    before = globals_now()
    found = read(data.as_source(Ends()), epochs=3, past=past)
    assert globals_now() == before
    monkeypatch.setattr(adapters, "_TRIED", 10**9)
    assert found == read(data.as_source(Ends()), epochs=3, past=past)


def test_an_error_names_the_batch_where_nothing_is_seeded():
    class Fails(Rows):
        def __getitem__(self, i):
            return [0.0, 1 / 0][i // 100] if i >= 100 else 0.0

    batches = data.as_source(DataLoader(Fails(None, ()), batch_size=2)).open(0, 0)
    with pytest.raises(ZeroDivisionError) as caught:
        list(batches)
    assert "while batch 50 of epoch 0 was read" in caught.value.__notes__[0]
