"""Torch's generator, looked at where it lies in memory: every draw shows, and nothing else does."""

from __future__ import annotations

import pytest
import torch

from purestep.random import torch_generator
from purestep.random.global_generators import preserved

DRAWS = {
    "uniform": lambda: torch.rand(3),
    "one normal": lambda: torch.randn(1),
    "the second of two normals": lambda: torch.randn(1),
    "a normal in float64": lambda: torch.randn(1, dtype=torch.float64),
    "its second": lambda: torch.randn(1, dtype=torch.float64),
    "as many as it has words": lambda: torch.rand(624),
    "an index": lambda: torch.randperm(5),
    "dropout": lambda: torch.dropout(torch.ones(2), 0.5, True),
    "a seed": lambda: torch.manual_seed(1234),
}


@pytest.fixture(params=["in memory", "by get_state"], autouse=True)
def way(request, monkeypatch):
    if request.param == "by get_state":
        monkeypatch.setattr(torch_generator, "_words_at", lambda generator: None)
    monkeypatch.setattr(torch_generator, "_watched", None)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        yield request.param


def test_every_draw_shows_and_is_put_back():
    for name, draw in DRAWS.items():
        before, real = torch_generator.state(), torch.get_rng_state()
        assert torch.equal(before, real), name
        assert not torch_generator.moved(before), name
        draw()
        assert torch_generator.moved(before), name
        moved = torch.get_rng_state()
        torch_generator.put_back(before)
        assert torch.equal(torch.get_rng_state(), real), name
        assert not torch_generator.moved(before), name
        torch.set_rng_state(moved)


def test_it_is_read_in_memory_on_this_torch(way):
    first = torch_generator.state()
    assert (torch_generator.state() is first) == (way == "in memory")


def test_a_copy_that_was_put_back_by_others_has_not_moved():
    before = torch_generator.state()
    torch.rand(2)
    torch.set_rng_state(before.clone())
    assert not torch_generator.moved(before)


def test_preserved_puts_it_back():
    real = torch.get_rng_state()
    with preserved():
        for draw in DRAWS.values():
            draw()
    assert torch.equal(torch.get_rng_state(), real)


def test_modes_of_the_caller_do_not_draw_for_the_probe():
    with torch.device("meta"):
        state = torch_generator.state()
    assert state.device.type == "cpu"
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize("known", [True, False])
def test_inside_of_transforms_it_is_read_and_compared(monkeypatch, known):
    """Where it is first looked at inside of them, it is copied, because `vmap` refuses the draws of the probe."""
    monkeypatch.setattr(torch_generator, "_watched", None)
    if known:
        torch_generator.state()
    seen = []

    def loss(x):
        before = torch_generator.state()
        seen.append(torch_generator.moved(before))
        torch.default_generator.manual_seed(11)
        seen.append(torch_generator.moved(before))
        torch_generator.put_back(before)
        seen.append(torch.equal(torch.default_generator.get_state(), before))
        return x.square().sum()

    torch.manual_seed(3)
    start = torch.get_rng_state()
    torch.func.grad(lambda x: torch.func.vmap(torch.func.grad(loss))(x).sum())(torch.ones(2, 2))
    assert seen == [False, True, True]
    assert torch.equal(torch.get_rng_state(), start)
    assert (torch_generator._watched is not None) is known
