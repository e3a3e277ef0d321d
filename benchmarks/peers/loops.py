"""The loop that everybody writes by hand, eager and compiled."""

from __future__ import annotations

from typing import Any

import torch
from torch.nn.functional import cross_entropy

from benchmarks import workloads
from benchmarks.peers.base import Trainer
from benchmarks.workloads import Workload


def tensors(work: Workload) -> list[tuple[torch.Tensor, torch.Tensor]]:
    """Return the batches of a workload as tensors."""
    return [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in work.batches()]


def adamw(module: torch.nn.Module, optimizer: str) -> torch.optim.AdamW:
    """Return torch's AdamW of the benchmark for a module; `optimizer` is "foreach" or "fused"."""
    w = workloads
    options: Any = {optimizer: True, "lr": w.LEARNING_RATE, "betas": w.BETAS, "eps": w.EPS}
    return torch.optim.AdamW(module.parameters(), weight_decay=w.WEIGHT_DECAY, **options)


class Loop(Trainer):
    """Zero the gradients, forward, backward, step.

    Args:
        work: the workload.
        optimizer: "foreach" or "fused".
        compiled: 0 nothing, 1 the model with its loss, 2 the optimizer as well.
    """

    def __init__(self, work: Workload, optimizer: str, compiled: int = 0) -> None:
        self.work, self.batches = work, tensors(work)
        self.model = workloads.module(work)
        self.optimizer = adamw(self.model, optimizer)

        def loss_of(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
            return cross_entropy(self.model(x), y)

        def update() -> None:
            self.optimizer.step()

        self.loss_of = torch.compile(loss_of) if compiled >= 1 else loss_of
        self.update = torch.compile(update) if compiled >= 2 else self.optimizer.step

    def train(self, steps: int) -> float:
        loss_of, optimizer, update = self.loss_of, self.optimizer, self.update
        for x, y in self.feed(steps):
            optimizer.zero_grad()
            loss = loss_of(x, y)
            loss.backward()
            update()
        return loss.item()
