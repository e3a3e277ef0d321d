"""An experiment in a file of its own, as users have one: for the tests of the command."""

from __future__ import annotations

from pathlib import Path

SOURCE = '''
"""Fit the sine of three numbers."""

import enum
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import torch
from torch import nn

import purestep as ps


class Noise(enum.Enum):
    none = 0
    some = 1


@dataclass(frozen=True)
class Mlp:
    """Two layers.

    Args:
        width: hidden units.
    """

    width: int = 16

    def make(self):
        return nn.Sequential(nn.Linear(3, self.width), nn.Dropout(0.1), nn.Linear(self.width, 1))


@dataclass(frozen=True)
class Linear:
    bias: bool = True

    def make(self):
        return nn.Linear(3, 1, bias=self.bias)


@dataclass(frozen=True)
class Data:
    """Where samples come from.

    Args:
        samples: of the set.
        batch: samples of a batch.
    """

    samples: int = 200
    batch: int = 20


@dataclass(frozen=True)
class Settings:
    """All that one may change.

    Args:
        seed: seed of all random numbers.
        scale: of the targets.
        model: the model to train.
        optimizer: the optimizer.
        until: the end of the run.
    """

    seed: int = 0
    scale: float = 1.0
    model: Mlp | Linear = Mlp()
    data: Data = Data()
    loss: Literal["square", "abs"] = "square"
    noise: Noise = Noise.none
    drop: float | None = None
    tags: tuple[str, ...] = ()
    sizes: list[int] = field(default_factory=lambda: [1])
    clip: bool = False
    out: Path = Path("somewhere")
    until: ps.Until = ps.epochs(2)
    policy: ps.precision.Policy = ps.precision.policy("32")
    optimizer: ps.optim.GradientTransformation = field(default_factory=lambda: ps.optim.adamw(3e-3))
    plan: ps.sharding.Plan | None = None


def experiment(settings: Settings) -> ps.Experiment:
    def loss_fn(net, batch):
        away = net(batch["x"]) - settings.scale * batch["y"]
        return away.square().mean() if settings.loss == "square" else away.abs().mean()

    torch.set_num_threads(1)
    x = ps.random.normal(ps.random.key(7), (settings.data.samples, 3))
    data = ps.data.batches({"x": x, "y": x.sin().sum(1, keepdim=True)}, settings.data.batch, seed=settings.seed)
    held = ps.data.batches({"x": x[:40], "y": x[:40].sin().sum(1, keepdim=True)}, 40, shuffle=False)
    tx = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), settings.optimizer) if settings.clip else settings.optimizer
    step = ps.make_step(loss_fn, tx, policy=settings.policy, plan=settings.plan, microbatches=4)
    state = settings.policy.apply(ps.init(settings.model.make, tx, seed=settings.seed, plan=settings.plan))
    evaluate = ps.make_eval(loss_fn, policy=settings.policy, plan=settings.plan)
    callbacks = [
        ps.callbacks.log(every=ps.every.steps(1)),
        ps.callbacks.evaluate(evaluate, held, every=ps.every.epoch()),
        ps.callbacks.snapshots(every=ps.every.epoch(), keep=ps.snapshot.all_()),
    ]
    return ps.Experiment(step, state, data, until=settings.until, callbacks=callbacks)


def broken(lr: float = -1.0) -> ps.Experiment:
    tx = ps.optim.sgd(lr)
    step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
    return ps.Experiment(step, ps.init(lambda: nn.Linear(3, 1), tx), ps.data.batches({"x": torch.ones(8, 3)}, 4))
'''


def write(directory: Path) -> Path:
    """Write the file, and return its path."""
    path = directory / "sine_experiment.py"
    path.write_text(SOURCE.lstrip())
    return path
