"""Learn the handwritten digits that scikit-learn ships: an experiment whose parts go by name.

purestep run examples/hydra/experiment.py --model Conv --optimizer lion --optimizer.learning_rate 3e-4
python examples/hydra/train.py model=conv optimizer=lion
"""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps

UNTIL = ps.epochs(5)


@dataclass(frozen=True)
class Mlp:
    """One hidden layer.

    Args:
        width: hidden units.
        dropout: probability.
    """

    width: int = 128
    dropout: float = 0.1

    def make(self) -> nn.Module:
        hidden = [nn.Linear(64, self.width), nn.GELU(), nn.Dropout(self.dropout)]
        return nn.Sequential(nn.Flatten(), *hidden, nn.Linear(self.width, 10))


@dataclass(frozen=True)
class Conv:
    """Two convolutions.

    Args:
        channels: of the first one.
    """

    channels: int = 16

    def make(self) -> nn.Module:
        first, second = self.channels, 2 * self.channels
        layers = [nn.Conv2d(1, first, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(first, second, 3, padding=1)]
        return nn.Sequential(*layers, nn.ReLU(), nn.Flatten(), nn.Linear(second * 16, 10))


@dataclass(frozen=True)
class Data:
    """Which samples.

    Args:
        samples: of the training set, at most 1,438.
        batch: samples of a batch.
    """

    samples: int = 1438
    batch: int = 64


@dataclass(frozen=True)
class Settings:
    """The settings of the experiment.

    Args:
        seed: seed of all random numbers.
        until: the end of the run.
        model: the model to train.
        optimizer: the optimizer.
        plan: which process holds and computes what.
        data: what it learns from.
    """

    seed: int = 0
    until: ps.Until = UNTIL
    model: Mlp | Conv = Mlp()
    optimizer: ps.optim.GradientTransformation = field(default_factory=lambda: ps.optim.adamw(3e-3))
    plan: ps.sharding.Plan | None = None
    data: Data = Data()


def loss_fn(net: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, object]]:
    logits = net(batch["image"])
    return cross_entropy(logits, batch["label"]), {"accuracy": ps.metrics.accuracy(logits, batch["label"])}


def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    digits = load_digits()
    order = np.random.default_rng(0).permutation(len(digits.images))
    samples = {"image": (digits.images[order, None] / 16).astype(np.float32), "label": digits.target[order]}
    held_out = {name: values[1438:] for name, values in samples.items()}
    known = {name: values[: settings.data.samples] for name, values in samples.items()}

    tx, plan = settings.optimizer, settings.plan
    return ps.Experiment(
        ps.make_step(loss_fn, tx, microbatches=4, plan=plan),
        ps.init(settings.model.make, tx, seed=settings.seed, plan=plan),
        ps.data.batches(known, settings.data.batch, seed=settings.seed),
        until=settings.until,
        callbacks=[
            ps.callbacks.evaluate(
                ps.make_eval(loss_fn, plan=plan),
                ps.data.batches(held_out, 128, shuffle=False, drop_last=False),
                every=ps.every.epoch(),
            ),
            ps.callbacks.snapshots(every=ps.every.epoch(), keep=ps.snapshot.latest(1)),
        ],
    )
