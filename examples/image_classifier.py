"""Classify images: handwritten digits by default, any folder of images of your own with torchvision.

    python examples/image_classifier.py
    python examples/image_classifier.py --data IMAGES --model resnet50 --size 224 --batch 256 --epochs 90 \\
        --device cuda --policy bf16-mixed --workers 12
    purestep run examples/image_classifier.py --data IMAGES --processes 8 --plan ddp --microbatches 8 --device cuda

IMAGES has the folders `train` and `val`, and in each one folder for each class. The result is `val/accuracy`.
"""

from __future__ import annotations

import importlib
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps
from purestep.cli.command import main
from purestep.errors import DataError, explain

MEAN, STD = (0.485, 0.456, 0.406), (0.229, 0.224, 0.225)  # of ImageNet
POLICY = ps.precision.policy("32")


@dataclass(frozen=True)
class Settings:
    """What one may change.

    Args:
        data: folder with the folders train and val; the digits of scikit-learn without one.
        size: height and width of the images of a folder.
        model: a small network, or one of torchvision.
        lr: peak of the learning rate.
        batch: images of a batch.
        epochs: of the run and of the learning rate's schedule.
        policy: precision.
        plan: which process holds and computes what.
        microbatches: of a batch; fix it where the number of processes may change.
        workers: processes that load images.
        seed: seed of all random numbers.
    """

    data: Path | None = None
    size: int = 224
    model: Literal["small", "resnet18", "resnet50"] = "small"
    lr: float = 3e-3
    batch: int = 64
    epochs: int = 12
    policy: ps.precision.Policy = POLICY
    plan: ps.sharding.Plan | None = None
    microbatches: int = 1
    workers: int = 0
    seed: int = 0


def torchvision() -> Any:
    """Return torchvision, or say how to get it."""
    try:
        return importlib.import_module("torchvision")
    except (ImportError, RuntimeError) as error:  # RuntimeError: it was built for another torch
        what = "a folder of images, and the models with a name, need torchvision"
        raise DataError(explain(what, why=str(error), instead="pip install torchvision")) from error


class Folder:
    """A folder of torchvision as samples {"image": float32[3, size, size], "label": int}."""

    def __init__(self, root: Path, size: int) -> None:
        vision = torchvision()
        if not root.is_dir():
            where = f"{root} is no folder"
            raise DataError(explain("there are no images", where=where, instead="--data FOLDER, with train/ and val/"))
        transforms = vision.transforms
        steps = [transforms.Resize(size * 8 // 7), transforms.CenterCrop(size), transforms.ToTensor()]
        self.images = vision.datasets.ImageFolder(root, transforms.Compose([*steps, transforms.Normalize(MEAN, STD)]))
        self.classes = len(self.images.classes)

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> dict[str, Any]:
        image, label = self.images[index]
        return {"image": image, "label": label}


def digits() -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """Return four fifths of the digits to learn from, and one fifth to be judged by: float32[n, 1, 8, 8] in [0, 1]."""
    found = load_digits()
    order = np.random.default_rng(0).permutation(len(found.target))
    samples = {"image": (found.images[order, None] / 16).astype(np.float32), "label": found.target[order]}
    held = len(order) // 5
    return tuple({name: column[part] for name, column in samples.items()} for part in (np.s_[held:], np.s_[:held]))


def shift(sample: dict[str, torch.Tensor], key: torch.Tensor) -> dict[str, torch.Tensor]:
    """Move an image by up to an eighth of its size: a function of the sample and its key, so a resume repeats it."""
    image = sample["image"]
    size, most = image.shape[-1], image.shape[-1] // 8
    down, right = ps.random.randint(key, (2,), 0, 2 * most + 1).tolist()
    padded = nn.functional.pad(image, (most,) * 4)
    return {**sample, "image": padded[:, down : down + size, right : right + size]}


def small(channels: int, classes: int) -> nn.Module:
    def block(inputs: int, outputs: int) -> list[nn.Module]:
        return [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]

    first = [*block(channels, 32), *block(32, 32), nn.MaxPool2d(2)]
    second = [*block(32, 64), nn.AdaptiveAvgPool2d(2), nn.Flatten(), nn.Dropout(0.2)]
    return nn.Sequential(*first, *second, nn.Linear(64 * 4, classes))


def loss_fn(net: nn.Module, batch: dict[str, torch.Tensor]) -> tuple[torch.Tensor, dict[str, object]]:
    logits = net(batch["image"])
    smoothing = 0.1 if net.training else 0.0
    loss = cross_entropy(logits, batch["label"], label_smoothing=smoothing)
    return loss, {"accuracy": ps.metrics.accuracy(logits, batch["label"])}


@ps.experiment
def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    if settings.data is None:
        (train_set, held_out), channels, classes = digits(), 1, 10
    else:
        train_set, held_out = (Folder(settings.data / part, settings.size) for part in ("train", "val"))
        channels, classes = 3, train_set.classes

    def make_model() -> nn.Module:
        if settings.model == "small":
            return small(channels, classes)
        return getattr(torchvision().models, settings.model)(num_classes=classes)

    workers = settings.workers
    train = ps.data.batches(train_set, settings.batch, seed=settings.seed, transform=shift, num_workers=workers)
    judged = ps.data.batches(held_out, 256, shuffle=False, drop_last=False, num_workers=workers)
    total = settings.epochs * len(train)
    schedule = ps.optim.warmup_cosine_decay_schedule(0.0, settings.lr, warmup_steps=total // 10, decay_steps=total)
    tx = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(schedule, weight_decay=0.05))
    policy, plan = settings.policy, settings.plan
    return ps.Experiment(
        ps.make_step(loss_fn, tx, policy=policy, plan=plan, microbatches=settings.microbatches),
        policy.apply(ps.init(make_model, tx, seed=settings.seed, plan=plan)),
        train,
        until=ps.epochs(settings.epochs),
        free_settings=["workers"],  # a resume may change it: no bit depends on it
        callbacks=[
            ps.callbacks.learning_rate(tx, every=ps.every.epoch()),
            ps.callbacks.evaluate(ps.make_eval(loss_fn, policy=policy, plan=plan), judged, every=ps.every.epoch()),
            ps.callbacks.snapshots(every=ps.every.epoch(), keep=ps.snapshot.best("val/accuracy", 1, mode="max")),
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main(["run", __file__, *sys.argv[1:]]))
