"""Segment images: a U-Net says of each pixel whether it is background, disc, square or triangle.

Images are drawn from keys, so the data set is a column of keys and costs no disk: shapes of one brightness on a
background of another, which a shape may be darker or brighter than, and noise. The result is `val/iou`, the mean over
the classes of intersection over union, counted over all pixels of the held-out images: a metric of its own, exact over
batches of different sizes and over ranks.

    python examples/segmentation.py
    python examples/segmentation.py --size 256 --width 64 --levels 4 --samples 20000 --batch 64 --epochs 50 \\
        --device cuda --policy bf16-mixed
    purestep run examples/segmentation.py --processes 2 --plan ddp --microbatches 2
"""

from __future__ import annotations

import sys
from dataclasses import dataclass

import torch
from torch import nn
from torch.nn.functional import cross_entropy, one_hot

import purestep as ps
from purestep.cli.command import main

CLASSES = 4  # background, disc, square, triangle
SHAPES = 3  # in an image; later ones lie over earlier ones
POLICY = ps.precision.policy("32")
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What one may change.

    Args:
        size: height and width of the images, a multiple of 2 ** levels.
        samples: training images; a quarter as many are held out.
        width: channels at the full size.
        levels: how often the size is halved.
        lr: peak of the learning rate.
        batch: images of a batch.
        epochs: of the run and of the learning rate's schedule.
        policy: precision.
        plan: which process holds and computes what.
        microbatches: of a batch; fix it where the number of processes may change.
        seed: seed of all random numbers.
    """

    size: int = 32
    samples: int = 640
    width: int = 16
    levels: int = 2
    lr: float = 5e-3
    batch: int = 32
    epochs: int = 10
    policy: ps.precision.Policy = POLICY
    plan: ps.sharding.Plan | None = None
    microbatches: int = 1
    seed: int = 0


def draw(key: torch.Tensor, size: int) -> tuple[torch.Tensor, torch.Tensor]:
    """Draw an image, float32[1, size, size], and the class of each pixel, int64[size, size]."""

    def uniform(name: str, low: float, high: float) -> torch.Tensor:
        return low + (high - low) * ps.random.uniform(ps.random.fold_in(key, name), (SHAPES,))

    down, right, radius = uniform("down", 0.15, 0.85), uniform("right", 0.15, 0.85), uniform("radius", 0.12, 0.25)
    kinds = ps.random.randint(ps.random.fold_in(key, "kinds"), (SHAPES,), 1, CLASSES)
    brightness = uniform("brightness", 0.3, 0.7)
    brightness = brightness + torch.where(brightness > 0.5, 0.3, -0.3)  # never close to the background, which is 0.5
    line = (torch.arange(size) + 0.5) / size
    image, label = torch.full((size, size), 0.5), torch.zeros(size, size, dtype=torch.int64)
    for shape in range(SHAPES):
        y, x = (line - down[shape])[:, None] / radius[shape], (line - right[shape])[None] / radius[shape]
        inside = [
            x.square() + y.square() < 1,
            torch.maximum(x.abs(), y.abs()) < 0.85,
            (y < 0.8) & (y > 2 * x.abs() - 1),
        ]
        covered = torch.stack(torch.broadcast_tensors(*inside))[kinds[shape] - 1]
        image = torch.where(covered, brightness[shape], image)
        label = torch.where(covered, kinds[shape], label)
    noise = 0.1 * ps.random.normal(ps.random.fold_in(key, "noise"), (size, size))
    return (image + noise)[None], label


def images_of(seed: int, samples: int, size: int) -> Batch:
    keys = ps.random.split(ps.random.key(seed), samples)
    image, label = torch.vmap(lambda key: draw(key, size))(keys)
    return {"image": image, "label": label}


class UNet(nn.Module):
    """Ronneberger et al., 2015: half the size and double the channels at each level, and back, with bridges."""

    def __init__(self, width: int, levels: int) -> None:
        super().__init__()
        widths = [width * 2**level for level in range(levels + 1)]
        self.down = nn.ModuleList(block(a, b) for a, b in zip([1, *widths], widths, strict=False))
        self.up = nn.ModuleList(nn.ConvTranspose2d(2 * w, w, 2, 2) for w in reversed(widths[:-1]))
        self.merge = nn.ModuleList(block(2 * w, w) for w in reversed(widths[:-1]))
        self.head = nn.Conv2d(width, CLASSES, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Return the logits of the classes of each pixel: [n, CLASSES, size, size]."""
        bridges: list[torch.Tensor] = []
        for level, down in enumerate(self.down):
            x = down(nn.functional.max_pool2d(x, 2) if level else x)
            bridges.append(x)
        for up, merge, bridge in zip(self.up, self.merge, reversed(bridges[:-1]), strict=True):
            x = merge(torch.cat([up(x), bridge], 1))
        return self.head(x)


def block(inputs: int, outputs: int) -> nn.Module:
    first = [nn.Conv2d(inputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()]
    return nn.Sequential(
        *first, nn.Conv2d(outputs, outputs, 3, padding=1, bias=False), nn.BatchNorm2d(outputs), nn.ReLU()
    )


@ps.pytree
class IoU:
    """Intersection over union, as what can be added up: pixels of each class that are right, and that are in either."""

    right: torch.Tensor  # int64[CLASSES]
    either: torch.Tensor  # int64[CLASSES]

    def merge(self, other: IoU) -> IoU:
        return IoU(self.right + other.right, self.either + other.either)

    def compute(self) -> torch.Tensor:
        return (self.right / self.either.clamp(min=1)).mean()


def loss_fn(net: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, object]]:
    logits, label = net(batch["image"]), batch["label"]
    guess, truth = (one_hot(classes, CLASSES).flatten(0, 2) for classes in (logits.argmax(1), label))
    right = (guess * truth).sum(0)
    iou = IoU(right, guess.sum(0) + truth.sum(0) - right)
    return cross_entropy(logits, label), {"iou": iou, "accuracy": (logits.argmax(1) == label).float().mean()}


@ps.experiment
def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    known = images_of(settings.seed, settings.samples, settings.size)
    held_out = images_of(settings.seed + 1, settings.samples // 4, settings.size)
    train = ps.data.batches(known, settings.batch, seed=settings.seed)
    judged = ps.data.batches(held_out, 2 * settings.batch, shuffle=False, drop_last=False)
    total = settings.epochs * len(train)
    schedule = ps.optim.warmup_cosine_decay_schedule(0.0, settings.lr, warmup_steps=total // 10, decay_steps=total)
    tx, policy, plan = ps.optim.adamw(schedule, weight_decay=0.01), settings.policy, settings.plan

    def make_model() -> nn.Module:
        return UNet(settings.width, settings.levels)

    return ps.Experiment(
        ps.make_step(loss_fn, tx, policy=policy, plan=plan, microbatches=settings.microbatches),
        policy.apply(ps.init(make_model, tx, seed=settings.seed, plan=plan)),
        train,
        until=ps.epochs(settings.epochs),
        callbacks=[
            ps.callbacks.evaluate(ps.make_eval(loss_fn, policy=policy, plan=plan), judged, every=ps.every.epoch()),
            ps.callbacks.snapshots(every=ps.every.epoch(), keep=ps.snapshot.best("val/iou", 1, mode="max")),
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main(["run", __file__, *sys.argv[1:]]))
