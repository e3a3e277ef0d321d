"""Lifted torch optimizers are pure and equal to torch's own; states go to torch and back."""

from __future__ import annotations

import pickle
from collections.abc import Callable
from typing import Any

import pytest
import torch

from purestep import optim, tree
from purestep.errors import OptimError

T = torch.optim


def draw(seed: int) -> dict[str, torch.Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return {n: torch.randn(s, generator=generator) for n, s in {"b.w": (5, 3), "a.w": (4, 7), "c.w": (2, 2)}.items()}


class PythonState(torch.optim.Optimizer):
    """A third party's optimizer with every bad habit: python counters, rebinding, numbers in its groups."""

    def __init__(self, params: Any, lr: float = 0.1, warm: float = 0.0) -> None:
        super().__init__(params, {"lr": lr, "warm": warm})

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            group["warm"] = group["warm"] + 0.25
            for p in group["params"]:
                state = self.state[p]
                state["k"] = state.get("k", 0) + 1
                state["buf"] = p.grad * state["k"] + state.get("buf", 0.0)
                p -= group["lr"] * min(1.0, group["warm"]) * state["buf"]


class FilledWhenMade(torch.optim.Optimizer):
    """A third party's optimizer that makes its state before the first step, as Adagrad does, and not again."""

    def __init__(self, params: Any, lr: float = 0.1, start: float = 0.5) -> None:
        super().__init__(params, {"lr": lr})
        for group in self.param_groups:
            for p in group["params"]:
                self.state[p] = {"n": 0, "sum": torch.full_like(p, start)}

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                state = self.state[p]
                state["n"] += 1
                state["sum"].addcmul_(p.grad, p.grad)
                p.addcdiv_(p.grad, state["sum"].sqrt(), value=-group["lr"] / state["n"])


CASES: dict[str, tuple[Any, dict[str, Any]]] = {
    "SGD": (T.SGD, {"lr": 0.1}),
    "SGD momentum": (T.SGD, {"lr": 0.1, "momentum": 0.9, "nesterov": True}),
    "SGD dampening": (T.SGD, {"lr": 0.1, "momentum": 0.9, "dampening": 0.3}),
    "Adam": (T.Adam, {"lr": 0.01, "amsgrad": True}),
    "AdamW": (T.AdamW, {"lr": 0.01}),
    "ASGD": (T.ASGD, {"lr": 0.01, "t0": 3}),
    "NAdam": (T.NAdam, {"lr": 0.01}),
    "RAdam": (T.RAdam, {"lr": 0.01}),
    "Adamax": (T.Adamax, {"lr": 0.01}),
    "Adagrad": (T.Adagrad, {"lr": 0.01, "lr_decay": 0.1}),
    "Adadelta": (T.Adadelta, {}),
    "RMSprop": (T.RMSprop, {"lr": 0.01, "momentum": 0.9, "centered": True}),
    "Rprop": (T.Rprop, {"lr": 0.01}),
    "Adafactor": (T.Adafactor, {"lr": 0.01}),
    "Muon": (T.Muon, {"lr": 0.01}),
    "third party": (PythonState, {"lr": 0.01}),
    "filled when made": (FilledWhenMade, {"lr": 0.01, "start": 0.25}),
}


@pytest.mark.parametrize("name", CASES)
def test_lifted_optimizers_are_torch(name: str) -> None:
    cls, arguments = CASES[name]
    tx = optim.lift(cls, **arguments)
    params = draw(0)
    theirs = {n: p.clone().requires_grad_() for n, p in params.items()}
    optimizer = cls(list(theirs.values()), **arguments)
    state = tx.init(params)
    start = state
    for i in range(8):
        grads = draw(i + 1)
        before = tree.digest((grads, state, params))
        updates, following = tx.update(grads, state, params, step=torch.tensor(i))
        assert tree.digest((grads, state, params)) == before
        assert tree.equal(tx.update(grads, state, params), (updates, following))
        state, params = following, optim.apply_updates(params, updates)
        state, tx = pickle.loads(pickle.dumps((state, tx)))
        for n, p in theirs.items():
            p.grad = grads[n].clone()
        optimizer.step()
    assert tree.structure(state) == tree.structure(start)
    for n, p in theirs.items():
        torch.testing.assert_close(params[n], p.detach(), rtol=1e-6, atol=1e-7)


def test_lift_with_param_groups_and_a_schedule() -> None:
    schedule = optim.linear_schedule(0.0, 1.0, transition_steps=4)
    tx = optim.lift(
        T.SGD, schedule, param_groups=[{"params": "a.*", "weight_decay": 0.5}, {"params": "c.*", "lr": 0.25}]
    )
    params, grads = draw(0), draw(1)
    updates, _ = tx.update(grads, tx.init(params), params, step=torch.tensor(2))
    torch.testing.assert_close(updates["b.w"], -0.5 * grads["b.w"])
    torch.testing.assert_close(updates["a.w"], -0.5 * (grads["a.w"] + 0.5 * params["a.w"]))
    torch.testing.assert_close(updates["c.w"], -0.25 * grads["c.w"])
    assert tx.hyperparams(None, torch.tensor(2))["learning_rate"] == 0.5


def test_lift_refuses_what_it_cannot_keep_pure() -> None:
    params = draw(0)
    with pytest.raises(OptimError, match=r"(?s)LBFGS needs a closure.*optim\.lbfgs\(\)"):
        optim.lift(T.LBFGS)
    with pytest.raises(OptimError, match="lift takes the class of a torch optimizer"):
        optim.lift(T.SGD([torch.zeros(1)]))
    with pytest.raises(OptimError, match="a param group has no filter"):
        optim.lift(T.SGD, 0.1, param_groups=[{"lr": 1.0}])
    with pytest.raises(OptimError, match="the lifted SparseAdam failed"):
        optim.lift(T.SparseAdam).init(params)
    tx = optim.lift(T.SGD, 0.1)
    state = tx.init(params)
    with pytest.raises(OptimError, match="cannot be traced or mapped"):
        torch.vmap(lambda g: tx.update(g, state, params)[0])(tree.map(lambda x: x[None], params))


def test_lift_fits_into_the_algebra() -> None:
    tx = optim.apply_if_finite(optim.chain(optim.clip_by_global_norm(1.0), optim.lift(T.Adam, 0.1)))
    params = draw(0)
    state = tx.init(params)
    bad = {n: g * float("nan") for n, g in draw(1).items()}
    updates, after = tx.update(bad, state, params)
    assert tree.equal(after.inner, state.inner)
    assert all((u == 0).all() for u in updates.values())


# --- state_dicts ----------------------------------------------------------------------------------------------------

L = 2.0**-5
PAIRS: dict[str, tuple[Callable[[], Any], Callable[[Any], torch.optim.Optimizer]]] = {
    "SGD": (lambda: optim.sgd(L, 0.9), lambda p: T.SGD(p, L, momentum=0.9)),
    "SGD dampening": (lambda: optim.sgd(L, 0.9, dampening=0.5), lambda p: T.SGD(p, L, momentum=0.9, dampening=0.5)),
    "Adam": (lambda: optim.adam(L), lambda p: T.Adam(p, L)),
    "AMSGrad": (lambda: optim.amsgrad(L), lambda p: T.Adam(p, L, amsgrad=True)),
    "AdamW": (lambda: optim.chain(optim.clip_by_value(1e9), optim.adamw(L)), lambda p: T.AdamW(p, L)),
    "NAdam": (lambda: optim.nadam(L), lambda p: T.NAdam(p, L)),
    "RAdam": (lambda: optim.radam(L), lambda p: T.RAdam(p, L)),
    "Adamax": (lambda: optim.adamax(L), lambda p: T.Adamax(p, L)),
    "RMSprop": (
        lambda: optim.rmsprop(L, momentum=0.9, centered=True),
        lambda p: T.RMSprop(p, L, momentum=0.9, centered=True),
    ),
    "Adagrad": (lambda: optim.adagrad(L), lambda p: T.Adagrad(p, L)),
    "Adadelta": (lambda: optim.adadelta(), lambda p: T.Adadelta(p)),
    "Rprop": (lambda: optim.rprop(L), lambda p: T.Rprop(p, L)),
    "Adafactor": (lambda: optim.adafactor(L), lambda p: T.Adafactor(p, L)),
    "Muon": (lambda: optim.muon(L), lambda p: T.Muon(p, L)),
}


@pytest.mark.parametrize("name", PAIRS)
def test_training_goes_on_from_torch_here_and_back_there(name: str) -> None:
    make, theirs = PAIRS[name]
    straight = {n: p.clone().requires_grad_() for n, p in draw(0).items()}
    optimizer = theirs(list(straight.values()))

    def torch_steps(live: Any, running: torch.optim.Optimizer, seeds: range) -> None:
        for seed in seeds:
            for n, g in draw(seed).items():
                live[n].grad = g.clone()
            running.step()

    torch_steps(straight, optimizer, range(1, 4))
    params = {n: p.detach().clone() for n, p in straight.items()}
    tx = make()
    state = optim.from_torch(tx, optimizer.state_dict(), params)
    assert tree.structure(state) == tree.structure(tx.init(params))
    for seed in range(4, 7):
        updates, state = tx.update(draw(seed), state, params)
        params = optim.apply_updates(params, updates)
    back = {n: p.clone().requires_grad_() for n, p in params.items()}
    again = theirs(list(back.values()))
    again.load_state_dict(optim.to_torch(state, back, again))
    torch_steps(straight, optimizer, range(4, 10))
    torch_steps(back, again, range(7, 10))
    for n, p in straight.items():
        torch.testing.assert_close(back[n], p, rtol=1e-5, atol=1e-6)
    kept = {key for entry in again.state.values() for key, value in entry.items() if value is not None}
    assert kept == {key for entry in optimizer.state.values() for key, value in entry.items() if value is not None}


def test_states_that_do_not_fit_are_refused() -> None:
    live = [p.requires_grad_() for p in draw(0).values()]
    adam = T.Adam(live)
    for p in live:
        p.grad = torch.ones_like(p)
    adam.step()
    params = draw(0)
    with pytest.raises(OptimError, match=r"(?s)torch's 'exp_avg' of 'b.w' has no place.*optim.adamw"):
        optim.from_torch(optim.sgd(0.1, 0.9), adam.state_dict(), params)
    with pytest.raises(OptimError, match="another number of parameters"):
        optim.from_torch(optim.adam(0.1), adam.state_dict(), {"b.w": params["b.w"]})
    with pytest.raises(OptimError, match=r"(?s)another shape.*mu\.c\.w: float32\[5, 3\] into float32\[2, 2\]"):
        optim.from_torch(optim.adam(0.1), adam.state_dict(), dict(sorted(params.items(), reverse=True)))
    with pytest.raises(OptimError, match="the state of ASGD is not known"):
        optim.to_torch(optim.adam(0.1).init(params), params, T.ASGD(live))
