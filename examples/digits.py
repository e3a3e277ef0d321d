"""Learn the 1,797 handwritten digits that scikit-learn ships: the main example, start to end.

Run it, kill it, run it again: it continues where it was and ends with the same digest.

    python examples/digits.py --run-dir runs/digits
    purestep run examples/digits.py --lr 1e-3 --until 5epochs
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps

EPOCHS = 30
BATCH = 64
LEARNING_RATE = 3e-3
WEIGHT_DECAY = 0.05
PATIENCE = 12
WORKERS = 2
SEED = 0
POLICY = ps.precision.policy("32")
BITS = "portable" if ps.bits.portable_here() else "native"  # portable: one digest on every x86-64 machine


def load() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return (train, held-out) sets: four fifths and one fifth, in a fixed random order."""
    digits = load_digits()
    images = (digits.images[:, None] / 16.0).astype(np.float32)  # (1797, 1, 8, 8), in [0, 1]
    order = np.random.default_rng(0).permutation(len(images))
    fifth = len(images) // 5
    held, rest = order[:fifth], order[fifth:]
    return (
        {"image": images[rest], "label": digits.target[rest]},
        {"image": images[held], "label": digits.target[held]},
    )


def shift(sample: dict[str, torch.Tensor], key: torch.Tensor) -> dict[str, torch.Tensor]:
    """Move an image by up to one pixel each way: a function of the sample and its key, run in the workers."""
    down, right = ps.random.randint(key, (2,), 0, 3).tolist()
    padded = nn.functional.pad(sample["image"], (1, 1, 1, 1))
    return {**sample, "image": padded[:, down : down + 8, right : right + 8]}


def make_model() -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    return nn.Sequential(
        *block(1, 32),
        *block(32, 32),
        nn.MaxPool2d(2),
        *block(32, 64),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Dropout(0.3),
        nn.Linear(64 * 2 * 2, 10),
    )


def loss_fn(net: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, object]]:
    logits = net(batch["image"])
    return cross_entropy(logits, batch["label"]), {"accuracy": ps.metrics.accuracy(logits, batch["label"])}


@dataclass(frozen=True)
class Settings:
    """The settings of the experiment.

    Args:
        lr: peak of the learning rate.
        weight_decay: of AdamW.
        epochs: of the learning rate's schedule; the run ends after them.
        until: another end of the run.
        policy: precision.
        workers: processes that load data.
        seed: seed of all random numbers.
    """

    lr: float = LEARNING_RATE
    weight_decay: float = WEIGHT_DECAY
    epochs: int = EPOCHS
    until: ps.Until | None = None
    policy: ps.precision.Policy = POLICY
    workers: int = WORKERS
    seed: int = SEED


def held_out_data(held_out: dict[str, np.ndarray]) -> ps.data.Batches:
    return ps.data.batches(held_out, 256, shuffle=False, drop_last=False)


@ps.experiment
def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    train_set, held_out = load()
    train = ps.data.batches(train_set, BATCH, seed=settings.seed, transform=shift, num_workers=settings.workers)

    total = settings.epochs * len(train)
    schedule = ps.optim.warmup_cosine_decay_schedule(0.0, settings.lr, warmup_steps=total // 10, decay_steps=total)
    tx = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(schedule, weight_decay=settings.weight_decay))
    policy = settings.policy
    step = ps.make_step(loss_fn, tx, policy=policy)
    evaluation = ps.make_eval(loss_fn, policy=policy)
    return ps.Experiment(
        step,
        policy.apply(ps.init(make_model, tx, seed=settings.seed)),
        train,
        until=settings.until or ps.epochs(settings.epochs),
        free_settings=["workers"],  # a resume may change it: no bit depends on it
        callbacks=[
            ps.callbacks.log(every=ps.every.steps(10)),
            ps.callbacks.learning_rate(step.tx, every=ps.every.steps(10)),
            ps.callbacks.evaluate(evaluation, held_out_data(held_out), every=ps.every.epoch()),
            ps.callbacks.early_stopping("val/loss", patience=PATIENCE),
            ps.callbacks.snapshots(
                every=ps.every.epoch(),
                keep=ps.snapshot.best("val/accuracy", 2, mode="max") | ps.snapshot.latest(1),
            ),
        ],
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--run-dir", type=Path, default=Path("runs/digits"))
    parser.add_argument("--epochs", type=int, default=EPOCHS)
    parser.add_argument("--workers", type=int, default=WORKERS)
    parser.add_argument("--seed", type=int, default=SEED)
    parser.add_argument("--precision", default="32", choices=[n for n in ps.precision.NAMES if n != "float8"])
    parser.add_argument("--bits", default=BITS, choices=["portable", "native"], help="native: faster, see docs/bits.md")
    args = parser.parse_args()
    if args.bits == "portable" and ps.bits.mode() == "native":
        ps.bits.portable()

    policy = ps.precision.policy(args.precision)
    digits = experiment(Settings(epochs=args.epochs, workers=args.workers, seed=args.seed, policy=policy))
    result = digits.fit(run_dir=args.run_dir, loggers=[ps.loggers.csv(), ps.loggers.tensorboard()])
    if result.interrupted:
        print(f"interrupted by {result.reason} after {result.loop.cursor.batches} batches; run it again to continue")
        return result.exit_code

    curves = args.run_dir / "learning_curves.png"
    ps.display.learning_curves(args.run_dir / "metrics.csv", curves)
    best = ps.restore(args.run_dir, like=digits.state, best="val/accuracy", mode="max")
    accuracy = evaluate(ps.make_eval(loss_fn, policy=policy), best, held_out_data(load()[1]))
    report = {
        "why it ended": result.reason,
        "epochs, updates": f"{result.loop.cursor.epoch}, {int(result.state.step)}",
        "held-out accuracy, last": f"{result.metrics['val/accuracy']:.2%}",
        "held-out accuracy, best kept": f"{accuracy:.2%}",
        "digest of the last state": ps.digest(result.state),
        "time in training": f"{result.loop.elapsed:.1f} s",
        "learning curves": str(curves),
        "run directory": str(args.run_dir),
    }
    width = max(len(name) for name in report)
    print("\n".join(f"{name:<{width}}  {value}" for name, value in report.items()))
    return 0


def evaluate(eval_step: Any, state: ps.TrainState, val: ps.data.Batches) -> float:
    """Accuracy of any state, by the first level of the API: a pure evaluation step in a loop of our own."""
    total = None
    for batch in val.open(0, 0, None):
        accuracy = eval_step(state, batch)["accuracy"]
        total = accuracy if total is None else total.merge(accuracy)
    return float(total)


if __name__ == "__main__":
    raise SystemExit(main())
