"""Every backend gives the results of the function itself."""

from __future__ import annotations

import contextlib

import pytest
import torch

import purestep as ps
from purestep.jit import jit
from purestep.testing import assert_trees_close, assert_trees_equal, check_pure


@contextlib.contextmanager
def spelled_out():
    """A graph spells out what a recurrent layer does; eager takes oneDNN's kernel, which rounds otherwise."""
    before = torch.backends.mkldnn.enabled
    torch._C._set_mkldnn_enabled(False)
    yield
    torch._C._set_mkldnn_enabled(before)


def trained(step, state, batches):
    rows = []
    for batch in batches:
        state, metrics = step(state, batch)
        rows.append(ps.metrics.compute(metrics))
    return state, rows


@pytest.mark.parametrize("donate", [False, True])
def test_the_traced_step_has_the_bits_of_the_step(case, batches, donate):
    data = batches(4, seed=3)
    with spelled_out():
        expected, rows = trained(case.step(), case.state(3), data)
    actual, found = trained(jit(case.step(), backend="eager", donate=donate), case.state(3), data)
    assert_trees_equal(actual, expected, "state")
    assert found == rows


def test_a_traced_step_is_pure(case, batches):
    check_pure(jit(case.step(), backend="eager"), case.state(), batches(1)[0])
