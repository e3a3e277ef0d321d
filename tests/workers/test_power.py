"""PowerSGD on one process: against a loop of torch, and what it refuses."""

import copy

import pytest
import torch
from torch import nn

import purestep as ps
from purestep.errors import ConfigError, StepError

WORKERS, RANK, START = 3, 2, 2


def model():
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.Flatten(), nn.Tanh(), nn.Linear(32, 12))


def loss_fn(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


def batches(count, samples=6):
    drawn = torch.Generator().manual_seed(0)
    return [
        {"x": torch.randn(samples, 3, 4, 4, generator=drawn), "y": torch.randn(samples, 12, generator=drawn)}
        for _ in range(count)
    ]


def by_hand(net, given, q):
    """Algorithms 1 and 2 of the paper, with means over workers; torch's optimizer applies what they give."""
    optimizer = torch.optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
    errors = {name: [torch.zeros_like(p) for _ in range(WORKERS)] for name, p in net.named_parameters()}
    for number, batch in enumerate(given):
        grads = []
        for x, y in zip(batch["x"].chunk(WORKERS), batch["y"].chunk(WORKERS), strict=True):
            net.zero_grad()
            loss_fn(net, {"x": x, "y": y}).backward()
            grads.append({name: p.grad.clone() for name, p in net.named_parameters()})
        for name, p in net.named_parameters():
            own = [each[name] for each in grads]
            if name not in q or number < START:
                p.grad = torch.stack(own).mean(0)
                continue
            owed = [(grad + error).flatten(1) for grad, error in zip(own, errors[name], strict=True)]
            left = torch.linalg.qr(torch.stack([m @ q[name] for m in owed]).mean(0)).Q
            q[name] = torch.stack([m.T @ left for m in owed]).mean(0)
            found = left @ q[name].T
            errors[name] = [(m - found).view_as(p) for m in owed]
            p.grad = found.view_as(p)
        optimizer.step()
    return dict(net.named_parameters()), errors


def test_params_and_errors_are_those_of_a_loop_of_torch():
    tx = ps.optim.sgd(0.1, momentum=0.9)
    step = ps.power_sgd(ps.make_step(loss_fn, tx), workers=WORKERS, rank=RANK, start=START)
    torch.manual_seed(2)
    net = model()
    state = step.begin(ps.init(net, tx))
    assert set(state.q) == {"0.weight", "3.weight"}
    params, errors = by_hand(copy.deepcopy(net), given := batches(9), {name: x.clone() for name, x in state.q.items()})
    for batch in given:
        state, metrics = step(state, batch)
    for name, value in state.train.params.items():
        torch.testing.assert_close(value, params[name].detach(), rtol=1e-4, atol=1e-5)
    for name, value in state.errors.items():
        torch.testing.assert_close(value * WORKERS, torch.stack(errors[name]), rtol=1e-4, atol=1e-5)
        assert float(value.abs().max()) > 1e-3
    assert float(metrics["loss"].weight) == 6


def test_steps_before_the_start_are_those_of_microbatches():
    tx = ps.optim.adamw(1e-2)
    alone = ps.init(model, tx, seed=1)
    whole = ps.make_step(loss_fn, tx, microbatches=3)
    step = ps.power_sgd(ps.make_step(loss_fn, tx), workers=3, rank=1, start=9)
    state = step.begin(alone)
    for batch in batches(3, samples=7):
        alone, one = whole(alone, batch)
        state, other = step(state, batch)
        assert ps.digest(one) == ps.digest(other)
    for name, value in state.train.params.items():
        torch.testing.assert_close(value, alone.params[name], rtol=1e-5, atol=1e-6)


def test_a_gradient_that_is_not_finite_leaves_no_error_behind():
    tx = ps.optim.apply_if_finite(ps.optim.sgd(0.1))
    step = ps.power_sgd(ps.make_step(loss_fn, tx), workers=2, rank=1)
    good, bad = batches(2)
    state, _ = step(step.begin(ps.init(model, tx)), good)
    bad["x"][0] = torch.inf
    skipped, metrics = step(state, bad)
    assert int(metrics["skipped"].compute()) == 1
    assert ps.digest((skipped.errors, skipped.q, skipped.train.params)) == ps.digest(
        (state.errors, state.q, state.train.params)
    )
    after, _ = step(skipped, good)
    assert all(bool(x.isfinite().all()) for x in ps.tree.leaves((after.errors, after.train.params)))


def test_what_cannot_be_compressed_is_refused():
    tx = ps.optim.sgd(0.1)
    inner = ps.make_step(loss_fn, tx)
    state = ps.init(model, tx)
    step = ps.power_sgd(inner, workers=2, rank=2)
    begun, batch = step.begin(state), batches(1)[0]
    cases = [
        (lambda: ps.power_sgd(ps.make_step(loss_fn, tx, plan=ps.sharding.ddp()), workers=2), "has a plan"),
        (lambda: ps.power_sgd(ps.make_step(loss_fn, tx, policy="16-mixed"), workers=2), "has a loss scale"),
        (lambda: ps.power_sgd(ps.make_step(loss_fn, tx, microbatches="auto"), workers=2), "microbatches to fit"),
        (lambda: ps.power_sgd(inner, workers=2, plan=ps.sharding.fsdp()), "a plan that splits no parameter"),
        (lambda: ps.power_sgd(inner, workers=2, rank=9).begin(state), "no gradient of the model would be compressed"),
        (lambda: step(state, batch), "takes a train state and the errors of its workers"),
        (lambda: ps.power_sgd(inner, workers=3, rank=2)(begun, batch), "state: 2 workers, rank 2; step: 3 workers"),
        (lambda: step.with_microbatches(3), "shared equally by the workers"),
        (lambda: ps.jit(step), "does not go into one graph"),
    ]
    for call, line in cases:
        with pytest.raises((ConfigError, StepError), match=line):
            call()
    assert step.with_microbatches(6).microbatch_count == 6
