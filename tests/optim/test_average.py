"""Averages of the parameters: against torch's, whatever trains, skipped, jitted, resumed, and swapped in."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import purestep as ps
from purestep import optim, tree
from purestep.errors import OptimError
from purestep.testing import assert_trees_equal, check_pure, check_resume


def loss_fn(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


def make_batch(seed, bad=False):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(13, 5, generator=generator)
    return {"x": x / 0 if bad else x, "y": torch.randn(13, 3, generator=generator)}


def trained(tx, batches, seed=0):
    step, state = ps.make_step(loss_fn, tx), ps.init(lambda: nn.Linear(5, 3), tx, seed=seed)
    states = [state]
    for batch in batches:
        state, _ = step(state, batch)
        states.append(state)
    return states


INNER = {
    "sgd": lambda: optim.sgd(0.1, momentum=0.9),
    "clipped adamw": lambda: optim.chain(optim.clip_by_global_norm(0.3), optim.adamw(1e-2)),
    "schedule free": lambda: optim.schedule_free_adamw(1e-2),
}


@pytest.mark.parametrize("name", INNER)
@pytest.mark.parametrize("decay", [0.0, 0.9, 1.0, torch.tensor(0.7), lambda step: (1 + step) / (10 + step)])
def test_it_is_the_recurrence_and_leaves_the_training_alone(name, decay, seed):
    batches = [make_batch(seed % 1000 + i) for i in range(6)]
    plain = trained(INNER[name](), batches)
    states = trained(optim.average_params(INNER[name](), decay), batches)
    average = tree.map(lambda p: p.double(), states[0].params)
    for i, state in enumerate(states):
        assert_trees_equal(state.params, plain[i].params)
        d = float(decay(torch.tensor(i - 1)) if callable(decay) else decay)
        if i:
            average = tree.map(lambda a, p, d=d: d * a + (1 - d) * p.double(), average, state.params)
        torch.testing.assert_close(tree.map(lambda p: p.double(), optim.averaged(state).params), average)
    assert_trees_equal(states[-1].opt_state.inner, plain[-1].opt_state)


@pytest.mark.parametrize(("start", "every"), [(0, 1), (0, 3), (4, 1), (3, 2), (99, 1)])
def test_the_equal_average_is_the_mean_of_what_it_saw(start, every, seed):
    states = trained(
        optim.average_params(optim.sgd(0.2), None, start=start, every=every),
        [make_batch(seed % 1000 + i) for i in range(11)],
    )
    for i, state in enumerate(states):
        seen = states[start : i + 1 : every] or [state]
        mean = tree.map(lambda *xs: torch.stack(xs).double().mean(0).float(), *(s.params for s in seen))
        torch.testing.assert_close(optim.averaged(state).params, mean)


def test_it_is_that_of_torch():
    module = nn.Linear(5, 3)
    tx = optim.average_params(optim.sgd(0.1), 0.8)
    state, step = ps.init(module, tx), ps.make_step(loss_fn, tx)
    theirs = torch.optim.swa_utils.AveragedModel(module, multi_avg_fn=torch.optim.swa_utils.get_ema_multi_avg_fn(0.8))
    theirs.update_parameters(module)  # its first average is a copy
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1)
    for i in range(5):
        optimizer.zero_grad()
        loss_fn(module, make_batch(i)).backward()
        optimizer.step()
        theirs.update_parameters(module)
        state, _ = step(state, make_batch(i))
    for name, value in theirs.module.named_parameters():
        torch.testing.assert_close(optim.averaged(state).params[name], value.detach(), rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("around", [True, False])
def test_a_skipped_update_moves_nothing(around):
    def guard(tx):
        return optim.apply_if_finite(tx)

    tx = guard(optim.average_params(optim.sgd(0.1))) if around else optim.average_params(guard(optim.sgd(0.1)))
    before, after, last = trained(tx, [make_batch(0), make_batch(1, bad=True), make_batch(2)])[1:]
    assert_trees_equal(optim.averaged(after).params, optim.averaged(before).params)
    count = optim.get(after.opt_state, "average")
    assert tree.equal(count, optim.get(before.opt_state, "average"))
    assert not tree.equal(optim.averaged(last).params, optim.averaged(after).params)


def test_bfloat16_is_averaged_in_float32():
    """In bfloat16 a thousandth of a step is lost."""
    tx = optim.average_params(optim.sgd(0.0), 0.999)
    params = {"w": torch.ones(1, dtype=torch.bfloat16)}
    state = tx.init(params)
    for _ in range(10):
        _, state = tx.update({"w": torch.zeros(1)}, state, {"w": torch.full((1,), 2.0, dtype=torch.bfloat16)})
    torch.testing.assert_close(state.average["w"], torch.tensor([2 - 0.999**10]))


def test_under_master_weights_it_is_their_average():
    tx, policy = optim.average_params(optim.sgd(1e-3), 0.5), ps.precision.policy("bf16-master")
    step, state = ps.make_step(loss_fn, tx, policy=policy), policy.apply(ps.init(nn.Linear(5, 3), tx))
    average = tree.map(lambda p: p, state.opt_state.master)
    for i in range(4):
        state, _ = step(state, make_batch(i))
        average = tree.map(lambda a, p: 0.5 * a + 0.5 * p, average, state.opt_state.master)
    torch.testing.assert_close(state.opt_state.inner.average, average)
    assert {p.dtype for p in optim.averaged(state).params.values()} == {torch.bfloat16}


@pytest.mark.parametrize("donate", [False, True])
def test_jitted_microbatched_and_pure(donate):
    tx = optim.average_params(optim.adamw(1e-2), 0.9, start=1, every=2)
    eager = ps.make_step(loss_fn, tx, microbatches=1)
    jitted = ps.jit(eager, backend="eager", donate=donate)
    check_pure(eager, ps.init(lambda: nn.Linear(5, 3), tx, seed=0), make_batch(0))
    a, b = (ps.init(lambda: nn.Linear(5, 3), tx, seed=0) for _ in range(2))
    for i in range(5):
        a, b = eager(a, make_batch(i))[0], jitted(b, make_batch(i))[0]
        assert_trees_equal(b, a)


def test_it_resumes_and_is_evaluated_in_place_of_the_parameters(tmp_path):
    data = ps.data.batches(make_batch(3), 4, seed=1)

    def make():
        tx = optim.average_params(optim.adamw(0.05), 0.5)
        return {
            "step": ps.make_step(loss_fn, tx),
            "state": ps.init(lambda: nn.Linear(5, 3), tx, seed=0),
            "train": data,
            "callbacks": [
                ps.callbacks.evaluate(loss_fn, [make_batch(9)], every=ps.every.steps(2)),
                ps.callbacks.evaluate(loss_fn, [make_batch(9)], every=ps.every.steps(2), of=optim.averaged, name="ema"),
                ps.callbacks.early_stopping("ema/loss", patience=50),
            ],
        }

    check_resume(make, batches=6, at=[1, 4])
    result = ps.fit(**make(), until=ps.steps(6))
    ema = ps.to_module(optim.averaged(result.state))
    assert result.metrics["ema/loss"] == pytest.approx(loss_fn(ema, make_batch(9)).item(), rel=1e-5)
    assert result.metrics["ema/loss"] != result.metrics["val/loss"]


def test_averages_belong_to_nobody_else():
    state = trained(optim.average_params(optim.sgd(0.1), start=5), [make_batch(0)])[-1]
    pointers = [t.data_ptr() for t in tree.leaves((state, optim.averaged(state).params)) if t.numel()]
    assert len(set(pointers)) == len(pointers)


@pytest.mark.parametrize(
    ("call", "text"),
    [
        (lambda: optim.average_params(0.9), "inner must be a GradientTransformation"),
        (lambda: optim.average_params(optim.sgd(0.1), 1.5), r"decay must be a number in \[0, 1\][\s\S]*decay=1\.5"),
        (lambda: optim.average_params(optim.sgd(0.1), every=0), "every=0"),
        (lambda: optim.averaged(trained(optim.sgd(0.1), [])[0]), r"keeps no averages[\s\S]*average_params\(tx"),
        (
            lambda: optim.averaged(trained(optim.average_params(optim.average_params(optim.sgd(0.1))), [])[0]),
            "keeps 2 averages",
        ),
        (lambda: optim.average_params(optim.sgd(0.1)).update({}, None), "needs the parameters"),
    ],
)
def test_what_does_not_fit_is_said(call, text):
    with pytest.raises(OptimError, match=text):
        call()
