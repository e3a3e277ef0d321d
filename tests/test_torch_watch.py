"""Steps of models that draw nothing go without the function mode; those that begin to draw are noticed."""

from __future__ import annotations

import threading

import pytest
import torch
from torch import Tensor, nn

import purestep as ps
from purestep.errors import RandomnessError
from purestep.random.torch_mode import KeyedRandom


class Later(nn.Module):
    """Does something else from its n-th call on."""

    def __init__(self, what, after=5):
        super().__init__()
        self.linear, self.what = nn.Linear(3, 2), what
        self.calls = [0, after]  # no attribute of the module changes

    def forward(self, x):
        self.calls[0] += 1
        y = self.linear(x)
        return self.what(y) if self.calls[0] > self.calls[1] else y


class DrawsInBackward(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.clone()

    @staticmethod
    def backward(ctx, grad):
        return grad * torch.rand(())


def loss_fn(net, batch):
    return net(batch).square().mean()


def training(what, after=5):
    tx = ps.optim.sgd(0.1)
    step, state = ps.make_step(loss_fn, tx), ps.init(Later(what, after), tx, seed=3)
    state.model.module.calls[0] = 0
    return step, state


@pytest.fixture
def entered(monkeypatch):
    """Counts how often a mode was entered."""
    count, enter = [0], KeyedRandom.__enter__

    def counting(self):
        count[0] += 1
        return enter(self)

    monkeypatch.setattr(KeyedRandom, "__enter__", counting)
    return count


def test_a_model_that_draws_nothing_leaves_the_mode(entered):
    step, state = training(lambda y: y)
    for _ in range(60):
        state, _ = step(state, torch.ones(4, 3))
    assert entered[0] == 2  # the first call, and its backward pass


def dropped(y: Tensor) -> Tensor:
    return nn.functional.dropout(y, 0.5)


def test_one_that_begins_to_draw_draws_from_the_key():
    late, early = training(dropped), training(dropped, after=0)
    x, before = torch.randn(4, 3), torch.get_rng_state()
    for _ in range(5):
        late = (late[0], late[0](late[1], x)[0])
    state = late[1].replace(step=early[1].step, params=early[1].params)
    late[1].model.module.calls[0] = 5
    for _ in range(3):  # the first is done again under the mode
        state, metrics = late[0](state, x)
        early = (early[0], *early[0](early[1], x))
        assert torch.equal(metrics["loss"].total, early[2]["loss"].total)
        early = early[:2]
    assert torch.equal(torch.get_rng_state(), before)


def test_the_generator_is_put_back_beside_another_thread():
    done = threading.Event()
    other = threading.Thread(target=done.wait)
    other.start()
    try:
        test_one_that_begins_to_draw_draws_from_the_key()
    finally:
        done.set()
        other.join()


def test_a_generator_of_its_own_is_refused_within_some_calls():
    own = torch.Generator()
    step, state = training(lambda y: y + torch.rand((), generator=own))

    def many():
        now = state
        for _ in range(100):
            now, _ = step(now, torch.ones(4, 3))

    with pytest.raises(RandomnessError, match=r"torch\.Generator"):
        many()


def test_draws_in_the_backward_pass_are_refused():
    step, state = training(DrawsInBackward.apply)
    before = torch.get_rng_state()
    for _ in range(5):
        state, _ = step(state, torch.ones(4, 3))
    with pytest.raises(RandomnessError, match="backward pass"):
        step(state, torch.ones(4, 3))
    assert torch.equal(torch.get_rng_state(), before)


@pytest.mark.parametrize("fails", ["loss", "backward", "no graph"])
def test_the_module_is_put_back_after_a_step_that_fails(fails):
    class Broken(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x):
            return x.clone()

        @staticmethod
        def backward(ctx, grad):
            raise ValueError("mine")

    def what(y):
        if fails == "loss":
            raise ValueError("mine")
        return Broken.apply(y) if fails == "backward" else y.detach()

    step, state = training(what)
    linear = state.model.module.linear
    before = linear.weight
    for _ in range(5):
        state, _ = step(state, torch.ones(4, 3))
        assert linear.weight is before
    with pytest.raises((ValueError, ps.errors.StepError)):
        step(state, torch.ones(4, 3))
    assert linear.weight is before
    assert not ps.functional.active.stack()


def test_a_second_call_in_one_loss_is_bound_in_the_backward_pass_too():
    """A held binding gives way to the next one of its forward pass."""
    tx = ps.optim.sgd(0.1)
    state = ps.init(nn.Linear(3, 2), tx, seed=1)
    module, x = state.model.module, torch.randn(4, 3)

    def loss_of(params):
        one = ps.functional.Binding(module, params).run(loss_of_x, loss_of_x)
        return one + ps.functional.Binding(module, {n: 2 * p for n, p in params.items()}).run(loss_of_x, loss_of_x)

    def loss_of_x(net):
        return net(x).square().mean()

    def by_hand(params):
        return (x @ params["weight"].T + params["bias"]).square().mean() * 5

    for _ in range(3):
        grads, _ = ps.grad_and_value(loss_of)(state.params)
        expected, _ = ps.grad_and_value(by_hand)(state.params)
        assert all(torch.allclose(grads[name], expected[name]) for name in expected)
        assert not ps.functional.active.stack()
