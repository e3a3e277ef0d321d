"""One process of several: train with transformations as users write them, and write the digests down as JSON.

Arguments: a directory, the number of processes, this process's number.
"""

import json
import sys
import traceback
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import purestep as ps
from purestep import optim, tree

NAMES = ("0.weight", "0.bias", "2.weight", "2.bias")


@tree.pytree
class Held:
    tensors: list


@optim.transformation
class UnitNorm(optim.GradientTransformation):
    def update(self, updates, state, params=None, **extra):
        return tree.map(lambda g: g / g.norm(), updates), state


@optim.transformation
class ByPosition(optim.GradientTransformation):
    """Keeps one tensor a parameter, by position instead of by name."""

    def init(self, params):
        return Held([torch.zeros_like(p) for p in tree.leaves(params)])

    def update(self, updates, state, params=None, **extra):
        gs, structure = tree.flatten(updates)
        held = [0.5 * h + g / g.norm() for h, g in zip(state.tensors, gs, strict=True)]
        return tree.unflatten(structure, held), Held(held)


@optim.transformation
class OnSphere(optim.GradientTransformation):
    """Descends, and puts each parameter back on the sphere of radius 2."""

    def update(self, updates, state, params=None, **extra):
        return tree.map(lambda g: -0.1 * g, updates), state

    def apply(self, params, updates, state):
        return tree.map(lambda p, u: 2 * (p + u) / (p + u).norm(), params, updates)


@optim.transformation
class InOnePass(optim.GradientTransformation):
    def advance(self, updates, state, params, *, reuse=False, **extra):
        return tree.map(lambda p, g: p - 0.1 * g / g.norm(), params, updates), state


@optim.transformation
class Momentum(optim.Rule):
    memory = ("mean",)

    def direction(self, gs, memory, t, ps):
        mean = [0.9 * m + g / g.norm() for m, g in zip(memory["mean"], gs, strict=True)]
        return mean, {"mean": mean}


@optim.transformation
class Averaged(optim.GradientTransformation):
    """Looks at all gradients, and keeps the state of what is in it as its own."""

    inner: optim.GradientTransformation

    def init(self, params):
        return self.inner.init(params)

    def update(self, updates, state, params=None, **extra):
        total = torch.stack([u.abs().max() for u in tree.leaves(updates)]).max()
        return self.inner.update(tree.map(lambda u: u / total, updates), state, params, **extra)


@optim.transformation
class Twice(Averaged):
    """Speaks of itself only: what is in it is given what it needs."""

    scope = "element"

    def update(self, updates, state, params=None, **extra):
        return self.inner.update(tree.map(lambda u: 2 * u, updates), state, params, **extra)


ROWS = {
    "unit norm": optim.chain(UnitNorm(), optim.sgd(0.1)),
    "by position": optim.chain(ByPosition(), optim.sgd(0.1)),
    "sphere": OnSphere(),
    "sphere under averages": optim.average_params(OnSphere(), decay=0.5),
    "one pass": InOnePass(),
    "rule": optim.chain(Momentum(), optim.sgd(0.1, 0.9)),
    "wrapper": Averaged(optim.adamw(1e-2)),
    "wrapper that speaks of itself": Twice(optim.chain(Momentum(), optim.adamw(1e-2))),
    "masked": optim.chain(optim.masked(UnitNorm(), {name: "weight" in name for name in NAMES}), optim.sgd(0.1)),
    "partition": optim.partition(
        {"a": optim.chain(UnitNorm(), optim.sgd(0.1)), "b": optim.adamw(1e-2)},
        {name: "a" if "weight" in name else "b" for name in NAMES},
    ),
    "a lifted one in a chain": optim.chain(optim.clip_by_value(0.5), optim.lift(torch.optim.SGD, lr=0.1, momentum=0.9)),
    "layers by themselves": optim.lamb(1e-2),
}


def train(tx, plan):
    state = ps.init(lambda: nn.Sequential(nn.Linear(8, 6), nn.Tanh(), nn.Linear(6, 5)), tx, seed=0, plan=plan)
    step = ps.make_step(lambda net, x: net(x).square().mean(), tx, plan=plan, microbatches=2)
    x = torch.linspace(-1, 1, 32).reshape(4, 8)
    for _ in range(3):
        state, _ = step(state, x)
    return tree.digest((state.params, state.opt_state))


def main(directory, size, number):
    torch.set_num_threads(1)
    if size > 1:
        dist.init_process_group("gloo", init_method=f"file://{directory}/store", rank=number, world_size=size)
    plans = {"none": None} if size == 1 else {"fsdp": ps.sharding.fsdp(), "ddp": ps.sharding.ddp()}
    found = {}
    for name, tx in ROWS.items():
        for label, plan in plans.items():
            try:
                found[f"{name}|{label}"] = train(tx, plan)
            except Exception:
                found[f"{name}|{label}"] = traceback.format_exc()
    (Path(directory) / f"{size}-{number}.json").write_text(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]), int(sys.argv[3]))
