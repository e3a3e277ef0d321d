"""Train a DCGAN: two networks that train against each other, as two states that one step advances together.

    python examples/dcgan.py
    python examples/dcgan.py --data IMAGES --size 64 --width 64 --noise 100 --batch 128 --lr 2e-4 --device cuda

IMAGES is any folder of pictures, CelebA for instance. Before the first step each file is decoded, and compared with the
folder's SHA256SUMS where there is one: a damaged file ends the program before it has cost anything.

The result is `val/distance`, the Frechet distance of generated images from as many that were held out, by mean and
covariance of 8 x 8 pixels: less is better, and `val/distance_of_real` is that of training images. Radford et al., 2016.
"""

from __future__ import annotations

import hashlib
import itertools
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import adaptive_avg_pool2d, softplus

import purestep as ps
from purestep.cli.command import main
from purestep.errors import DataError, explain

Batch = dict[str, torch.Tensor]
States = dict[str, ps.TrainState]


@dataclass(frozen=True)
class Settings:
    """What one may change.

    Args:
        data: folder of images; the digits of scikit-learn without one.
        size: height and width of the images of a folder, a power of 2; digits have 8.
        noise: numbers that an image is generated from.
        width: channels of the first convolution of the discriminator.
        lr: of Adam.
        batch: images of a batch.
        epochs: of the run.
        samples: where a picture of generated images is written after each evaluation.
        seed: seed of all random numbers.
    """

    data: Path | None = None
    size: int = 64
    noise: int = 32
    width: int = 32
    lr: float = 5e-4
    batch: int = 64
    epochs: int = 80
    samples: Path = Path("runs/dcgan.png")
    seed: int = 0


class Folder:
    """The images of a folder, all of them checked, as samples {"image": float32[3, size, size] in [-1, 1]}."""

    def __init__(self, root: Path, size: int) -> None:
        self.size, sums = size, root / "SHA256SUMS"
        self.paths = sorted(path for path in root.rglob("*") if path.suffix.lower() in Image.registered_extensions())
        lines = [line.split(maxsplit=1) for line in sums.read_text().splitlines()] if sums.exists() else []
        expected = {root / name.lstrip("*"): digest for digest, name in lines}

        def problem(path: Path) -> str:
            try:
                if path in expected and hashlib.sha256(path.read_bytes()).hexdigest() != expected[path]:
                    return f"{path}: its checksum is not that of {sums}"
                with Image.open(path) as image:
                    image.load()
            except (OSError, SyntaxError, ValueError) as error:
                return f"{path}: {error}"
            return ""

        with ThreadPoolExecutor() as pool:
            problems = [found for found in pool.map(problem, sorted({*self.paths, *expected})) if found]
        if problems or not self.paths:
            text = f"{len(problems)} images of {len(self.paths)} are damaged" if problems else "there are no images"
            raise DataError(explain(text, where="\n".join(problems[:10]) or str(root), instead="copy them again"))

    def __len__(self) -> int:
        return len(self.paths)

    def __getitem__(self, index: int) -> dict[str, np.ndarray]:
        fitted = ImageOps.fit(Image.open(self.paths[index]).convert("RGB"), (self.size, self.size))
        return {"image": np.asarray(fitted, np.float32).transpose(2, 0, 1) / 127.5 - 1}


def load(settings: Settings) -> tuple[Any, torch.Tensor, torch.Tensor]:
    """Return the training set, some images of it, and as many held-out ones: float32[n, channels, size, size]."""
    if settings.data is None:
        digits = torch.tensor(load_digits().images[:, None] / 8 - 1, dtype=torch.float32)
        images = digits[ps.random.permutation(ps.random.key(0), len(digits))]
        held = len(images) // 5
        return {"image": images[held:]}, images[held : 2 * held], images[:held]
    folder = Folder(settings.data, settings.size)
    order, held = ps.random.permutation(ps.random.key(0), len(folder)).tolist(), min(len(folder) // 5, 1000)
    some = torch.stack([torch.from_numpy(folder[index]["image"]) for index in order[: 2 * held]])
    return torch.utils.data.Subset(folder, order[held:]), some[held:], some[:held]


def networks(noise: int, width: int, size: int, channels: int) -> dict[str, nn.Module]:
    """Make both networks: a layer of the one doubles the size, or channels, that a layer of the other halves."""
    widths = [width * 2**level for level in range(size.bit_length() - 3)]
    up: list[nn.Module] = [nn.ConvTranspose2d(noise, widths[-1], 4, bias=False)]
    for large, small in itertools.pairwise(reversed(widths)):
        up += [nn.BatchNorm2d(large), nn.ReLU(), nn.ConvTranspose2d(large, small, 4, 2, 1, bias=False)]
    up += [nn.BatchNorm2d(width), nn.ReLU(), nn.ConvTranspose2d(width, channels, 4, 2, 1), nn.Tanh()]
    down: list[nn.Module] = [nn.Conv2d(channels, width, 4, 2, 1), nn.LeakyReLU(0.2)]
    for small, large in itertools.pairwise(widths):
        down += [nn.Conv2d(small, large, 4, 2, 1, bias=False), nn.BatchNorm2d(large), nn.LeakyReLU(0.2)]
    for layer in (*up, *down):
        if isinstance(layer, nn.Conv2d | nn.ConvTranspose2d):
            nn.init.normal_(layer.weight, std=0.02)
    return {"generator": nn.Sequential(*up), "discriminator": nn.Sequential(*down, nn.Conv2d(widths[-1], 1, 4))}


def make_gan_step(tx: ps.optim.GradientTransformation, noise: int) -> Any:
    """Make the step: a pure function of both states and a batch, which is all that `fit` asks for."""

    def gan_step(states: States, batch: Batch) -> tuple[States, dict[str, torch.Tensor]]:
        g, d, real = states["generator"], states["discriminator"], batch["image"]
        code = ps.random.normal(ps.random.fold_in(g.rng, g.step), (len(real), noise, 1, 1))

        def loss_of_discriminator(params: Batch) -> tuple[torch.Tensor, Batch]:
            on_real, buffers = ps.apply(d.model, params, d.buffers, real)
            on_fake, buffers = ps.apply(d.model, params, buffers, ps.apply(g.model, g.params, g.buffers, code)[0])
            return softplus(-on_real).mean() + softplus(on_fake).mean(), buffers

        def loss_of_generator(params: Batch) -> tuple[torch.Tensor, Batch]:
            fake, buffers = ps.apply(g.model, params, g.buffers, code)
            return softplus(-ps.apply(d.model, d.params, d.buffers, fake)[0]).mean(), buffers

        grads_d, (loss_d, buffers_d) = ps.grad_and_value(loss_of_discriminator, has_aux=True)(d.params)
        grads_g, (loss_g, buffers_g) = ps.grad_and_value(loss_of_generator, has_aux=True)(g.params)
        new = g.apply_gradients(tx, grads_g, buffers=buffers_g), d.apply_gradients(tx, grads_d, buffers=buffers_d)
        return dict(zip(states, new, strict=True)), {"generator": loss_g, "discriminator": loss_d}

    return gan_step


def frechet(a: torch.Tensor, b: torch.Tensor) -> torch.Tensor:
    """Return the squared Frechet distance of two sets of images as normal distributions of 8 x 8 pixels."""
    a, b = (adaptive_avg_pool2d(images, 8).flatten(1).double() for images in (a, b))
    roots = torch.linalg.eigvals(a.T.cov() @ b.T.cov()).real.clamp_min(0).sqrt()
    return (a.mean(0) - b.mean(0)).square().sum() + a.T.cov().trace() + b.T.cov().trace() - 2 * roots.sum()


def judge(net: nn.Sequential, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    held_out = batch["held_out"]
    distance = frechet(net(torch.randn(len(held_out), net[0].in_channels, 1, 1, device=held_out.device)), held_out)
    return distance, {"distance": distance, "distance_of_real": frechet(batch["known"], held_out)}


def write_samples(path: Path, event: ps.loop.Event, loop: ps.loop.LoopState) -> None:
    """Write 64 generated images as one picture, after an evaluation."""
    if isinstance(event, ps.loop.Evaluated):
        g = loop.train["generator"]
        noise = ps.random.normal(ps.random.key(0, device=g.step.device), (64, len(g.params["0.weight"]), 1, 1))
        images = ps.apply(g.model, g.params, g.buffers, noise, train=False)[0].cpu()  # [64, channels, size, size]
        rows = images.unflatten(0, (8, 8)).permute(0, 3, 1, 4, 2).flatten(2, 3).flatten(0, 1)
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(((rows + 1) * 127.5).to(torch.uint8).expand(-1, -1, 3).numpy()).save(path)


@ps.experiment
def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    train_set, known, held_out = load(settings)
    shape = settings.noise, settings.width, held_out.shape[-1], held_out.shape[1]
    tx, names = ps.optim.adam(settings.lr, 0.5), ("generator", "discriminator")
    states = {name: ps.init(lambda name=name: networks(*shape)[name], tx, seed=settings.seed) for name in names}
    of_generator = ps.wrap_step(ps.make_eval(judge), lambda step, states, batch: step(states["generator"], batch))
    judged = ps.data.batches({"known": known, "held_out": held_out}, len(held_out), shuffle=False)
    return ps.Experiment(
        make_gan_step(tx, settings.noise),
        states,
        ps.data.batches(train_set, settings.batch, seed=settings.seed),
        until=ps.epochs(settings.epochs),
        free_settings=["samples"],  # a resume may change it
        callbacks=[
            ps.callbacks.evaluate(of_generator, judged, every=ps.every.epoch(5)),
            ps.callbacks.snapshots(every=ps.every.epoch(5)),
            ps.callbacks.tap(lambda event, loop: write_samples(settings.samples, event, loop)),
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main(["run", __file__, *sys.argv[1:]]))
