"""Fine-tune in stages: a network learns the digits 0 to 4, and then from a few samples 5 to 9.

    python examples/finetune.py
    purestep run examples/finetune.py --stage head --shots 5

Each stage is a run of its own that begins with the end of another:

    pretrain    all layers, on the digits 0 to 4
    head        a new last layer on few samples of 5 to 9; the body, from a file of weights, is frozen
    all         the body thawed (`ps.thaw`), with a learning rate of its own; the head's optimizer state goes on
    scratch     the same few samples without what was learned before, to compare

A parameter that is frozen (`ps.init(frozen=)`) has no gradient and no optimizer state; `ps.optim.conditionally_mask`
lets a part wait in one run. These images are so easy that `scratch` is as good as `all`: what is shown is how to do it.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import purestep as ps

BATCH = 25
STAGES = ("pretrain", "head", "all", "scratch")


@dataclass(frozen=True)
class Settings:
    """The settings of the experiment.

    Args:
        stage: what is trained, on what; the stages before it are trained first, or read where they have ended.
        root: directory with a run directory for each stage that others begin with.
        shots: samples of each of the digits 5 to 9 to train on.
        lr: learning rate of all layers in the stages `pretrain` and `scratch`.
        head_lr: learning rate of the head in the stages `head` and `all`.
        body_lr: learning rate of the thawed body.
        epochs: of the digits 0 to 4.
        few_epochs: of the few samples: this many with the body frozen, and then with all.
        width: channels of the first layer.
        seed: of all random numbers.
    """

    stage: Literal["pretrain", "head", "all", "scratch"] = "all"
    root: Path = Path("runs/finetune")
    shots: int = 10
    lr: float = 3e-3
    head_lr: float = 1e-2
    body_lr: float = 1e-3
    epochs: int = 12
    few_epochs: int = 15
    width: int = 32
    seed: int = 0


def load(new: bool, shots: int) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return samples to train on and those held out, of 0 to 4 or, if `new`, of 5 to 9; labels are 0 to 4 in both."""
    digits = load_digits()
    images, labels = (digits.images[:, None] / 16.0).astype(np.float32), digits.target
    order = np.random.default_rng(0).permutation(len(labels))
    order = order[(labels[order] >= 5) == new]
    # The first of each label are held out, so that they are the same for any number of shots.
    rank = np.array([np.sum(labels[order[:i]] == label) for i, label in enumerate(labels[order])])
    last = 60 + shots if new else len(order)
    parts = order[(rank >= 60) & (rank < last)], order[rank < 60]
    train, held_out = ({"image": images[part], "label": labels[part] % 5} for part in parts)
    return train, held_out


def make_model(width: int) -> nn.Module:
    body = nn.Sequential(
        *(nn.Conv2d(1, width, 3, padding=1), nn.ReLU(), nn.Conv2d(width, width, 3, padding=1), nn.ReLU()),
        *(nn.MaxPool2d(2), nn.Conv2d(width, 2 * width, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2), nn.Flatten()),
    )
    return nn.ModuleDict({"body": body, "head": nn.Linear(2 * width * 4, 5)})


def loss_fn(net: Any, batch: dict[str, Tensor]) -> tuple[Tensor, dict[str, object]]:
    logits = net["head"](net["body"](batch["image"]))
    return cross_entropy(logits, batch["label"]), {"accuracy": ps.metrics.accuracy(logits, batch["label"])}


def optimizer(settings: Settings) -> ps.optim.GradientTransformation:
    """Return Adam with a learning rate for each of two groups of parameters."""
    tuned = settings.stage in ("head", "all")
    rates = (
        {"body": settings.body_lr, "head": settings.head_lr} if tuned else {"body": settings.lr, "head": settings.lr}
    )
    parts = {name: ps.optim.adam(rate) for name, rate in rates.items()}
    return ps.optim.partition(parts, {"body": "body.*", "head": "head.*"})


def train(settings: Settings) -> ps.Result:
    """Train a stage, or read how it ended: a run that is complete is not trained again."""
    return experiment(settings).fit(run_dir=settings.root / settings.stage)


def first_state(settings: Settings, tx: ps.optim.GradientTransformation) -> ps.TrainState:
    """Return what a stage begins with."""
    if settings.stage == "head":
        weights = settings.root / "pretrained.pt"
        ps.save_weights(train(replace(settings, stage="pretrain")).state, weights)
        state = ps.init(lambda: make_model(settings.width), tx, seed=settings.seed + 1, frozen="body.*")
        return ps.load_weights(state, weights, keep="head.*", ignore="head.*")
    if settings.stage == "all":
        return ps.thaw(train(replace(settings, stage="head")).state, "body.*", tx)
    return ps.init(lambda: make_model(settings.width), tx, seed=settings.seed)


@ps.experiment
def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    samples, held_out = load(settings.stage != "pretrain", settings.shots)
    tx = optimizer(settings)
    evaluated = ps.data.batches(held_out, 100, shuffle=False, drop_last=False)
    epochs = {"pretrain": settings.epochs, "scratch": 2 * settings.few_epochs}.get(settings.stage, settings.few_epochs)
    return ps.Experiment(
        ps.make_step(loss_fn, tx),
        first_state(settings, tx),
        ps.data.batches(samples, BATCH, seed=settings.seed, drop_last=False),
        until=ps.epochs(epochs),
        callbacks=[ps.callbacks.evaluate(loss_fn, evaluated, every=ps.every.epoch(epochs))],
        free_settings=["root"],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--root", type=Path, default=Settings.root)
    for name in ("shots", "epochs", "few_epochs", "width", "seed"):
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=getattr(Settings, name))
    settings = Settings(**vars(parser.parse_args()))
    print(f"digits 5 to 9 from {settings.shots} samples of each; 300 others are held out\n")
    print("stage     trained parameters  held-out accuracy")
    for stage in STAGES:
        result = train(replace(settings, stage=stage))
        if result.interrupted:
            return result.exit_code
        trained = sum(p.numel() for p in result.state.params.values())
        print(f"{stage:<8}  {trained:>18,}  {result.metrics['val/accuracy']:.2%}", flush=True)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
