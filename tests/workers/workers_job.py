"""One process of several: runs of workers that train apart, their digests and what they send, written down as JSON.

Arguments: a directory, the sizes of the jobs to be part of one after the other, this process's number, and the checks.
"""

import sys
from pathlib import Path

import torch
from torch import nn

import purestep as ps
from purestep.distributed import collectives

STEPS, EVERY = 8, 3


class Net(nn.Module):
    """BatchNorm, dropout, a frozen parameter, a table that no step changes, and shapes that make odd addresses."""

    def __init__(self, norm=nn.BatchNorm1d):
        super().__init__()
        self.embed, self.norm, self.drop = nn.Linear(5, 7), norm(7), nn.Dropout(0.3)
        self.head, self.scale = nn.Linear(7, 3), nn.Parameter(torch.rand(3), requires_grad=False)
        self.register_buffer("table", torch.rand(3))

    def forward(self, x):
        return self.head(self.drop(self.norm(self.embed(x)).relu())) * self.scale + self.table


def loss_fn(net, batch):
    scores = net(batch["x"])
    return nn.functional.cross_entropy(scores, batch["y"]), {"largest": ps.metrics.Max(scores.max())}


def samples(count=43):
    drawn = torch.Generator().manual_seed(3)
    return {"x": torch.randn(count, 5, generator=drawn), "y": torch.randint(3, (count,), generator=drawn)}


def adamw():
    return ps.optim.adamw(1e-2)


def step_of(kind, reduction="tree"):
    tx, plan = adamw(), ps.sharding.ddp(reduction=reduction)
    inner = ps.make_step(loss_fn, tx, microbatches=2 if kind == "microbatches" else 1)
    settings = {
        "apart": {},
        "microbatches": {"average_optimizer": True},
        "start": {"start": 4},
        "compiled": {},
    }
    if kind == "compiled":
        inner = ps.jit(inner, backend="eager")
    if kind == "diloco":
        return ps.diloco(inner, workers=4, every=EVERY, start=1, plan=plan)
    return ps.local_sgd(inner, workers=4, every=EVERY, plan=plan, **settings[kind])


def begun(step):
    return step.begin(ps.init(Net, adamw(), seed=5))


def run(step, until=STEPS, **settings):
    # 43 samples in batches of 22: the last one has 21. Neither is even for 4 workers, and epochs end inside of rounds.
    data = ps.data.batches(samples(), 22, seed=1)
    return ps.fit(step, begun(step), data, until=ps.steps(until), loggers=[], **settings)


def bits(kind, reduction="tree"):
    result = run(step_of(kind, reduction))
    mean = ps.average_workers(result.state)
    return [ps.digest(result.state), ps.digest(mean), {name: float(x) for name, x in result.metrics.items()}]


def ragged():
    """Batches of fewer samples than workers: the last ones have nothing to do."""
    step = step_of("apart")
    state, rows = step.begin(ps.init(lambda: Net(nn.LayerNorm), adamw(), seed=5)), []
    for count in (3, 9, 1, 2, 5):
        state, metrics = step(state, samples(count))
        rows.append({name: float(metric.compute()) for name, metric in metrics.items()})
    return [ps.digest(state), rows]


def evaluated():
    val = ps.data.batches(samples(20), 6, shuffle=False)
    evaluate = ps.callbacks.evaluate(loss_fn, val, every=ps.every.steps(4), of=ps.average_workers)
    result = run(step_of("diloco"), callbacks=[evaluate])
    return {name: float(x) for name, x in result.metrics.items()}


def resumed(directory, size):
    """Four processes begin a run, two go on with it, one ends it."""
    until = {4: 2, 2: 5, 1: STEPS}[size]
    result = run(step_of("diloco"), until, run_dir=f"{directory}/run", callbacks=[ps.callbacks.snapshots()])
    return ps.digest(result.state)


def power(start=1, norm=nn.BatchNorm1d):
    """A step of PowerSGD, and its first state."""
    tx = adamw()
    step = ps.power_sgd(ps.make_step(loss_fn, tx, microbatches=2), workers=4, rank=1, start=start)
    return step, step.begin(ps.init(lambda: Net(norm), tx, seed=5))


def power_run(until=STEPS, **settings):
    step, state = power()
    data = ps.data.batches(samples(), 22, seed=1)
    result = ps.fit(step, state, data, until=ps.steps(until), loggers=[], **settings)
    return [ps.digest(result.state), {name: float(x) for name, x in result.metrics.items()}]


def power_resumed(directory, size):
    until = {4: 2, 2: 5, 1: STEPS}[size]
    return power_run(until, run_dir=f"{directory}/power", callbacks=[ps.callbacks.snapshots()])


def power_ragged():
    """Batches of fewer samples than workers: some have no gradient, and send what they still owe."""
    step, state = power(norm=nn.LayerNorm)
    for count in (9, 3, 1, 2, 5):
        state, metrics = step(state, samples(count))
    return [ps.digest(state), ps.digest(metrics)]


def sent():
    step = step_of("diloco")
    state = begun(step)
    return [sum(x.numel() * x.element_size() for x in state.outer.params.values()), *sent_by(step, state)]


def power_sent():
    step, state = power(start=2)
    return [sum(x.numel() * x.element_size() for x in state.train.params.values()), *sent_by(step, state)]


def sent_by(step, state):
    """Bytes that this rank hands to collectives in each step; what came of it."""
    counted = [0]
    originals = {name: getattr(collectives, name) for name in ("gather", "exchange", "swap", "sum_into")}

    def counting(original):
        def call(values, *args):
            counted[-1] += values.numel() * values.element_size()
            return original(values, *args)

        return call

    for name, original in originals.items():
        setattr(collectives, name, counting(original))
    try:
        for _ in range(STEPS):
            state, metrics = step(state, samples(22))
            counted.append(0)
    finally:
        for name, original in originals.items():
            setattr(collectives, name, original)
    return [counted[:-1], ps.digest(state), ps.digest(metrics)]


def unplaced():
    step = step_of("apart")
    state = step.begin(ps.init(Net, adamw(), seed=5))
    whole = step.plan.gather(state)
    said = []
    for call in (lambda: step(whole, samples(11)), lambda: ps.local_sgd(step.step, workers=6, every=2).begin(whole)):
        try:
            call()
        except ps.errors.ConfigError as error:
            said.append(str(error))
    return said


def checks(directory, size):
    kinds = ("apart", "microbatches", "start", "diloco", "compiled")
    found = {kind: lambda kind=kind: bits(kind) for kind in kinds}
    found |= {"fast": lambda: bits("apart", "fast"), "ragged": ragged, "evaluated": evaluated}
    found |= {"resumed": lambda: resumed(directory, size), "sent": sent}
    found |= {"power": power_run, "power_ragged": power_ragged, "power_sent": power_sent}
    found |= {"power_resumed": lambda: power_resumed(directory, size)}
    return found if size < 4 else found | {"unplaced": unplaced}


def main(directory, sizes, number, wanted):
    answer(directory, sizes, number, lambda size: checks(directory, size).items(), wanted.__contains__)


if __name__ == "__main__":
    sys.path.append(str(Path(__file__).parents[1] / "shared"))
    from shared_ranks import answer

    main(sys.argv[1], [int(n) for n in sys.argv[2].split(",")], int(sys.argv[3]), sys.argv[4].split(";"))
