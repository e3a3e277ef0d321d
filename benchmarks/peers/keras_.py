"""Keras 3 on its torch backend: `fit` of a model around the same torch module, eager, with Keras's own AdamW."""

from __future__ import annotations

import os

os.environ["KERAS_BACKEND"] = "torch"  # read when Keras is imported

from typing import Any

import keras

from benchmarks import workloads
from benchmarks.peers.base import Rounds, Trainer
from benchmarks.peers.loops import tensors
from benchmarks.workloads import Workload


class Net(keras.Model):
    """A torch module as a Keras model, which keeps the loss of the last step."""

    def __init__(self, work: Workload) -> None:
        super().__init__()
        self.net = keras.layers.TorchModuleWrapper(workloads.module(work))

    def call(self, x: Any) -> Any:
        return self.net(x)

    def compute_loss(self, *args: Any, **kwargs: Any) -> Any:
        loss = super().compute_loss(*args, **kwargs)
        self.last = loss.detach()
        return loss


class Clock(keras.callbacks.Callback):
    """The clock runs from the start hook of an epoch to its end hook."""

    def __init__(self, rounds: Rounds) -> None:
        super().__init__()
        self.rounds = rounds

    def on_epoch_begin(self, epoch: int, logs: Any = None) -> None:
        self.rounds.start()

    def on_epoch_end(self, epoch: int, logs: Any = None) -> None:
        self.rounds.stop(float(self.model.last))


class Keras(Trainer):
    """A round is one epoch of `fit` over a generator."""

    def __init__(self, work: Workload) -> None:
        self.work, self.batches = work, tensors(work)
        w = workloads
        self.model = Net(work)
        self.model(self.batches[0][0])  # its variables are known from the first call on
        self.model.compile(
            optimizer=keras.optimizers.AdamW(
                w.LEARNING_RATE, weight_decay=w.WEIGHT_DECAY, beta_1=w.BETAS[0], beta_2=w.BETAS[1], epsilon=w.EPS
            ),
            loss=keras.losses.SparseCategoricalCrossentropy(from_logits=True),
            jit_compile=False,
        )

    def serve(self, rounds: Rounds) -> None:
        clock = Clock(rounds)
        while (steps := rounds.receive()) is not None:
            self.model.fit(self.feed(steps), steps_per_epoch=steps, epochs=1, verbose=0, callbacks=[clock])
