"""Local SGD and DiLoCo on one process: against loops of torch's optimizers, against ordinary steps, and refusals."""

import copy

import pytest
import torch
from shared_marks import slow_but
from torch import nn

import purestep as ps
from purestep.errors import ConfigError, StepError
from purestep.workers.state import averaged_fields

WORKERS, EVERY = 3, 4


def model():
    return nn.Sequential(nn.Linear(5, 7), nn.Tanh(), nn.Linear(7, 2))


def loss_fn(net, batch):
    return (net(batch["x"]) - batch["y"]).square().mean()


def batches(count, samples=6, seed=0):
    drawn = torch.Generator().manual_seed(seed)
    shape = (count, samples)
    return [
        {"x": x, "y": y}
        for x, y in zip(torch.randn(*shape, 5, generator=drawn), torch.randn(*shape, 2, generator=drawn), strict=True)
    ]


def by_hand(first, given, inner, outer=None, start=0, averages_optimizer=False):
    """Local SGD as a loop over modules of torch: the params of all workers after the last batch."""
    nets = [copy.deepcopy(first) for _ in range(WORKERS)]
    optimizers = [inner(net.parameters()) for net in nets]
    began = copy.deepcopy(first)
    outer_optimizer = outer and outer(began.parameters())
    for number, batch in enumerate(given):
        shares = zip(batch["x"].chunk(WORKERS), batch["y"].chunk(WORKERS), strict=True)
        for net, optimizer, (x, y) in zip(nets, optimizers, shares, strict=True):
            optimizer.zero_grad()
            loss_fn(net, {"x": x, "y": y}).backward()
        if number < start:
            for group in zip(*(net.parameters() for net in nets), strict=True):
                mean = torch.stack([p.grad for p in group]).mean(0)
                for p in group:
                    p.grad = mean.clone()
        for optimizer in optimizers:
            optimizer.step()
        if number < start:
            began.load_state_dict(nets[0].state_dict())
        elif (number + 1 - start) % EVERY == 0:
            with torch.no_grad():
                means = [torch.stack(group).mean(0) for group in zip(*(n.parameters() for n in nets), strict=True)]
                if outer_optimizer is not None:
                    for p, mean in zip(began.parameters(), means, strict=True):
                        p.grad = p - mean
                    outer_optimizer.step()
                    means = list(began.parameters())
                for net in nets:
                    for p, mean in zip(net.parameters(), means, strict=True):
                        p.copy_(mean)
                if averages_optimizer:
                    for group in zip(*(net.parameters() for net in nets), strict=True):
                        held = [o.state[p] for o, p in zip(optimizers, group, strict=True)]
                        mean = torch.stack([state["momentum_buffer"] for state in held]).mean(0)
                        for state in held:
                            state["momentum_buffer"] = mean.clone()
    return [dict(net.named_parameters()) for net in nets]


def sgd(params):
    return torch.optim.SGD(params, lr=0.1, momentum=0.9)


def nesterov(params):
    return torch.optim.SGD(params, lr=0.7, momentum=0.9, nesterov=True)


CASES = {
    "local": (ps.optim.sgd(0.1, momentum=0.9), sgd, {}, {}),
    "post-local": (ps.optim.sgd(0.1, momentum=0.9), sgd, {"start": 3}, {"start": 3}),
    "momentum": (ps.optim.sgd(0.1, momentum=0.9), sgd, {"average_optimizer": True}, {"averages_optimizer": True}),
    "diloco": (
        ps.optim.adamw(1e-2, weight_decay=0.1),
        lambda params: torch.optim.AdamW(params, lr=1e-2, weight_decay=0.1),
        {},
        {},
    ),
    "diloco, later": (ps.optim.adam(1e-2), lambda p: torch.optim.Adam(p, lr=1e-2), {"start": 3}, {"start": 3}),
}


@pytest.mark.parametrize("case", slow_but(CASES, "post-local", "diloco"))
def test_workers_have_the_params_of_a_loop_of_torch(case):
    tx, inner, settings, by_hand_settings = CASES[case]
    diloco = case.startswith("diloco")
    made = ps.diloco if diloco else ps.local_sgd
    step = made(ps.make_step(loss_fn, tx), workers=WORKERS, every=EVERY, **settings)
    torch.manual_seed(4)
    first = model()
    state = step.begin(ps.init(first, tx))
    given = batches(14)
    for batch in given:
        state, metrics = step(state, batch)
    expected = by_hand(first, given, inner, nesterov if diloco else None, **by_hand_settings)
    for number, worker in enumerate(ps.unstack(state.workers)):
        for name, value in worker.params.items():
            torch.testing.assert_close(value, expected[number][name].detach(), rtol=2e-5, atol=2e-6)
    assert int(state.step) == 14
    assert float(metrics["loss"].weight) == 6


def test_one_worker_has_the_bits_of_an_ordinary_training():
    tx = ps.optim.adamw(1e-2)
    inner = ps.make_step(loss_fn, tx)
    first = ps.init(lambda: nn.Sequential(nn.Linear(5, 7), nn.Dropout(0.5), nn.Linear(7, 2)), tx, seed=1)
    step = ps.local_sgd(inner, workers=1, every=2)
    alone, state = first, step.begin(first)
    for batch in batches(5):
        alone, _ = inner(alone, batch)
        state, _ = step(state, batch)
    assert ps.digest(ps.unstack(state.workers)[0]) == ps.digest(alone)


def test_steps_before_the_start_have_the_bits_of_microbatches():
    tx = ps.optim.adamw(1e-2)
    make = lambda: nn.Sequential(nn.Linear(5, 7), nn.BatchNorm1d(7), nn.Dropout(0.5), nn.Linear(7, 2))  # noqa: E731
    whole = ps.make_step(loss_fn, tx, microbatches=6)
    step = ps.local_sgd(ps.make_step(loss_fn, tx, microbatches=2), workers=3, every=2, start=4)
    alone = ps.init(make, tx, seed=1)
    state = step.begin(alone)
    for batch in batches(4, samples=13):
        alone, one = whole(alone, batch)
        state, other = step(state, batch)
        assert ps.digest(one) == ps.digest(other)
    assert [ps.digest(worker) for worker in ps.unstack(state.workers)] == [ps.digest(alone)] * 3


def test_workers_draw_masks_of_their_own_and_keep_what_is_frozen():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.body, self.head = nn.Linear(5, 40), nn.Linear(40, 2)
            self.register_buffer("table", torch.rand(40))

        def forward(self, x):
            return self.head(torch.nn.functional.dropout(self.body(x) * self.table, 0.5))

    tx = ps.optim.sgd(0.1)
    step = ps.local_sgd(ps.make_step(loss_fn, tx), workers=7, every=2)
    first = ps.init(Net, tx, frozen="body.*", seed=3)
    state, _ = step(step.begin(first), {"x": torch.ones(7, 5), "y": torch.ones(7, 2)})
    assert len({ps.digest(worker.params) for worker in ps.unstack(state.workers)}) == 7
    state, _ = step(state, {"x": torch.ones(7, 5), "y": torch.ones(7, 2)})
    for worker in [*ps.unstack(state.workers), ps.average_workers(state)]:
        assert ps.digest(worker.buffers) == ps.digest(first.buffers)
        assert ps.digest(worker.rng) == ps.digest(first.rng)
    assert len({ps.digest(worker.params) for worker in ps.unstack(state.workers)}) == 1


def test_a_mean_is_taken_of_what_trains():
    tx = ps.optim.adam(0.1)
    state = ps.init(lambda: nn.Sequential(nn.Linear(2, 2), nn.BatchNorm1d(2)), tx, frozen="0.bias")
    named = dict(zip(ps.tree.names(state), averaged_fields(state, optimizer=False).dtypes, strict=True))
    taken = {name for name, dtype in named.items() if dtype is not None}
    assert taken == {
        *(f"params.{name}" for name in state.params),
        "buffers.1.running_mean",
        "buffers.1.running_var",
    }
    more = averaged_fields(state, optimizer=True).dtypes
    assert sum(dtype is not None for dtype in more) == len(taken) + 2 * len(state.params)


def test_a_run_saves_resumes_evaluates_and_exports(tmp_path):
    tx = ps.optim.adamw(1e-2)
    step = ps.diloco(ps.make_step(loss_fn, tx), workers=2, every=3)
    data = {name: torch.cat([batch[name] for batch in batches(4)]) for name in ("x", "y")}
    val = ps.callbacks.evaluate(loss_fn, ps.data.batches(data, 5), every=ps.every.steps(3), of=ps.average_workers)

    def run(until, run_dir=None):
        callbacks = [val, *([ps.callbacks.snapshots()] if run_dir else [])]
        train = ps.data.batches(data, 7, seed=2)
        state = step.begin(ps.init(model, tx, seed=1))
        return ps.fit(step, state, train, until=ps.steps(until), callbacks=callbacks, loggers=[], run_dir=run_dir)

    straight = run(6)
    run(4, tmp_path)
    resumed = run(6, tmp_path)
    assert ps.digest(straight.state) == ps.digest(resumed.state)
    assert straight.metrics == resumed.metrics
    assert {"train/loss_epoch", "val/loss"} <= straight.metrics.keys()
    # A round has just ended, so the mean is what every worker has, and what the outer optimizer made.
    mean = ps.average_workers(straight.state)
    assert ps.digest(mean.params) == ps.digest(straight.state.outer.params)
    assert ps.to_module(mean)(data["x"]).shape == (24, 2)


def test_donating_and_wrapped_steps_have_the_same_bits():
    tx = ps.optim.sgd(0.1, momentum=0.9)
    step = ps.local_sgd(ps.make_step(loss_fn, tx), workers=2, every=2)
    wrapped = ps.wrap_step(step, lambda step, state, batch: step(state, batch))
    found = set()
    for each in (step, wrapped, ps.donate(step)):
        state = step.begin(ps.init(model, tx, seed=1))
        for batch in batches(5):
            state, _ = each(state, batch)
        found.add(ps.digest(state))
    assert len(found) == 1


def refused(call, *lines):
    with pytest.raises((ConfigError, StepError)) as caught:
        call()
    for line in lines:
        assert line in str(caught.value), str(caught.value)


def test_what_workers_cannot_do_is_refused():
    tx = ps.optim.sgd(0.1)
    inner = ps.make_step(loss_fn, tx)

    def local(step=inner, **settings):
        return ps.local_sgd(step, **{"workers": 2, "every": 4} | settings)

    planned = ps.make_step(loss_fn, tx, plan=ps.sharding.ddp())
    refused(lambda: local(planned), "the step of a worker has a plan", "make_step")
    refused(lambda: local(ps.make_eval(loss_fn)), "the step of a worker evaluates")
    refused(lambda: local(ps.donate(inner)), "the step of a worker consumes its state")
    auto = ps.make_step(loss_fn, tx, microbatches="auto")
    refused(lambda: local(auto), "leaves its number of microbatches to fit")
    refused(lambda: local(ps.jit(inner, backend="eager"), start=3), "start= needs a step of make_step")
    halves = ps.make_step(loss_fn, tx, policy="bf16-master")
    refused(lambda: local(halves), "master weights", "average_optimizer=True")
    refused(lambda: local(plan=ps.sharding.fsdp()), "a plan that splits no parameter", "ps.sharding.ddp()")
    refused(lambda: ps.diloco(inner, workers=2, every=4, outer="sgd"), "outer")
    state = ps.init(model, tx)
    refused(lambda: local()(state, batches(1)[0]), "takes the state of all of them", "step.begin(")
    begun = local().begin(state)
    refused(lambda: local(workers=3)(begun, batches(1)[0]), "2 workers, no outer optimizer", "step: 3 workers")
    diloco = ps.diloco(inner, workers=2, every=4)
    refused(lambda: diloco(begun, batches(1)[0]), "an outer optimizer")
    refused(lambda: local().with_microbatches(3), "shared equally by the workers", "microbatches=4")
    refused(lambda: ps.jit(local()), "does not go into one graph", "ps.local_sgd(ps.jit(step)")
    assert local().with_microbatches(4).microbatch_count == 4


def test_a_plan_of_workers_describes_where_they_live():
    tx = ps.optim.sgd(0.1, momentum=0.9)
    step = ps.diloco(ps.make_step(loss_fn, tx), workers=4, every=4)
    state = step.begin(ps.init(model, tx))
    rows = {row.path: row for row in step.plan.on({"data": 2}).describe(state).rows}
    assert rows[".workers.params['0.weight']"].local == (2, 7, 5)
    assert rows[".outer.params['0.weight']"].local == (7, 5)
    assert rows[".workers.step"].local == (2,)
