"""Temporary buffers of compiled graphs are used again, and never while anything refers to them."""

from __future__ import annotations

import pytest
import torch

import purestep as ps
from purestep.jit import temporaries
from purestep.jit.temporaries import Temporaries

SHAPE = ((256, 256), (256, 1), torch.float32)  # 256 KiB
NBYTES = 256 * 256 * 4


def made(most):
    calls = []

    def allocate(size, stride, dtype):
        calls.append(size)
        return torch.empty_strided(size, stride, dtype=dtype)

    return Temporaries(allocate, most), calls


def test_a_buffer_is_used_again_when_nothing_refers_to_it():
    pool, calls = made(2 * NBYTES)
    first, second = pool(*SHAPE), pool(*SHAPE)
    assert first.data_ptr() != second.data_ptr()
    address, view = first.data_ptr(), first.view(-1)[5:]
    del first
    assert pool(*SHAPE).data_ptr() != address  # the view is still there
    del view
    assert pool(*SHAPE).data_ptr() == address
    assert len(calls) == 3


def test_no_more_is_kept_than_said_and_small_ones_are_not():
    pool, calls = made(NBYTES)
    for _ in range(3):
        one, other = pool(*SHAPE), pool(*SHAPE)
        del one, other
    assert len(calls) == 1 + 3
    for _ in range(3):
        pool((8, 8), (8, 1), torch.float32)
    assert len(calls) == 4 + 3


def test_a_shape_that_is_not_asked_for_any_more_gives_way(monkeypatch):
    monkeypatch.setattr(temporaries, "_FORGOTTEN", 5)
    pool, calls = made(NBYTES)
    pool(*SHAPE)
    other = ((512, 128), (128, 1), torch.float32)
    for _ in range(10):
        pool(*other)
    assert len(calls) == 1 + 6  # from the sixth on it is kept


@pytest.mark.slow
def test_what_a_graph_returns_is_not_written_over_by_the_next_call():
    step = ps.jit(lambda x: (x.sin() @ x).cos())
    x = torch.randn(300, 300, generator=torch.Generator().manual_seed(0))
    first = step(x)
    kept = first.clone()
    again = [step(x + n) for n in range(3)]
    assert torch.equal(first, kept)
    assert torch.equal(again[0], kept)
    assert len({tensor.data_ptr() for tensor in (first, *again)}) == 4
