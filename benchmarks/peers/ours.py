"""purestep: the step eager, compiled, donated, under a precision policy; and `fit` over it."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator
from typing import Any

import torch
from torch.nn.functional import cross_entropy

import purestep as ps
from benchmarks import workloads
from benchmarks.peers.base import Rounds, Trainer
from benchmarks.peers.loops import tensors
from benchmarks.workloads import Workload


def loss_fn(net: Any, batch: Any) -> torch.Tensor:
    """Return the loss that all peers minimise."""
    return cross_entropy(net(batch["x"]), batch["y"])


class Ours(Trainer):
    """A loop of one's own over a step.

    Args:
        work: the workload.
        fused: use torch's fused kernel in eager mode.
        jit: compile the step.
        donate: update the state in place.
        policy: name of a precision policy.
    """

    def __init__(
        self, work: Workload, fused: bool = False, jit: bool = False, donate: bool = False, policy: str | None = None
    ) -> None:
        self.work = work
        self.batches = [{"x": x, "y": y} for x, y in tensors(work)]
        w = workloads
        rate, (b1, b2) = w.LEARNING_RATE, w.BETAS
        # In float16 an eps of 1e-8 is zero.
        eps = 1e-4 if policy == "16-true" else w.EPS
        tx = ps.optim.adamw(rate, b1, b2=b2, eps=eps, weight_decay=w.WEIGHT_DECAY, fused=fused)
        step: Any = ps.make_step(loss_fn, tx, policy=policy)
        self.state = ps.init(workloads.module(work), tx, seed=0)
        if policy is not None:
            self.state = ps.precision.policy(policy).apply(self.state)
        self.step = ps.jit(step, donate=donate) if jit else ps.donate(step) if donate else step

    def train(self, steps: int) -> float:
        state, step = self.state, self.step
        self.state = None  # nobody else may hold the old state, or two are alive in the first step
        for batch in self.feed(steps):
            state, metrics = step(state, batch)
        self.state = state
        return float(metrics["loss"].compute())


class Fit(Ours):
    """`ps.run` as `fit` drains it: one run, a round an epoch. What it does once, at its start, is not in a round."""

    def serve(self, rounds: Rounds) -> None:
        events = ps.run(self.step, self.state, _Asked(self, rounds), until=ps.epochs(1_000_000))
        self.state = None
        with contextlib.suppress(_NoMore), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # such a source cannot be resumed in the middle of an epoch
            for event in events:
                if isinstance(event, ps.loop.StepsDone):
                    last = event.metrics[-1]
                elif isinstance(event, ps.loop.EpochDone):
                    rounds.stop(float(last["loss"].compute()))
        self.state = events.loop.train


class _NoMore(Exception):
    """The driver has asked for the last round."""


class _Asked:
    """The steps that the driver asks for, as an epoch each."""

    def __init__(self, trainer: Trainer, rounds: Rounds) -> None:
        self.trainer, self.rounds = trainer, rounds

    def __iter__(self) -> Iterator[Any]:
        steps = self.rounds.receive()
        if steps is None:
            raise _NoMore
        self.rounds.start()
        yield from self.trainer.feed(steps)
