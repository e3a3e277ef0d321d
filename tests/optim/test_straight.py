"""Adam over lists that are looked at once has the bits of Adam that looks at its lists in each operation."""

from __future__ import annotations

import pytest
import torch

from purestep import optim, tree
from purestep.optim.kernels import foreach as fx
from purestep.optim.optimizers import adam as adam_module

SHAPES = [(17, 9), (9,), (64, 33), (33,), (5, 3, 2), (1, 1)]


def tensors(seed, count=6):
    generator = torch.Generator().manual_seed(seed)
    return {f"p{i}": torch.randn(shape, generator=generator) for i, shape in enumerate(SHAPES[:count])}


def trained(tx, count, reuse):
    params = tensors(0, count)
    state = tx.init(params)
    for step in range(3):
        grads = tensors(step + 1, count)
        params, state = tx.advance(grads, state, params, reuse=reuse, step=torch.tensor(step))
    return params, state


@pytest.mark.parametrize("reuse", [False, True])
@pytest.mark.parametrize("count", [2, len(SHAPES)])
def test_bits(monkeypatch, count, reuse):
    tx = optim.adamw(3e-3, 0.87, b2=0.993, eps=3e-7, weight_decay=0.03, mask=["p0", "p2"])
    calls, straight = [], adam_module.straight_adam
    monkeypatch.setattr(adam_module, "straight_adam", lambda *a, **k: calls.append(1) or straight(*a, **k))
    found = trained(tx, count, reuse)
    assert len(calls) == 3
    monkeypatch.setattr(adam_module.Adam, "_straight", lambda self, leaves: False)
    monkeypatch.setattr(fx, "operands", lambda numbers, xs: list(numbers))
    assert tree.digest(found) == tree.digest(trained(tx, count, reuse))
    assert len(calls) == 3


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16])
def test_a_number_has_the_bits_of_its_tensor(dtype):
    xs = [x.to(dtype) for x in tensors(0).values()]
    for number in (0.9, 1 / 3, -1e-8, 123456789.123, 1e30):
        operand = fx.operand(number, xs)
        assert isinstance(operand, torch.Tensor)
        for name in ("mul", "div", "add"):
            own = getattr(fx, name)(xs, number)
            theirs = getattr(torch, f"_foreach_{name}")(xs, number)
            assert [x.dtype for x in own] == [dtype] * len(xs)
            assert all(torch.equal(x.view(torch.uint8), y.view(torch.uint8)) for x, y in zip(own, theirs, strict=True))


class Own(torch.Tensor):
    """A tensor that may refuse plain ones beside it, as a DTensor does."""


@pytest.mark.parametrize(
    "xs", [[Own(2)] * 5, [torch.ones(())] * 5, [torch.ones(2)] * 2, [torch.ones(2, dtype=torch.int64)] * 5]
)
def test_a_number_that_would_change_the_dtype_stays_one(xs):
    assert type(fx.operand(0.5, xs)) is float


def test_zeros_keep_their_sign():
    xs = [torch.ones(2)] * 5
    for zero in (0.0, -0.0):
        assert torch.signbit(fx.mul(xs, zero)[0]).all() == (str(zero) == "-0.0")
