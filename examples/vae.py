"""Train a variational autoencoder on digits, and draw new ones (Kingma and Welling, 2014).

The model draws its noise with torch's own functions; the step gives them a key, so the run has the same bits after a
resume. The result is `val/elbo`, a lower bound of the log likelihood of a held-out digit in nats: more is better.
`--samples` is where a picture of them is written: held-out digits, what became of them, and digits from noise.

    python examples/vae.py
    python examples/vae.py --hidden 1024 --latent 32 --beta 4 --epochs 500
    purestep sweep examples/vae.py --latent 2,8,32 --metric val/elbo --mode max
"""

from __future__ import annotations

import functools
import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from matplotlib.image import imsave
from sklearn.datasets import load_digits
from torch import nn
from torch.nn.functional import binary_cross_entropy_with_logits

import purestep as ps
from purestep.cli.command import main

POLICY = ps.precision.policy("32")
Batch = dict[str, torch.Tensor]


@dataclass(frozen=True)
class Settings:
    """What one may change.

    Args:
        latent: numbers that an image is encoded by.
        hidden: width of the hidden layers.
        beta: weight of the divergence from the prior; 1 is the bound itself.
        lr: peak of the learning rate.
        batch: images of a batch.
        epochs: of the run and of the learning rate's schedule.
        samples: where the picture is written.
        policy: precision.
        seed: seed of all random numbers.
    """

    latent: int = 8
    hidden: int = 256
    beta: float = 1.0
    lr: float = 3e-3
    batch: int = 64
    epochs: int = 60
    samples: Path = Path("runs/vae.png")
    policy: ps.precision.Policy = POLICY
    seed: int = 0


def load() -> tuple[Batch, Batch]:
    """Return four fifths of the digits to learn from, and one fifth to be judged by: float32[n, 64] in [0, 1]."""
    digits = load_digits().data.astype(np.float32) / 16
    images = torch.from_numpy(digits[np.random.default_rng(0).permutation(len(digits))])
    held = len(images) // 5
    return {"x": images[held:]}, {"x": images[:held]}


class VAE(nn.Module):
    def __init__(self, hidden: int, latent: int) -> None:
        super().__init__()
        self.latent = latent
        self.encode = nn.Sequential(
            *(nn.Linear(64, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()), nn.Linear(hidden, 2 * latent)
        )
        self.decode = nn.Sequential(
            *(nn.Linear(latent, hidden), nn.GELU(), nn.Linear(hidden, hidden), nn.GELU()), nn.Linear(hidden, 64)
        )

    def forward(self, x: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Return logits of the pixels, [n, 64], and mean and logarithm of the variance of the code, [n, latent]."""
        mean, log_variance = self.encode(x).chunk(2, -1)
        code = mean + (0.5 * log_variance).exp() * torch.randn_like(mean)
        return self.decode(code), mean, log_variance


def elbo(net: nn.Module, batch: Batch, beta: float) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    """Return what is minimized, and the two parts of the bound: means over the images of a batch, in nats."""
    logits, mean, log_variance = net(batch["x"])
    likelihood = -binary_cross_entropy_with_logits(logits, batch["x"], reduction="none").sum(-1).mean()
    divergence = 0.5 * (mean.square() + log_variance.exp() - 1 - log_variance).sum(-1).mean()
    return beta * divergence - likelihood, {"elbo": likelihood - divergence, "divergence": divergence}


def pictures(net: VAE, images: torch.Tensor) -> dict[str, torch.Tensor]:
    """Return what becomes of images that are encoded and decoded, and as many new ones, from noise."""
    noise = torch.randn(len(images), net.latent, device=images.device)
    return {"again": net(images)[0].sigmoid(), "new": net.decode(noise).sigmoid()}


def write_samples(path: Path, images: torch.Tensor, event: ps.loop.Event, loop: ps.loop.LoopState) -> None:
    """Write images, what became of them, and new ones as one picture, after an evaluation."""
    if isinstance(event, ps.loop.Evaluated):
        found = ps.make_predict(pictures)(loop.train, images.to(loop.train.step.device))
        rows = images, found["again"].cpu(), found["new"].cpu()
        grid = torch.cat([row.view(-1, 8, 8).transpose(0, 1).flatten(1) for row in rows])
        path.parent.mkdir(parents=True, exist_ok=True)
        imsave(path, grid.kron(torch.ones(6, 6)).numpy(), cmap="gray_r", vmin=0, vmax=1)


@ps.experiment
def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    train_set, held_out = load()
    train = ps.data.batches(train_set, settings.batch, seed=settings.seed)
    judged = ps.data.batches(held_out, 256, shuffle=False, drop_last=False)
    total = settings.epochs * len(train)
    tx = ps.optim.adam(
        ps.optim.warmup_cosine_decay_schedule(0.0, settings.lr, warmup_steps=total // 20, decay_steps=total)
    )
    policy = settings.policy

    def loss_fn(net: nn.Module, batch: Batch) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        return elbo(net, batch, settings.beta)

    def make_model() -> nn.Module:
        return VAE(settings.hidden, settings.latent)

    return ps.Experiment(
        ps.make_step(loss_fn, tx, policy=policy),
        policy.apply(ps.init(make_model, tx, seed=settings.seed)),
        train,
        until=ps.epochs(settings.epochs),
        free_settings=["samples"],  # a resume may change it
        callbacks=[
            ps.callbacks.evaluate(ps.make_eval(loss_fn, policy=policy), judged, every=ps.every.epoch(5)),
            ps.callbacks.snapshots(every=ps.every.epoch(5)),
            ps.callbacks.tap(functools.partial(write_samples, settings.samples, held_out["x"][:16])),
        ],
    )


if __name__ == "__main__":
    raise SystemExit(main(["run", __file__, *sys.argv[1:]]))
