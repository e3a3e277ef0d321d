"""Random programs: what Inductor and our passes make of them computes what the program says."""

from __future__ import annotations

import random

import pytest
import torch

import purestep as ps
from purestep.jit import jit


def number(x):
    return x.mean()


FORMS = [
    lambda a, b, c, r: a + b,
    lambda a, b, c, r: a * b - c.amax(),
    lambda a, b, c, r: torch.tanh(a) * number(b),
    lambda a, b, c, r: a.flatten()[r.randrange(a.numel())] * b,
    lambda a, b, c, r: torch.stack([number(a), a.sum(), a.amax()])[r.randrange(3)] * b,
    lambda a, b, c, r: torch.stack([number(a), number(b), number(c)]).exp().unbind()[r.randrange(3)] + a,
    lambda a, b, c, r: torch.where(a > 0, a, 0.5) + number(b),
    lambda a, b, c, r: a * 0.9 ** (number(b).abs() + 1),
    lambda a, b, c, r: a / (1 + b.square().sum().sqrt()),
    lambda a, b, c, r: a.reshape(-1).flip(0)[: 1 + r.randrange(a.numel())].sum() * c,
    lambda a, b, c, r: torch.cat([a.reshape(-1)[:3], b.reshape(-1)[:2]]).sum() * c,
]


def program(seed, length):
    """Return a function of (state, inputs) made of random expressions, each over what came before."""

    def run(state, inputs):
        r = random.Random(seed)
        values = [*state.values(), *inputs]
        for _ in range(length):
            values.append(r.choice(FORMS)(*(r.choice(values) for _ in range(3)), r))
        return {k: v * 0.5 + number(values[-1 - i]) for i, (k, v) in enumerate(state.items())}, values

    return run


def arguments(seed):
    g = torch.Generator().manual_seed(seed)
    shapes = [(7, 5), (5,), (), (1,), (7, 1)]
    made = [torch.randn(s, generator=g) for s in shapes]
    return {
        "a": torch.randn(7, 5, generator=g),
        "b": torch.randn(5, generator=g),
        "c": torch.randn((), generator=g),
    }, made


@pytest.mark.slow
@pytest.mark.parametrize(("seed", "donate"), [(0, False), (1, True)])
def test_a_compiled_program_computes_what_it_says(seed, donate):
    function = program(seed, 40)
    expected = function(*arguments(seed))
    actual = jit(function, donate=donate)(*arguments(seed))
    for path, a, b in zip(ps.tree.paths(expected), ps.tree.leaves(actual), ps.tree.leaves(expected), strict=True):
        assert torch.allclose(a, b, rtol=1e-4, atol=1e-5), path


def test_the_programs_are_not_trivial():
    for seed in range(5):
        _, values = program(seed, 40)(*arguments(seed))
        assert len({round(float(number(v)), 5) for v in values}) > 20
        assert all(torch.isfinite(v).all() for v in values)
