"""Lightning: the Trainer, as bare as it can be and with one logged value; and Fabric."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator
from typing import Any

import lightning as L
import torch
from torch.nn.functional import cross_entropy

from benchmarks import workloads
from benchmarks.peers.base import Rounds
from benchmarks.peers.base import Trainer as Base
from benchmarks.peers.loops import adamw, tensors
from benchmarks.workloads import Workload

logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
warnings.filterwarnings("ignore", module="lightning")


class Module(L.LightningModule):
    """One round of the benchmark is one epoch: the clock runs from the start hook of an epoch to its end hook."""

    def __init__(self, work: Workload, log: bool) -> None:
        super().__init__()
        self.model = workloads.module(work)
        self.logs = log

    def training_step(self, batch: Any, index: int) -> torch.Tensor:
        loss = cross_entropy(self.model(batch[0]), batch[1])
        if self.logs:
            self.log("loss", loss)
        self.last = loss.detach()
        return loss

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return adamw(self.model, "foreach")

    def on_train_epoch_start(self) -> None:
        self.rounds.start()

    def on_train_epoch_end(self) -> None:
        self.rounds.stop(self.last.item())
        self.feed.steps = self.rounds.receive()
        self.trainer.should_stop = self.feed.steps is None

    rounds: Rounds
    feed: Feed


class Feed:
    """An iterable of batches without a length, whose next epoch is as long as the next request says."""

    steps: int | None = None

    def __init__(self, trainer: Base) -> None:
        self.trainer = trainer

    def __iter__(self) -> Iterator[Any]:
        yield from self.trainer.feed(self.steps or 0)


class Trainer(Base):
    """`lightning.Trainer` with everything off; with `log`, one `self.log` in the training step."""

    def __init__(self, work: Workload, log: bool = False) -> None:
        self.work, self.batches = work, tensors(work)
        self.module = Module(work, log)
        off: dict[str, Any] = {"enable_checkpointing": False, "logger": False, "enable_progress_bar": False}
        off |= {"enable_model_summary": False, "num_sanity_val_steps": 0}
        self.trainer = L.Trainer(
            accelerator="cpu", devices=1, max_epochs=-1, **(off if log else {"barebones": True, "logger": False})
        )

    def serve(self, rounds: Rounds) -> None:
        self.module.rounds, self.module.feed = rounds, Feed(self)
        self.module.feed.steps = rounds.receive()
        if self.module.feed.steps is not None:
            self.trainer.fit(self.module, self.module.feed)


class Fabric(Base):
    """A hand-written loop under `lightning.Fabric`."""

    def __init__(self, work: Workload) -> None:
        self.work, self.batches = work, tensors(work)
        self.fabric = L.Fabric(accelerator="cpu", devices=1)
        model = workloads.module(work)
        self.model, self.optimizer = self.fabric.setup(model, adamw(model, "foreach"))

    def train(self, steps: int) -> float:
        model, optimizer, fabric = self.model, self.optimizer, self.fabric
        for x, y in self.feed(steps):
            optimizer.zero_grad()
            loss = cross_entropy(model(x), y)
            fabric.backward(loss)
            optimizer.step()
        return loss.item()
