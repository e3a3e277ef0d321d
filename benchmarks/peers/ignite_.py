"""PyTorch Ignite: its supervised trainer, an engine without handlers."""

from __future__ import annotations

from typing import Any

from ignite.engine import create_supervised_trainer
from torch import Tensor
from torch.nn.functional import cross_entropy

from benchmarks import workloads
from benchmarks.peers.base import Trainer
from benchmarks.peers.loops import adamw, tensors
from benchmarks.workloads import Workload


def _loss(x: Any, y: Any, logits: Tensor, loss: Tensor) -> Tensor:
    return loss


class Ignite(Trainer):
    """A round is one epoch of a run of the engine; each batch is read from a plain iterator."""

    def __init__(self, work: Workload) -> None:
        self.work, self.batches = work, tensors(work)
        model = workloads.module(work)
        self.engine = create_supervised_trainer(
            model, adamw(model, "foreach"), cross_entropy, device="cpu", output_transform=_loss
        )

    def train(self, steps: int) -> float:
        self.engine.run(self.feed(steps), max_epochs=1, epoch_length=steps)
        return float(self.engine.state.output)
