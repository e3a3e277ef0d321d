"""Steps, models and batches that the tests of `jit` share."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import pytest
import torch
from shared_marks import slow_but
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import purestep as ps


class Attention(nn.Module):
    """Embedding, causal attention with dropout, layer norm."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(13, 16)
        self.mix = nn.Linear(16, 48)
        self.norm = nn.LayerNorm(16)
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        hidden = self.embed((x.abs() * 5).long().clamp(max=12))
        q, k, v = self.mix(hidden).unflatten(-1, (3, 2, 8)).movedim(-3, 0).transpose(-2, -3)
        mixed = scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)
        return self.head(self.norm(hidden + mixed).mean(1))


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(1, 8, num_layers=2, dropout=0.3, batch_first=True)
        self.head = nn.Linear(8, 5)

    def forward(self, x):
        return self.head(self.lstm(x.unsqueeze(-1))[0][:, -1])


class Checkpointed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.block = nn.Sequential(nn.Linear(7, 16), nn.Dropout(0.4), nn.Tanh())
        self.head = nn.Linear(16, 5)

    def forward(self, x):
        return self.head(ps.checkpoint(self.block, x))


class Vmapped(nn.Module):
    """A linear layer applied to one sample at a time, by vmap."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(7, 5)

    def forward(self, x):
        return torch.vmap(lambda row: torch.tanh(self.layer.weight @ row + self.layer.bias))(x)


def convolutional() -> nn.Module:
    return nn.Sequential(
        nn.Unflatten(1, (1, 7)), nn.Conv1d(1, 6, 3), nn.BatchNorm1d(6), nn.ReLU(), nn.Flatten(), nn.Linear(30, 5)
    )


def tied() -> nn.Module:
    first, second = nn.Linear(7, 7), nn.Linear(7, 7)
    second.weight = first.weight
    return nn.Sequential(first, nn.Tanh(), second, nn.Linear(7, 5))


def plain() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 11), nn.ReLU(), nn.Linear(11, 5))


def dropping() -> nn.Module:
    return nn.Sequential(nn.Linear(7, 11), nn.GELU(), nn.Dropout(0.3), nn.Linear(11, 5))


def loss_fn(net, batch):
    logits = net(batch["x"])
    return cross_entropy(logits, batch["y"]), {"accuracy": ps.metrics.accuracy(logits, batch["y"])}


@dataclasses.dataclass(frozen=True)
class Case:
    """One kind of training: a new feature of steps that `jit` has to take is one more row."""

    model: Callable[[], nn.Module]
    tx: Any
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    recurrent: bool = False

    def step(self) -> Any:
        return ps.make_step(loss_fn, self.tx, **self.options)

    def state(self, seed: int = 0) -> ps.TrainState:
        return ps.init(self.model, self.tx, seed=seed)


def _scheduled() -> Any:
    rate = ps.optim.warmup_cosine_decay_schedule(0.0, 1e-2, warmup_steps=3, decay_steps=20)
    return ps.optim.chain(ps.optim.clip_by_global_norm(0.5), ps.optim.adamw(rate, weight_decay=0.1))


CASES = {
    "plain": Case(plain, ps.optim.adamw(1e-3)),
    "sgd": Case(plain, ps.optim.sgd(0.1, momentum=0.9)),
    "clip and schedule": Case(plain, _scheduled()),
    "skips": Case(plain, ps.optim.apply_if_finite(ps.optim.adamw(1e-3))),
    "dropout": Case(dropping, ps.optim.adamw(1e-3)),
    "batch norm": Case(convolutional, ps.optim.adamw(1e-3)),
    "microbatches": Case(dropping, ps.optim.adamw(1e-3), {"microbatches": 3}),
    "microbatches and batch norm": Case(convolutional, ps.optim.adamw(1e-3), {"microbatches": 2}),
    "tied": Case(tied, ps.optim.adamw(1e-3)),
    "attention": Case(Attention, ps.optim.adamw(1e-3)),
    "recurrent": Case(Recurrent, ps.optim.adamw(1e-3), recurrent=True),
    "checkpoint": Case(Checkpointed, ps.optim.adamw(1e-3)),
    "vmap": Case(Vmapped, ps.optim.adamw(1e-3)),
    "engine func": Case(plain, ps.optim.adamw(1e-3), {"engine": "func"}),
}


@pytest.fixture
def cases() -> dict[str, Case]:
    return CASES


@pytest.fixture
def trained() -> Callable[..., Any]:
    """Runs a step over batches; returns the state and the rows of metrics."""

    def run(step, state, batches):
        rows = []
        for batch in batches:
            state, metrics = step(state, batch)
            rows.append(ps.metrics.compute(metrics))
        return state, rows

    return run


@pytest.fixture(
    params=slow_but(CASES, *(CASES.keys() - {"recurrent", "microbatches", "checkpoint", "clip and schedule"})),
    ids=lambda name: name.replace(" ", "_"),
)
def case(request: pytest.FixtureRequest) -> Case:
    return CASES[request.param]


@pytest.fixture
def batches() -> Callable[..., list[dict[str, torch.Tensor]]]:
    """Makes batches of fresh random data, of sizes that nothing divides."""

    def make(count: int, size: int = 13, *, seed: int = 0) -> list[dict[str, torch.Tensor]]:
        generator = torch.Generator().manual_seed(seed)
        return [
            {
                "x": torch.randn(size, 7, generator=generator),
                "y": torch.randint(0, 5, (size,), generator=generator),
            }
            for _ in range(count)
        ]

    return make
