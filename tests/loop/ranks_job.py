"""What each process of `test_ranks.py` runs: the checks named on the command line, one after the other.

Its answers go to `<directory>/<rank>.json`, a dict by check.
"""

from __future__ import annotations

import dataclasses
import json
import os
import signal
import sys
import time
import warnings
from pathlib import Path

import torch
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps
from purestep.errors import RankError
from purestep.loop import StepsDone, Stopped
from purestep.sharding import ddp, world
from purestep.testing import comparable

RANK, SIZE = world.rank(), world.size()
V = 4


@dataclasses.dataclass(frozen=True)
class HostStep(ps.step.Step if False else __import__("purestep.step", fromlist=["Step"]).Step):
    plan: object = None

    def __call__(self, state, batch):
        from purestep.accumulate import accumulate
        from purestep.sharding.local import local_batch

        local = local_batch(batch, self.plan, self.microbatches)
        mine = [(i, self.grads(state, b, i)) for i, b, _ in local.pieces(self.plan.microbatches(self.microbatches))]
        total = accumulate(state, local.samples, self.microbatches)
        for index, part in sorted(
            (e for entry in world.gather(mine, what="gradients") for e in entry), key=lambda e: e[0]
        ):
            total.add(part, index)
        return self.update(state, total.result())


def table(n, seed):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(n, 6, generator=generator)
    return {"x": x, "y": (x[:, 0] > 0).long() + (x[:, 1] > 0.5).long()}


class Samples(torch.utils.data.Dataset):
    """Counts what is read."""

    def __init__(self, n, seed):
        self.columns, self.n, self.read = table(n, seed), n, 0

    def __len__(self):
        return self.n

    def __getitem__(self, index):
        self.read += 1
        return {name: column[index] for name, column in self.columns.items()}


def make_model():
    return nn.Sequential(nn.Linear(6, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


def loss_fn(net, batch):
    logits = net(batch["x"])
    return cross_entropy(logits, batch["y"]), {"accuracy": ps.metrics.accuracy(logits, batch["y"])}


def jitter(sample, key):
    return {**sample, "x": sample["x"] + 0.1 * ps.random.normal(key, sample["x"].shape)}


def job(plan=None, *, train=None, val=None, seed=0, microbatches=V, **options):
    """A small job with what makes many ranks hard: a ragged last batch, augmentation, dropout, BatchNorm, patience."""
    plan = ddp() if plan is None else plan
    tx = ps.optim.chain(ps.optim.clip_by_global_norm(0.5), ps.optim.adamw(0.02))
    train = ps.data.batches(Samples(59, 0), 12, seed=3, drop_last=False, transform=jitter) if train is None else train
    val = ps.data.batches(Samples(19, 1), 4, shuffle=False, drop_last=False) if val is None else val
    callbacks = [
        ps.callbacks.evaluate(loss_fn, val, every=ps.every.steps(3) | ps.every.epoch(), at_start=True),
        ps.callbacks.early_stopping("val/loss", patience=50),
        ps.callbacks.log(every=ps.every.steps(4)),
    ]
    step = HostStep(loss_fn, tx, microbatches, plan=plan)
    state = plan.place(ps.init(make_model, tx, seed=seed))
    return {"step": step, "state": state, "train": train, "callbacks": callbacks, **options}


def summary(result):
    loop = result.loop
    whole = loop.replace(train=ddp().gather(loop.train))
    return {
        "digest": ps.digest(comparable(whole)),
        "batches": loop.cursor.batches,
        "reason": result.reason,
        "metrics": dict(result.metrics),
        "elapsed": loop.elapsed,
    }


def error_of(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


# --- the checks -----------------------------------------------------------------------------------------------------


def straight(directory):
    train, val = Samples(59, 0), Samples(19, 1)
    batches = ps.data.batches(train, 12, seed=3, drop_last=False, transform=jitter)
    result = ps.fit(
        **job(train=batches, val=ps.data.batches(val, 4, shuffle=False, drop_last=False)),
        until=ps.steps(12),
        loggers=[ps.loggers.csv()],
        run_dir=directory / "straight",
    )
    return summary(result) | {"read": train.read, "evaluated": val.read}


def foreign(directory):
    """A list of batches and a generator of unknown length: every rank reads all of it."""
    data, held = table(59, 0), table(19, 1)
    train = [{n: c[i : i + 12] for n, c in data.items()} for i in range(0, 59, 12)]
    val = [{n: c[i : i + 4] for n, c in held.items()} for i in range(0, 19, 4)]
    return summary(ps.fit(**job(train=lambda: iter(train), val=lambda: iter(val)), until=ps.steps(12)))


def collated(directory):
    """A collate function sees the whole batch, whoever computes it."""

    def centred(samples):
        batch = torch.utils.data.default_collate(samples)
        return {**batch, "x": batch["x"] - batch["x"].mean(0)}

    train = ps.data.batches(Samples(59, 0), 12, seed=3, drop_last=False, collate=centred)
    return summary(ps.fit(**job(train=train), until=ps.steps(7)))


def with_signal(directory):
    """SIGTERM to the last rank only, in the middle of a burst."""
    options = job()
    inner, calls = options["step"], []

    def step(state, batch):
        calls.append(1)
        if len(calls) == 30 and RANK == SIZE - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return inner(state, batch)

    step.__wrapped__ = inner
    began = time.monotonic()
    result = ps.fit(**{**options, "step": step, "callbacks": []}, until=ps.steps(100_000))
    return summary(result) | {"exit_code": result.exit_code, "seconds": time.monotonic() - began}


def signal_in_evaluation(directory):
    options = job()
    data = table(4000, 1)
    batches = [{n: c[i : i + 4] for n, c in data.items()} for i in range(0, 4000, 4)]
    seen = []

    def slow(net, batch):
        seen.append(1)
        if len(seen) == 3 and RANK == 0:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.02)
        return loss_fn(net, batch)

    callbacks = [ps.callbacks.evaluate(slow, batches, every=ps.every.steps(3))]
    result = ps.fit(**{**options, "callbacks": callbacks}, until=ps.steps(10))
    return summary(result) | {"evaluated": len(seen), "due": result.loop.status.due}


def seconds(directory):
    """The clock is that of rank 0, though others begin later and see another time."""
    real = time.monotonic
    skew = 1000.0 * RANK
    time.monotonic = lambda: real() * (1 + RANK) + skew
    try:
        options = job()
        inner = options["step"]

        def step(state, batch):
            time.sleep(0.002)
            return inner(state, batch)

        step.__wrapped__ = inner
        began = real()
        result = ps.fit(**{**options, "step": step}, until=ps.seconds(1.0))
        return summary(result) | {"seconds": real() - began}
    finally:
        time.monotonic = real


def level_two(directory):
    """The events of the generator are the same on every rank."""
    events = [repr(e) for e in ps.run(**job(), until=ps.steps(6)) if isinstance(e, (StepsDone, Stopped))]
    return {"events": [e.split("metrics=")[0] for e in events]}


def quiet(directory):
    """Only rank 0 shows anything: warnings, taps, loggers."""
    shown = []
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        ps.fit(
            **job(callbacks=[ps.callbacks.tap(lambda event, loop: shown.append(1) or 1 / 0)]),
            until=ps.steps(2),
        )
    return {"shown": len(shown), "warnings": [str(w.message).splitlines()[0] for w in caught]}


def mismatches(directory):
    """Each is an error on every rank, and none is a hang."""
    last = RANK == SIZE - 1
    other = 2 * V if last else V
    short = ps.data.batches(Samples(60 if last else 59, 0), 12, seed=3, drop_last=False, transform=jitter)
    found = {
        "microbatches": error_of(lambda: ps.fit(**job(microbatches=other), until=ps.steps(2))),
        "seed": error_of(lambda: ps.fit(**job(seed=RANK // 2), until=ps.steps(2))),
        "data": error_of(lambda: ps.fit(**job(train=short), until=ps.steps(2))),
        "until": error_of(lambda: ps.fit(**job(), until=ps.steps(2 + last))),
        "callbacks": error_of(
            lambda: ps.fit(
                **{**job(), "callbacks": [ps.callbacks.log(every=ps.every.steps(1 + last))]}, until=ps.steps(2)
            )
        ),
    }
    return {name: text for name, text in found.items()}


def refusals(directory):
    skipping = ps.data.batches(Samples(59, 0), 12, on_bad_sample="skip")
    return {
        "skip": error_of(lambda: ps.fit(**job(train=skipping), until=ps.steps(2))),
        "count": error_of(lambda: ps.fit(**job(microbatches=6), until=ps.steps(2))),
    }


def raises(directory):
    """One rank fails; the others are told of it, and by which rank."""
    options = job(microbatches=3)
    inner, calls = options["step"], []

    def step(state, batch):
        calls.append(1)
        if len(calls) == 6 and RANK == 1:
            raise ValueError("a bad day")
        return inner(state, batch)

    step.__wrapped__ = inner
    began = time.monotonic()
    text = error_of(lambda: ps.fit(**{**options, "step": step}, until=ps.steps(20)))
    return {"error": text, "seconds": time.monotonic() - began}


def hangs(directory):
    """One rank does not answer; the others wait no longer than the timeout."""
    options = job(microbatches=3)
    inner, calls = options["step"], []

    def step(state, batch):
        calls.append(1)
        if len(calls) == 6 and RANK == 1:
            time.sleep(12)
            os._exit(3)
        return inner(state, batch)

    step.__wrapped__ = inner
    began = time.monotonic()
    text = error_of(lambda: ps.fit(**{**options, "step": step}, until=ps.steps(20)))
    return {"error": text, "seconds": time.monotonic() - began}


def exchanges(directory):
    """What world itself promises."""
    long = world.gather(b"x" * (RANK * 1500), what="long values")
    different = error_of(lambda: world.gather(1, what="save" if RANK else "evaluate"))
    try:
        world.agree_each({"a": 1, "b": RANK // 2}, what="two values", instead="do not")
    except RankError as error:
        differ = str(error)
    else:
        differ = "no error"
    return {
        "ranks": world.gather(RANK),
        "long": [len(v) for v in long],
        "from": world.broadcast(RANK, what="a number"),
        "different": different,
        "differ": differ,
    }


def main():
    directory, timeout, *names = sys.argv[1:]
    torch.set_num_threads(1)
    world.initialize(timeout=float(timeout))
    answers = {}
    for name in names:
        answers[name] = globals()[name](Path(directory) / f"of-{SIZE}")
    Path(directory, f"{SIZE}-{RANK}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
