"""Hugging Face Accelerate: a hand-written loop with a prepared model and optimizer."""

from __future__ import annotations

import accelerate
from torch.nn.functional import cross_entropy

from benchmarks import workloads
from benchmarks.peers.base import Trainer
from benchmarks.peers.loops import adamw, tensors
from benchmarks.workloads import Workload


class Accelerate(Trainer):
    def __init__(self, work: Workload) -> None:
        self.work, self.batches = work, tensors(work)
        self.accelerator = accelerate.Accelerator(cpu=True)
        model = workloads.module(work)
        self.model, self.optimizer = self.accelerator.prepare(model, adamw(model, "foreach"))

    def train(self, steps: int) -> float:
        model, optimizer, accelerator = self.model, self.optimizer, self.accelerator
        for x, y in self.feed(steps):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            accelerator.backward(loss)
            optimizer.step()
        return loss.item()
