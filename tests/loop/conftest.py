"""A small job with what makes resuming hard: shuffle, augmentation, dropout, BatchNorm, schedule, early stopping."""

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps


def make_model():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def loss_fn(net, batch):
    logits = net(batch["x"])
    return cross_entropy(logits, batch["y"]), {"accuracy": ps.metrics.accuracy(logits, batch["y"])}


def jitter(sample, key):
    return {**sample, "x": sample["x"] + 0.1 * ps.random.normal(key, sample["x"].shape)}


def table(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return {"x": x, "y": (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()}


@pytest.fixture
def job():
    """Return a function that makes the arguments of `fit` afresh: 5 batches an epoch, the last one smaller."""

    def make(*, microbatches=1, tx=None, callbacks=None, data=None, seed=0, **options):
        tx = tx or ps.optim.apply_if_finite(
            ps.optim.chain(
                ps.optim.clip_by_global_norm(0.5),
                ps.optim.adamw(ps.optim.warmup_cosine_decay_schedule(0.0, 0.02, warmup_steps=4, decay_steps=20)),
            )
        )
        train = ps.data.batches(table(37, 0), 8, seed=3, drop_last=False, transform=jitter) if data is None else data()
        val = ps.data.batches(table(19, 1), 8, shuffle=False, drop_last=False)
        if callbacks is None:
            callbacks = [
                ps.callbacks.evaluate(loss_fn, val, every=ps.every.steps(3) | ps.every.epoch()),
                ps.callbacks.early_stopping("val/loss", patience=50),
                ps.callbacks.learning_rate(tx, every=ps.every.steps(2)),
                ps.callbacks.log(every=ps.every.steps(4)),
            ]
        return {
            "step": ps.make_step(loss_fn, tx, microbatches=microbatches),
            "state": ps.init(make_model, tx, seed=seed),
            "train": train,
            "callbacks": callbacks,
            **options,
        }

    make.val = lambda: ps.data.batches(table(19, 1), 8, shuffle=False, drop_last=False)
    make.loss_fn = loss_fn
    make.table = table
    return make
