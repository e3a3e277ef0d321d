"""What each process of `test_ranks.py` runs: the checks named on the command line, one after the other.

Its answers go to `<directory>/<rank>.json`, a dict by check.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import random
import signal
import sys
import time
import warnings
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.nn.functional import cross_entropy

import purestep as ps
from purestep import sharding
from purestep.distributed import control
from purestep.errors import RankError
from purestep.jit import backends, warmup
from purestep.loop import StepsDone, Stopped
from purestep.preflight.dry_run import dry_run
from purestep.preflight.guard import Guard
from purestep.sharding import ddp
from purestep.sharding.local_batches import local_batch
from purestep.testing import comparable

RANK, SIZE = control.rank(), control.size()
V = 4


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


def narrow():
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Dropout(0.3), nn.Linear(16, 3))


@ps.pytree
class Median(ps.metrics.Growing):
    """Keeps every sample, so that its tensor has another length on each rank."""

    values: torch.Tensor
    grows = True

    def merge(self, other):
        return self.merge_all([other])

    def merge_all(self, others):
        return Median(torch.cat([self.values, *(other.values for other in others)]))

    def compute(self):
        return self.values.median() + 1e-3 * self.values[len(self.values) // 3]  # the order of samples counts, too


def loss_fn(net, batch):
    logits = net(batch["x"])
    values = {"accuracy": ps.metrics.accuracy(logits, batch["y"]), "last": ps.metrics.Last(logits[-1, 0])}
    values["median"] = Median(logits[:, 1])
    return cross_entropy(logits, batch["y"]), values


def jitter(sample, key):
    return {**sample, "x": sample["x"] + 0.1 * ps.random.normal(key, sample["x"].shape)}


def job(plan=None, *, train=None, val=None, seed=0, microbatches=V, model=make_model, **options):
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
    step = ps.make_step(loss_fn, tx, microbatches=microbatches, plan=plan)
    state = plan.place(ps.init(model, tx, seed=seed))
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


def fsdp(directory):
    plan = sharding.fsdp()
    return summary(ps.fit(**job(plan), until=ps.steps(12)))


def hsdp(directory):
    plan = sharding.hsdp(fsdp=min(SIZE, 2))
    return summary(ps.fit(**job(plan), until=ps.steps(12)))


def wrapped(directory):
    """A function around the step: the run knows the plan, reads shares of the data, and checks its first batch."""
    calls = []

    def around(step, state, batch):
        calls.append((state.step.is_meta, None if step.plan is None else step.plan.replicas))
        return step(state, batch)

    train = Samples(59, 0)
    options = job(sharding.fsdp(), train=ps.data.batches(train, 12, seed=3, drop_last=False, transform=jitter))
    step = ps.wrap_step(options["step"], around)
    result = ps.fit(**{**options, "step": step}, until=ps.steps(12))
    return summary(result) | {"read": train.read, "calls": sorted(set(calls), key=str)}


def opaque(directory):
    """The same without `wrap_step`, under both kinds of plans."""
    found = {}
    for plan in (ddp(), sharding.fsdp()):
        options = job(plan)
        step = options["step"]
        call = functools.partial(
            ps.fit, **{**options, "callbacks": [], "step": lambda state, batch, step=step: step(state, batch)}
        )
        found[str(bool(plan.shard_axes))] = error_of(lambda call=call: call(until=ps.steps(2)))
    return found


def few(directory):
    """Fewer samples than microbatches in the last batch, fewer validation batches than ranks, parts of parameters."""
    train = ps.data.batches(Samples(27, 0), 12, seed=3, drop_last=False)
    val = ps.data.batches(Samples(7, 1), 4, shuffle=False, drop_last=False)
    options = job(sharding.fsdp(), train=train, val=val, model=narrow)
    return summary(ps.fit(**options, until=ps.steps(7)))


def own_loop(directory):
    """A loop of one's own: what joins the processes is the plan, and they have to leave in order too."""
    plan, tx = sharding.fsdp(), ps.optim.sgd(0.1)
    state = ps.init(narrow, tx, plan=plan)
    step = ps.make_step(loss_fn, tx, plan=plan, microbatches=V)
    for _ in range(3):
        state, _ = step(state, table(12, 0))
    return {"digest": ps.digest(state)}


def relay(directory):
    """The same run, begun on 4 ranks under fsdp, gone on with on 2 under ddp, ended by 1."""
    run_dir = directory.parent / "relay"
    steps = {4: 5, 2: 9, 1: 12}[SIZE]
    snapshots = ps.callbacks.snapshots(every=ps.every.steps(2), keep=ps.snapshot.latest(2))
    options = job(sharding.fsdp() if SIZE == 4 else ddp())
    options["callbacks"] = [*options["callbacks"], snapshots]
    return summary(ps.fit(**options, until=ps.steps(steps), run_dir=run_dir, strict=True))


class Share:
    """A loader of one share of the samples: its order goes on from epoch to epoch."""

    def __init__(self, share):
        self.data, self.draws, self.at = table(59, 0), random.Random(share.index), 0
        self.rows = range(59)[share.slice][:12]
        self.order = []

    def __len__(self):
        return 4

    def __iter__(self):
        if self.at == 0:
            self.order = self.draws.sample(self.rows, 12)
        while self.at < 12:
            self.at += 3
            yield {name: column[self.order[self.at - 3 : self.at]] for name, column in self.data.items()}
        self.at = 0

    def state_dict(self):
        version, words, gauss = self.draws.getstate()
        return {"draws": [version, list(words), gauss], "at": self.at, "order": list(self.order)}

    def load_state_dict(self, state):
        version, words, gauss = state["draws"]
        self.draws.setstate((version, tuple(words), gauss))
        self.at, self.order = state["at"], list(state["order"])


def shares(directory):
    """Loaders per rank: four ranks begin, two go on in the middle of an epoch, one ends; and one that does it alone."""
    opened = []

    def make(share):
        opened.append(share.index)
        return Share(share)

    options = job(train=ps.data.per_rank(make, V))
    options["callbacks"] = [*options["callbacks"], ps.callbacks.snapshots(every=ps.every.steps(3))]
    steps = {4: 5, 2: 9, 1: 14}[SIZE]
    result = ps.fit(**options, until=ps.steps(steps), run_dir=directory.parent / "shares", strict=True)
    alone = ps.fit(**job(train=ps.data.per_rank(Share, V)), until=ps.steps(14)) if SIZE == 1 else result
    return (
        summary(result)
        | {"opened": sorted(opened), "alone": ps.digest(alone.state)}
        | {"state": ps.digest(result.state)}
    )


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


def switched(directory):
    """Compilers that are done earlier on some ranks than on others, and whose bits are not those of the eager step."""
    own, found = backends._eager, {}

    def rounding(traced, mode):
        run = own(traced, mode)
        return lambda tensors: [x * (1 + 2**-20) if x.is_floating_point() else x for x in run(tensors)]

    class Compiler:
        def __init__(self, calls):
            self.end = time.monotonic() + 0.1 * (RANK + 1)

        def ended(self):
            return time.monotonic() >= self.end

        def wait(self):
            pass

    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(backends._BACKENDS, "eager", rounding)
        patch.setattr(warmup.disk_cache, "is_used", lambda backend: True)
        patch.setattr(warmup, "_compiling", Compiler)
        for plan in (ddp(), sharding.fsdp()):

            def trained(until, counter, run_dir=None, plan=plan):
                options = job(plan, train=ps.data.batches(table(60, 0), 12), model=narrow)
                step = ps.jit(options["step"], backend="eager", warmup=counter, donate=True)
                slow = ps.wrap_step(step, lambda inner, state, batch: (time.sleep(0.02), inner(state, batch))[1])
                options = options | {"step": slow, "callbacks": ()}
                run = ps.run(**options, until=ps.steps(until), run_dir=run_dir)
                at = [event.counter for event in run if isinstance(event, ps.loop.Switched)]
                return at, ps.digest(ddp().gather(run.result().state))

            run_dir = directory / f"switched-{bool(plan.shard_axes)}"
            counters, digest = trained(40, "eager", run_dir)
            answer = {"at": counters, "digest": digest, "fixed": trained(40, counters[0])[1]}
            answer["resumed"] = trained(42, "eager", run_dir)
            found[str(bool(plan.shard_axes))] = answer | {"longer": trained(42, counters[0])[1]}
    return found


def with_signal(directory):
    """SIGTERM to the last rank only, in the middle of a burst."""
    options = job()
    calls = []

    def around(inner, state, batch):
        calls.extend([] if state.step.is_meta else [1])  # the dry run does not count
        if len(calls) == 30 and RANK == SIZE - 1:
            os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(0.01)
        return inner(state, batch)

    step = ps.wrap_step(options["step"], around)
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

        def around(inner, state, batch):
            time.sleep(0.002)
            return inner(state, batch)

        began = real()
        result = ps.fit(**{**options, "step": ps.wrap_step(options["step"], around)}, until=ps.seconds(0.3))
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
    return found


def refusals(directory):
    skipping = ps.data.batches(Samples(59, 0), 12, on_bad_sample="skip")
    return {
        "skip": error_of(lambda: ps.fit(**job(train=skipping), until=ps.steps(2))),
        "count": error_of(lambda: ps.fit(**job(microbatches=6), until=ps.steps(2))),
    }


def plan_of(name):
    return sharding.hsdp(fsdp=min(SIZE, 2)) if name == "hsdp" else getattr(sharding, name)()


def batches(width=6, at=0):
    data = table(59, 0)
    narrow = {"x": data["x"][:12, :width], "y": data["y"][:12]}
    return [narrow if i >= at else {n: c[:12] for n, c in data.items()} for i in range(5)]


def refused(loss=loss_fn, *, plan="ddp", tx=None, made_by=None, train=None, callbacks=()):
    tx, plan = tx or ps.optim.adamw(0.02), plan_of(plan)
    step = ps.make_step(loss, tx, microbatches=12, plan=plan)
    state = plan.place(ps.init(narrow, made_by or tx, seed=0))
    train = batches() if train is None else train
    return error_of(lambda: ps.fit(step, state, train, until=ps.steps(4), callbacks=callbacks))


def wrong_under(plan):
    """Programs that cannot work under any plan."""
    devices = set()

    def seen(net, batch):
        devices.add(batch["x"].device.type)
        return {"loss": loss_fn(net, batch)[0]}

    return {
        "loss": refused(seen, plan=plan),
        "model": refused(plan=plan, train=batches(width=5)),
        "tx": refused(plan=plan, made_by=ps.optim.sgd(0.1, momentum=0.9)),
        "metric": refused(lambda net, batch: (loss_fn(net, batch)[0], {3: 1.0}), plan=plan),
        "devices": sorted(devices),
    }


def wrong_on_two_axes(directory):
    return wrong_under("hsdp")


def wrong(directory):
    """Programs that cannot work; and what only one rank gets wrong."""
    found = {plan: wrong_under(plan) for plan in ("ddp", "fsdp")}
    found["later"] = refused(plan="fsdp", train=batches(width=4, at=2))
    found["one"] = refused(lambda net, batch: {"loss": 1.0} if RANK == 2 else loss_fn(net, batch), plan="fsdp")
    data = table(59, 0)
    val = ps.callbacks.evaluate(loss_fn, [{n: c[:4, :5] if c.ndim > 1 else c[:4] for n, c in data.items()}])
    found["evaluation"] = refused(plan="fsdp", callbacks=[val])
    found["alone"] = None
    if RANK == 0:
        plan = sharding.fsdp()
        step = ps.make_step(loss_fn, ps.optim.adamw(0.02), microbatches=V, plan=plan)
        state = plan.place(ps.init(narrow, step.tx))
        Guard(step).first(state, batches()[0])
        found["alone"] = "fine"
    control.gather(0, what="the end of the checks")
    return found


def memory(directory):
    """The estimate of each rank, and the warning when some of them are short."""
    from purestep.preflight import memory as memory_
    from purestep.preflight.single_process import lone

    tx = ps.optim.adamw(0.02)
    batch = {n: c[:32] for n, c in table(59, 0).items()}

    def estimate(name, policy=None):
        plan = plan_of(name)
        step = ps.make_step(loss_fn, tx, microbatches=V, plan=plan, policy=policy)
        state = ps.init(narrow, tx, seed=0)
        state = plan.place(state if policy is None else ps.precision.policy(policy).apply(state))
        rows = local_batch(batch, plan, V)
        alone = lone(step, state, rows)
        needed = memory_.estimate(step, state, rows, dry_run(alone.step, alone.state, alone.batch))
        return dataclasses.asdict(needed), state

    found = {name: estimate(name)[0] for name in ("ddp", "fsdp")}
    found |= {f"bf16 {name}": estimate(name, "bf16-mixed")[0] for name in ("ddp", "fsdp")}
    params = estimate("fsdp")[1].params.values()
    found["local"] = sum(x.nbytes for x in sharding.placement.local(list(params)))
    found["copies"] = sum(2 * x.numel() for x in params if sharding.placement.is_split(x))
    real = memory_.free_memory
    memory_.free_memory = lambda device: 100 if RANK >= 2 else 10**12
    try:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            ps.fit(**job(), until=ps.steps(2))
    finally:
        memory_.free_memory = real
    texts = [str(w.message) for w in caught if w.category is ps.loop.MemoryEstimateWarning]
    return found | {"warned": texts}


def raises(directory):
    """One rank fails; the others are told of it, and by which rank."""
    options = job(microbatches=3)
    calls = []

    def around(inner, state, batch):
        calls.extend([] if state.step.is_meta else [1])  # the dry run does not count
        if len(calls) == 6 and RANK == 1:
            raise ValueError("a bad day")
        return inner(state, batch)

    step = ps.wrap_step(options["step"], around)
    began = time.monotonic()
    text = error_of(lambda: ps.fit(**{**options, "step": step}, until=ps.steps(20)))
    return {"error": text, "seconds": time.monotonic() - began}


def hangs(directory):
    """One rank does not answer; the others wait no longer than the timeout."""
    options = job(microbatches=3)
    calls = []

    def around(inner, state, batch):
        calls.extend([] if state.step.is_meta else [1])  # the dry run does not count
        if len(calls) == 6 and RANK == 1:
            time.sleep(12)
            os._exit(3)
        return inner(state, batch)

    step = ps.wrap_step(options["step"], around)
    began = time.monotonic()
    text = error_of(lambda: ps.fit(**{**options, "step": step}, until=ps.steps(20)))
    return {"error": text, "seconds": time.monotonic() - began}


def exchanges(directory):
    """What world itself promises."""
    long = control.gather(b"x" * (RANK * 1500), what="long values")
    different = error_of(lambda: control.gather(1, what="save" if RANK else "evaluate"))
    try:
        control.agree_each({"a": 1, "b": RANK // 2}, what="two values", instead="do not")
    except RankError as error:
        differ = str(error)
    else:
        differ = "no error"
    return {
        "ranks": control.gather(RANK),
        "long": [len(v) for v in long],
        "from": control.broadcast(RANK, what="a number"),
        "different": different,
        "differ": differ,
    }


def killed(directory):
    """Under torchrun's agent: rank 1 dies of SIGKILL in its first life."""
    options = job(microbatches=2)
    calls = []

    def around(inner, state, batch):
        calls.extend([] if state.step.is_meta else [1])  # the dry run does not count
        if len(calls) == 8 and RANK == 1 and os.environ.get("TORCHELASTIC_RESTART_COUNT") == "0":
            os.kill(os.getpid(), signal.SIGKILL)
        return inner(state, batch)

    step = ps.wrap_step(options["step"], around)
    options["callbacks"] = [*options["callbacks"], ps.callbacks.snapshots(every=ps.every.steps(2))]
    result = ps.fit(**{**options, "step": step}, until=ps.steps(12), run_dir=directory.parent / "killed")
    return summary(result) | {"steps": len(calls)}


def main():
    directory, timeout, *names = sys.argv[1:]
    torch.set_num_threads(1)
    control.initialize(timeout=float(timeout))
    answers = {}
    for name in names:
        answers[name] = globals()[name](Path(directory) / f"of-{SIZE}")
    Path(directory, f"{SIZE}-{RANK}.json").write_text(json.dumps(answers))


if __name__ == "__main__":
    main()
