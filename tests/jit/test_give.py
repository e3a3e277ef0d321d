"""Eager donation: in place where the state is donated, the bits of the step itself, and safe in between."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps
from purestep.donation import donation_of
from purestep.errors import ConfigError, DonatedStateError, StepError
from purestep.optim.kernels import sliced
from purestep.testing import assert_trees_equal, check_pure

LIMIT = 16


@pytest.fixture(autouse=True)
def few_elements_are_many(monkeypatch):
    """The tensors of small models are large enough to be written over, and to be cut."""
    monkeypatch.setattr(sliced, "LONG_ON_CPU", LIMIT)
    monkeypatch.setattr(sliced, "WORTH", LIMIT)


def long_ones(state):
    leaves = ps.tree.leaves((state.params, state.opt_state))
    return {path: x.data_ptr() for path, x in zip(ps.tree.paths(leaves), leaves, strict=True) if x.numel() > LIMIT}


# --- the bits ---------------------------------------------------------------------------------------------------------


def test_donated_and_not_donated_agree(case, batches, trained):
    """The same bits of states and metrics, over fresh batches and a ragged last one; the given batch is not touched."""
    data = [*batches(4, seed=1), batches(1, 5, seed=2)[0]]
    kept = copy.deepcopy(data)
    expected, rows = trained(case.step(), case.state(), data)
    actual, others = trained(ps.donate(case.step()), case.state(), data)
    assert_trees_equal(actual, expected)
    assert others == rows
    assert_trees_equal(data, kept)


IN_PLACE = [
    "plain",
    "sgd",
    "clip and schedule",
    "dropout",
    "batch norm",
    "microbatches",
    "tied",
    "attention",
    "checkpoint",
]


@pytest.mark.parametrize("name", IN_PLACE)
def test_long_tensors_stay_where_they_are(cases, batches, name):
    case = cases[name]
    step, state = ps.donate(case.step()), case.state()
    first = long_ones(state)
    assert first
    for batch in batches(3):
        old = state
        state, _ = step(state, batch)
        assert long_ones(state) == first
        assert repr(old) == "<TrainState, consumed by Step>"


@pytest.mark.parametrize("policy", ["bf16-mixed", "16-mixed", "bf16-true", "bf16-master", "64"])
@pytest.mark.parametrize("microbatches", [1, 2])
@pytest.mark.parametrize("average", [False, True])
def test_under_policies_loss_scales_and_averages(policy, microbatches, average, cases, batches, trained):
    tx = ps.optim.chain(ps.optim.clip_by_global_norm(0.5), ps.optim.adamw(1e-2, eps=1e-4))
    tx = ps.optim.average_params(tx, decay=0.5) if average else tx
    chosen = ps.precision.policy(policy)
    data = batches(5, 12)
    if policy == "16-mixed":  # from there on its scale moves, and updates are skipped
        data[2]["x"] *= 1e30

    def run(step):
        return trained(step, chosen.apply(ps.init(cases["batch norm"].model, tx, seed=1)), data)

    def loss_fn(net, batch):
        return cross_entropy(net(batch["x"]).float(), batch["y"])

    step = ps.make_step(loss_fn, tx, policy=chosen, microbatches=microbatches)
    expected, rows = run(step)
    actual, others = run(ps.donate(step))
    assert_trees_equal(actual, expected)
    assert str(others) == str(rows)  # a NaN is not equal to itself
    if policy == "16-mixed":
        assert 0 < int(actual.step) < 5
        assert float(actual.loss_scale.value) < float(chosen.loss_scale.value)


@pytest.mark.parametrize(
    "tx",
    [
        ps.optim.adamw(1e-2, fused=True),
        ps.optim.chain(ps.optim.clip_by_global_norm(0.5), ps.optim.adamw(1e-2, weight_decay=0.1, fused=True)),
        ps.optim.sgd(0.1, 0.9, fused=True),
        ps.optim.apply_if_finite(ps.optim.adamw(1e-2, fused=True)),
        ps.optim.average_params(ps.optim.adamw(1e-2, fused=True), decay=0.5),
        ps.optim.adafactor(1e-2),
        ps.optim.lift(torch.optim.RMSprop, lr=1e-3),
    ],
    ids=lambda tx: repr(tx)[:60],
)
def test_with_fused_kernels_and_what_is_not_cut(tx, cases, batches, trained):
    case = cases["plain"]
    step = ps.make_step(lambda net, batch: cross_entropy(net(batch["x"]), batch["y"]), tx)
    expected, _ = trained(step, ps.init(case.model, tx, seed=2), batches(5))
    actual, _ = trained(ps.donate(step), ps.init(case.model, tx, seed=2), batches(5))
    assert_trees_equal(actual, expected)


# --- what else lies in that memory ------------------------------------------------------------------------------------


class Watched(nn.Module):
    """Hands out its weights: as metrics, as a buffer, as the gradient of another."""

    def __init__(self):
        super().__init__()
        self.first, self.second = nn.Linear(7, 7), nn.Linear(7, 7)
        self.register_buffer("seen", torch.zeros(7, 7))
        self.register_buffer("corner", torch.zeros(()))

    def forward(self, x):
        self.seen, self.corner = self.first.weight.detach(), self.second.weight.detach()[0, 0]
        return self.first(x) + self.second(x) + Swap.apply(self.first.weight, self.second.weight).sum() * 0


class Swap(torch.autograd.Function):
    """Its gradients are the very tensors it was given, each that of the other."""

    @staticmethod
    def forward(ctx, a, b):
        ctx.save_for_backward(a, b)
        return a + b

    @staticmethod
    def backward(ctx, grad):
        a, b = ctx.saved_tensors
        return b, a


def watched_loss(net, batch):
    row = ps.metrics.Last(net.first.weight[0])
    return cross_entropy(net(batch["x"])[:, :5], batch["y"]), {
        "row": row,
        "one": ps.metrics.Last(net.second.weight[1, 2]),
    }


@pytest.mark.parametrize("direct", [False, True])
def test_metrics_buffers_and_gradients_in_the_memory_of_the_state(direct, batches):
    tx = ps.optim.adamw(1e-2)
    loss_fn = (
        (lambda net, batch: (Swap.apply(net.first.weight, net.second.weight).mean(), {})) if direct else watched_loss
    )
    step = ps.make_step(loss_fn, tx)
    donated, expected, actual = ps.donate(step), ps.init(Watched, tx), ps.init(Watched, tx)
    history = []
    for batch in batches(3):
        expected, want = step(expected, batch)
        actual, got = donated(actual, batch)
        history.append((got, want))
    assert_trees_equal(actual, expected)
    for got, want in history:
        assert_trees_equal(got, want)


def test_a_state_that_holds_one_tensor_twice_or_views(batches, trained):
    tx = ps.optim.adamw(1e-2)
    step = ps.make_step(lambda net, batch: cross_entropy(net(batch["x"])[:, :5], batch["y"]), tx)

    def tangled():
        state = ps.init(lambda: nn.Sequential(nn.Linear(7, 7), nn.Linear(7, 7)), tx)
        flat = torch.arange(200.0) / 200
        params = {
            "0.weight": flat[:49].view(7, 7),
            "1.weight": flat[40:89].view(7, 7),
            "0.bias": flat[3:10],
            "1.bias": torch.ones(1).expand(7),
        }
        mu = state.opt_state.mu | {"0.weight": flat[:49].view(7, 7), "1.weight": torch.zeros(1, 1).expand(7, 7)}
        return state.replace(params=params, opt_state=state.opt_state.replace(mu=mu)), flat

    state, _ = tangled()
    expected, _ = trained(step, state, batches(3))
    given_away, flat = tangled()
    before = flat.clone()
    actual, _ = trained(ps.donate(step), given_away, batches(3))
    assert_trees_equal(actual, expected)
    assert torch.equal(flat[89:], before[89:])


# --- safety -----------------------------------------------------------------------------------------------------------


def test_without_donation_nothing_is_written_or_consumed(cases, batches):
    case, batch = cases["plain"], batches(1)[0]
    state, step = case.state(), case.step()
    before = ps.digest(state)
    new, _ = step(state, batch)
    assert ps.digest(state) == before
    assert not set(long_ones(new).values()) & set(long_ones(state).values())
    check_pure(step, state, batch)


@pytest.mark.parametrize(
    "use",
    [
        lambda s: s.params,
        lambda s: s.replace(step=torch.tensor(0)),
        lambda s: ps.tree.leaves({"nested": s}),
        lambda s: ps.digest(s),
        lambda s: copy.deepcopy(s),
        lambda s: ps.to_module(s),
    ],
)
def test_any_use_of_a_consumed_state_raises(use, cases, batches):
    step, state = ps.donate(cases["plain"].step()), cases["plain"].state()
    step(state, batches(1)[0])
    with pytest.raises(DonatedStateError) as caught:
        use(state)
    assert "this TrainState was consumed by Step" in str(caught.value)
    assert "or the same step without donation, which keeps the old state" in str(caught.value)


def test_check_pure_refuses_a_donating_step(cases, batches):
    with pytest.raises(AssertionError, match="a donating step consumes its state"):
        check_pure(ps.donate(cases["plain"].step()), cases["plain"].state(), batches(1)[0])


def test_a_call_that_fails_before_it_writes_leaves_the_state_as_it_was(cases, batches):
    step, state = ps.donate(cases["plain"].step()), cases["plain"].state()
    before = ps.digest(state)
    with pytest.raises(RuntimeError):
        step(state, {"x": torch.ones(3, 99), "y": torch.zeros(3, dtype=torch.int64)})
    assert ps.digest(state) == before
    new, _ = step(state, batches(1)[0])
    assert int(new.step) == 1


def test_a_call_that_fails_while_it_writes_leaves_no_state_behind(cases, batches, monkeypatch):
    step, state = ps.donate(cases["plain"].step()), cases["plain"].state()
    monkeypatch.setattr(sliced._Result, "_write", lambda *args: (_ for _ in ()).throw(MemoryError()))
    with pytest.raises(MemoryError):
        step(state, batches(1)[0])
    with pytest.raises(DonatedStateError, match="which failed while it wrote over it"):
        _ = state.params


def test_inside_transforms_it_is_the_step_itself(cases, batches):
    case, batch = cases["plain"], batches(1)[0]
    step, state = ps.donate(case.step()), case.state()
    before = ps.digest(state)
    gradient = torch.func.grad(lambda x: step(state, {**batch, "x": x})[1]["loss"].compute())(batch["x"])
    assert torch.isfinite(gradient).all()
    assert ps.digest(state) == before


def test_a_state_is_donated_on_this_thread_and_for_this_call(cases, batches):
    seen = []

    def step(state, batch):
        donation = donation_of(state)
        seen.append((donation.memory, donation_of(cases["plain"].state())))
        return state, {}

    state = cases["plain"].state()
    returned, _ = ps.donate(step)(state, batches(1)[0])
    leaves = ps.tree.leaves((state.params, state.opt_state))
    assert seen == [({x.data_ptr() for x in leaves if x.dim()}, None)]
    assert returned is state  # returned as it is, so it is not consumed
    assert donation_of(state) is None
    assert int(state.step) == 0


# --- hand-written steps -----------------------------------------------------------------------------------------------


def by_hand(model, tx, *, last_use, more=lambda state, new: {}):
    def train_step(state, batch):
        def loss_of(params):
            logits, buffers = ps.apply(model, params, state.buffers, batch["x"], rng=state.rng)
            return cross_entropy(logits, batch["y"]), buffers

        grads, (loss, buffers) = ps.grad_and_value(loss_of, has_aux=True)(state.params)
        old = state
        shown = more(old, None)
        new = state.apply_gradients(tx, grads, buffers=buffers, last_use=last_use)
        return new, {"loss": loss, **shown, **({} if last_use else more(old, new))}

    return train_step


@pytest.mark.parametrize("last_use", [False, True])
def test_a_hand_written_step(last_use, cases, batches):
    tx, model = ps.optim.adamw(1e-2), cases["dropout"].model()
    step = by_hand(model, tx, last_use=last_use)
    expected, actual = ps.init(model, tx), ps.init(model, tx)
    first, donated = long_ones(actual), ps.donate(step)
    for batch in batches(4):
        expected, want = step(expected, batch)
        old = actual
        actual, got = donated(actual, batch)
        assert_trees_equal(got, want)
        with pytest.raises(DonatedStateError):
            _ = old.params
    assert_trees_equal(actual, expected)
    assert (long_ones(actual) == first) is last_use
    check_pure(step, expected, batches(1)[0])


def test_a_hand_written_step_that_reads_the_old_state_after_the_update(cases, batches):
    """Without last_use nothing is written, so the difference is what it is without donation."""
    tx, model = ps.optim.sgd(0.1), cases["plain"].model()

    def moved(old, new):
        return {} if new is None else {"moved": (new.params["0.weight"] - old.params["0.weight"]).abs().max()}

    step = by_hand(model, tx, last_use=False, more=moved)
    _, want = step(ps.init(model, tx), batches(1)[0])
    _, got = ps.donate(step)(ps.init(model, tx), batches(1)[0])
    assert float(got["moved"]) == float(want["moved"]) > 0


def test_a_hand_written_step_that_returns_the_memory_it_gave_away_is_refused(cases, batches):
    tx, model = ps.optim.sgd(0.1), cases["plain"].model()
    step = by_hand(model, tx, last_use=True, more=lambda old, new: {"w": old.params["0.weight"][0, 0]})
    with pytest.raises(StepError) as caught:
        ps.donate(step)(ps.init(model, tx), batches(1)[0])
    assert "lies in the memory of the old state" in str(caught.value)
    assert "train_step returned float32[] at [0]['w']" in str(caught.value)
    assert "cloned before the update" in str(caught.value)
    step(ps.init(model, tx), batches(1)[0])


def test_several_states_and_one_that_is_passed_on(cases, batches):
    inner = cases["plain"].step()

    def one_of_two(states, batch):
        new, metrics = inner(states["a"], batch)
        return {"a": new, "b": states["b"]}, metrics

    states = {"a": cases["plain"].state(1), "b": cases["plain"].state(2)}
    held = dict(states)
    expected, _ = one_of_two({"a": cases["plain"].state(1), "b": cases["plain"].state(2)}, batches(1)[0])
    where = long_ones(states["a"])
    new, _ = ps.donate(one_of_two)(states, batches(1)[0])
    assert_trees_equal(new, expected)
    assert new["b"] is held["b"]
    assert long_ones(new["a"]) == where
    with pytest.raises(DonatedStateError):
        _ = held["a"].params


@ps.pytree
class Adversaries:
    maker: ps.TrainState
    judge: ps.TrainState


def test_states_inside_a_node_of_ones_own(cases, batches, trained):
    tx = ps.optim.adamw(1e-2)
    model = cases["plain"].model()

    def train_step(both, batch):
        def loss_of(params, other):
            logits, _ = ps.apply(model, params, {}, batch["x"])
            against, _ = ps.apply(model, other, {}, batch["x"])
            return cross_entropy(logits, batch["y"]) - 0.1 * cross_entropy(against, batch["y"])

        grads, loss = ps.grad_and_value(loss_of)(both.maker.params, both.judge.params)
        maker = both.maker.apply_gradients(tx, grads, last_use=True)
        grads, _ = ps.grad_and_value(loss_of)(both.judge.params, maker.params)
        judge = both.judge.apply_gradients(tx, grads, last_use=True)
        return Adversaries(maker, judge), {"loss": ps.metrics.mean(loss)}

    def both():
        return Adversaries(ps.init(model, tx), ps.init(cases["plain"].model, tx, seed=3))

    expected, _ = trained(train_step, both(), batches(3))
    state = both()
    first = long_ones(state.maker) | {f"judge{k}": v for k, v in long_ones(state.judge).items()}
    actual, _ = trained(ps.donate(train_step), state, batches(3))
    assert_trees_equal(actual, expected)
    assert long_ones(actual.maker) | {f"judge{k}": v for k, v in long_ones(actual.judge).items()} == first
    with pytest.raises(DonatedStateError, match="this Adversaries was consumed by train_step"):
        _ = state.maker


def test_an_empty_tensor_lies_in_no_memory():
    """Its address is 0, like that of every other one: a parameter without elements is no reason to refuse them."""
    tx = ps.optim.sgd(0.1)

    def model():
        net = nn.Linear(6, 6)
        net.register_parameter("empty", nn.Parameter(torch.ones(0, 3)))
        return net

    def step(state, batch):
        grads = {name: torch.ones_like(p) for name, p in state.params.items()}
        return state.apply_gradients(tx, grads, last_use=True), {"nothing": torch.ones(0), "one": torch.ones(())}

    state = ps.init(model, tx)
    first = long_ones(state)
    new, others = ps.donate(step)(state, None)
    assert long_ones(new) == first
    assert others["nothing"].shape == (0,)


# --- what can be donated ----------------------------------------------------------------------------------------------


def test_compiled_steps(cases):
    step = cases["plain"].step()
    with pytest.raises(ConfigError, match=r"ps.jit\(ps.make_step\(loss_fn, tx\), donate=True\)"):
        ps.donate(ps.jit(step, backend="eager"))
    donating = ps.jit(step, backend="eager", donate=True)
    assert ps.donate(donating) is donating
    once = ps.donate(step)
    assert ps.donate(once) is once
    assert repr(once) == f"donate({step!r})"
    assert once.step is step
