"""One process of several: train small models under every plan, and write the digests down as JSON.

Arguments: a directory, the sizes of the jobs to be part of one after the other, this process's number, and the cases or
single rows of them, separated by semicolons.
"""

import dataclasses
import functools
import gc
import logging
import os
import random
import sys
import weakref
from pathlib import Path
from unittest.mock import patch

import expert_job
import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

import purestep as ps
from purestep import optim
from purestep.distributed import collectives, machines, mesh
from purestep.optim.kernels import sliced
from purestep.parallel import assignment
from purestep.parallel.fsdp_layout import Rows
from purestep.parallel.fsdp_units import Session
from purestep.random.torch_mode import KeyedRandom
from purestep.sharding import Spec, ddp, fsdp, hsdp, placement, tensor_parallel, zero1, zero2


class Block(nn.Module):
    def __init__(self, width, drop=0.2):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.Linear(2 * width, width)
        self.drop = nn.Dropout(drop)

    def forward(self, x):
        return x + self.drop(self.down(gelu(self.up(self.norm(x)))))


class Net(nn.Module):
    """BatchNorm, dropout, blocks, and a parameter of odd shape that no number of ranks divides."""

    def __init__(self):
        super().__init__()
        self.embed, self.batchnorm, self.head = nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Linear(16, 5)
        self.blocks = nn.ModuleList([Block(16) for _ in range(2)])
        self.odd = nn.Parameter(torch.randn(7, 3))

    def forward(self, x):
        x = self.batchnorm(self.embed(x))
        for block in self.blocks:
            x = block(x)
        return self.head(x) + self.odd.sum() * 1e-3


class Tied(nn.Module):
    """Tied weights, and blocks that run twice: once more under a checkpoint."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(12, 16), nn.Linear(16, 12, bias=False)
        self.head.weight = self.embed.weight
        self.blocks = nn.ModuleList([Block(16) for _ in range(2)])

    def forward(self, x):
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        for block in self.blocks:
            x = ps.checkpoint(block, x)
        return self.head(x).flatten(0, 1)


class Routed(nn.Module):
    """Each sample runs through one expert, and those without samples are not called; norms come last in their units."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(3))

    def forward(self, x):
        chosen, x = (x[:, 0] * 2).long().abs() % 3, self.embed(x)
        for i, expert in enumerate(self.experts):
            if len(hit := (chosen == i).nonzero().squeeze(1)):
                x = x.index_add(0, hit, expert(x[hit]).to(x.dtype))
        return self.head(x)


class LayerDrop(nn.Module):
    """Draws from the generators of the host: whether a block runs, and noise."""

    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Linear(8, 16), nn.Linear(16, 5)
        self.blocks = nn.ModuleList([Block(16) for _ in range(3)])

    def forward(self, x):
        x = self.embed(x) + torch.from_numpy(np.random.randn(16).astype(np.float32))
        for block in self.blocks:
            if random.random() < 0.6:
                x = block(x)
        return self.head(x)


def loss_fn(net, batch):
    logits = net(batch["x"])
    return cross_entropy(logits, batch["y"].flatten()), {
        "largest": ps.metrics.Max(logits.max()),
        "one": ps.metrics.Sum(1),
    }


def weighted_loss(net, batch):
    y = batch["y"].flatten()
    return ps.weighted(cross_entropy(net(batch["x"]), y), (y > 2).sum() + 1)


def masked_loss(net, batch):
    mask = (batch["y"] > 0) + 0.25
    each = cross_entropy(net(batch["x"]), batch["y"], reduction="none")
    return ps.weighted((each * mask).sum() / mask.sum(), mask.sum())


def poisoned(net, batch):
    # Infinite for one element of one parameter only, which one rank has a part of.
    return loss_fn(net, batch)[0] + net.head.weight[0, 0] * (batch["scale"].max() - 1)


def batches(model, samples, steps):
    g = torch.Generator().manual_seed(7)
    for i in range(steps):
        scale = torch.ones(samples)
        scale[samples // 2] = float("inf") if i == 1 else 1.0
        if model in (Net, Routed, LayerDrop):
            yield {"x": torch.randn(samples, 8, generator=g), "y": torch.randint(0, 5, (samples,), generator=g)}
        else:
            x, y = torch.randint(0, 12, (2, samples, 4), generator=g)
            yield {"x": x, "y": y, "scale": scale}


def adamw():
    return optim.chain(optim.clip_by_global_norm(0.3), optim.adamw(1e-2))


def train(
    plan,
    model=Net,
    v=4,
    samples=16,
    loss=loss_fn,
    tx=adamw,
    policy=None,
    frozen=None,
    steps=3,
    backend=None,
    donate=False,
    keep=False,
    checkpoint=None,
    by_unit=False,
):
    tx = tx()
    state = ps.init(model, tx, seed=1, frozen=frozen)
    if policy:
        state = ps.precision.policy(policy).apply(state)
    state = plan.place(state)
    step = ps.make_step(loss, tx, microbatches=v, policy=policy, plan=plan, checkpoint=checkpoint)
    if backend:
        step = ps.jit(step, backend=backend, donate=True, by_unit=by_unit)
    if donate:
        step, limits = ps.donate(step), (sliced.LONG_ON_CPU, sliced.WORTH)
        sliced.LONG_ON_CPU = sliced.WORTH = 16  # so that parts of these small tensors are written over, slice by slice
    seen, memory = [], []
    for batch in batches(model, samples, steps):
        watched = model is Net and not keep and not donate and steps <= 3
        before = ps.digest(plan.gather(state.params)) if watched else None
        new, metrics = step(state, batch)
        if watched and ps.digest(plan.gather(state.params)) != before:
            raise RuntimeError("the step changed its input")
        state = new
        seen.append(metrics)
        memory.append([x.data_ptr() for x in ps.tree.leaves(placement.local(state.params)) if x.numel() > 16])
    if donate:
        sliced.LONG_ON_CPU, sliced.WORTH = limits
        if memory[0] != memory[-1]:
            raise RuntimeError("the step did not write in place")
    if keep:
        return state, metrics
    return ps.digest(plan.gather(state)) + ps.digest(seen)[:8]


def plans(size):
    found = {"ddp": ddp(), "fsdp": fsdp(), "keep": fsdp(reshard_after_forward=False)}
    found |= {"root": fsdp(units=()), "pad": fsdp(fallback="pad")}
    found |= {"zero1": zero1(), "zero2": zero2(), "zero2, pad": zero2(fallback="pad")}
    if size == 4:
        found |= {"hsdp": hsdp(fsdp=2), "hsdp, zero1": hsdp(fsdp=2, zero=1), "hsdp, zero2": hsdp(fsdp=2, zero=2)}
    return found


CASES = {
    "plain": {},
    "ragged": {"samples": 10, "loss": weighted_loss},
    "few": {"model": Tied, "samples": 3},
    "single": {"model": Tied, "samples": 1, "loss": weighted_loss},
    "tied": {"model": Tied, "samples": 8},
    "frozen": {"model": Tied, "samples": 8, "frozen": ["blocks.0.*", "*.up.bias"], "steps": 2},
    "bf16-mixed": {"model": Tied, "samples": 8, "policy": "bf16-mixed"},
    "int8": {"model": Tied, "samples": 8, "policy": "int8"},
    "skipped": {"model": Tied, "samples": 8, "policy": "16-mixed", "loss": poisoned},
    "muon": {"model": Tied, "samples": 8, "tx": lambda: optim.muon(1e-2), "steps": 2},
    "finite": {"model": Tied, "samples": 8, "loss": poisoned, "tx": lambda: optim.apply_if_finite(adamw())},
    "routed": {"model": Routed, "policy": "bf16-mixed", "v": 8, "samples": 24, "steps": 4},
    "layerdrop": {"model": LayerDrop, "steps": 4},
    "fifty": {"policy": "bf16-mixed", "steps": 50},
    "large": {"model": Tied, "samples": 8, "tx": lambda: optim.skip_large_updates(optim.adamw(1e-2), 0.8), "steps": 2},
}
ALL, SOME = ("plain", "tied"), ("plain", "tied", "ragged", "skipped", "frozen", "routed", "layerdrop")


def bits(size):
    for name, options in CASES.items():
        for label, plan in plans(size).items():
            long = name == "fifty" and label in ("ddp", "fsdp", "hsdp", "keep")
            on_four = long or name in ALL or label in ("ddp", "fsdp", "zero1", "zero2")
            on_four = on_four or (label == "hsdp" and name in SOME)
            on_four = on_four and not (name == "fifty" and "zero" in label)
            on_fewer = (label == "fsdp" and name in SOME) or (size == 1 and label == "ddp") or (long and size == 2)
            if on_four if size == 4 else on_fewer:
                yield f"{name}|{label}", lambda plan=plan, options=options: train(plan, **options)
    for label, make in MACHINES.items() if size == 4 else ():
        for name in ("plain", "ragged", "few", "skipped", "twelve"):
            options = TWELVE if name == "twelve" else CASES[name]
            yield f"{name}|{label}, machines", lambda make=make, options=options: on_machines(2, make(), options)
    yield "fast|ddp", lambda: train(ddp(reduction="fast"))
    yield "fast|fsdp", lambda: train(fsdp(reduction="fast"))
    if size == 2:
        for label, plan in (("fsdp", fsdp()), ("zero1", zero1()), ("zero2", zero2())):
            yield f"tied|jit, {label}", lambda plan=plan: train(plan, **CASES["tied"], backend="eager")
            yield f"skipped|{label}, two", lambda plan=plan: train(plan, **CASES["skipped"])
        for label, plan in (("fsdp", fsdp()), ("zero2", zero2())):
            yield f"plain|{label}, checkpoint", lambda plan=plan: train(plan, checkpoint="blocks.*")
        for name in ("plain", "tied", "skipped"):
            for label, plan in (("ddp", ddp()), ("fsdp", fsdp()), ("zero1", zero1()), ("zero2", zero2())):
                options = CASES[name] | {"donate": True}
                yield f"{name}|{label}, donated", lambda plan=plan, options=options: train(plan, **options)


TWELVE = {"v": 12, "samples": 11, "model": Tied, "steps": 2}
MACHINES = {"ddp": ddp, "zero1": zero1, "zero2": zero2, "fsdp": fsdp, "hsdp": functools.partial(hsdp, fsdp=2)}


def on_machines(each, plan, options, sent=None):
    """Train as if every so many processes were on a machine of their own; count the bytes of slices between those."""
    rank, size, exchange = dist.get_rank(), dist.get_world_size(), collectives.exchange
    told = {"RANK": rank, "WORLD_SIZE": size, "LOCAL_RANK": rank % each, "LOCAL_WORLD_SIZE": each}
    told |= {"MASTER_ADDR": "none", "MASTER_PORT": 1}

    def noting(values, group, lengths, own):
        if sent is not None and group is not None:
            others = [r for r in dist.get_process_group_ranks(group) if r // 2 != rank // 2]
            sent.append(len(others) * own * values.element_size())
        return exchange(values, group, lengths, own)

    groups = mesh._cache.copy()
    forget()
    collectives.exchange = noting
    try:
        with patch.dict(os.environ, {name: str(value) for name, value in told.items()}):
            return train(plan, **options)
    finally:
        collectives.exchange = exchange
        forget()
        mesh._cache.update(groups)


def forget():
    """Let groups be made anew."""
    mesh._cache.clear()
    assignment._shares.cache_clear()
    machines._owner = None


def between():
    """Return what the slices of a step take between two machines, with and without a sum on each of them."""
    found = {}
    for label in ("ddp", "zero1", "zero2", "fsdp"):
        for each in (2, 1):
            sent = []
            on_machines(each, MACHINES[label](), {"model": Tied, "steps": 1}, sent)
            found.setdefault(label, []).append(sum(sent))
    return found


def rounded(plan, **options):
    """Train with the compiler that rounds."""
    import shared_rounding  # found once the script has said where

    with shared_rounding.compiler():
        return train(plan, **options, backend="eager", by_unit=True)


def by_unit(size):
    """Every plan runs the same compiled pieces, of each unit a forward and a backward one."""
    for name, model in (("by unit", Tied), ("by unit, batch norm", Net)):
        for label, plan in plans(size).items():
            chosen = ("fsdp", "hsdp") if size == 4 else ("ddp", "fsdp", "keep", "zero1", "zero2")
            if label in chosen:
                yield f"{name}|{label}", lambda plan=plan, model=model: rounded(plan, model=model, samples=10, steps=4)


def six(size):
    for label, plan in (("ddp", ddp()), ("fsdp", fsdp())):
        if size == 4:
            continue
        yield f"six|{label}", lambda plan=plan: train(plan, v=6, samples=13, model=Tied)
    yield "twelve|hsdp", lambda: train(hsdp(fsdp=2 if size == 4 else size), **TWELVE)


# --- other things that are asked of several processes -----------------------------------------------------------------


class Equal(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(32, 32, bias=False) for _ in range(24)])
        self.twice = True

    def forward(self, x):
        for block in self.blocks:
            x = torch.tanh(block(x))
        return x


def live():
    """Count the blocks that are whole at the same time, by the memory they lie in, and those that are on their way."""
    alive, most, coming = [0], [0], [0]
    unpack, ahead = Rows.unpack, Session.ahead

    def watched(self, running=None):
        ahead(self, running)
        there = [x for x in self.lives.values() if x.flat is not None or x.pending]
        coming[0] = max(coming[0], len(there))

    def counted(self, received):
        flat = unpack(self, received)
        # The memory of an array is freed when nothing uses it any more, whoever it was.
        array = np.array(flat.numpy())
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        weakref.finalize(array, lambda: alive.__setitem__(0, alive[0] - 1))
        return torch.from_numpy(array)

    Rows.unpack, Session.ahead = counted, watched
    found = {}
    try:
        for label, plan, compiled in (
            ("reshard", fsdp(), False),
            ("keep", fsdp(reshard_after_forward=False), False),
            ("by unit", fsdp(), True),
        ):
            tx = optim.sgd(0.1)
            state = plan.place(ps.init(Equal, tx, seed=0))
            step = ps.make_step(lambda net, x: net(x).square().mean(), tx, plan=plan)
            step = ps.jit(step, backend="eager", by_unit=True) if compiled else step
            most[0] = coming[0] = 0
            for _ in range(3):  # what comes next is known from the second microbatch on
                state, _ = step(state, torch.ones(4, 32))
            gc.collect()
            found[label] = [most[0], coming[0], alive[0]]
    finally:
        Rows.unpack, Session.ahead = unpack, ahead
    return found


class Noisy(nn.Module):
    """Draws only where the first number of its batch is positive."""

    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 4)

    def forward(self, x):
        y = self.linear(x)
        return nn.functional.dropout(y, 0.5) if x[0, 0] > 0 else y


def later():
    """Train a model that begins to draw in its fifth step; count how often the mode that redirects draws was entered in
    the steps before, but the first."""
    entered, enter, tx, plan = [0] * 6, KeyedRandom.__enter__, optim.sgd(0.1), ddp()
    state = plan.place(ps.init(Noisy, tx, seed=3))
    step = ps.make_step(lambda net, x: net(x).square().mean(), tx, plan=plan, microbatches=4)

    def counted(self):
        entered[number] += 1
        return enter(self)

    KeyedRandom.__enter__ = counted
    try:
        for number in range(6):
            state, _ = step(state, torch.full((8, 4), number - 3.5))
    finally:
        KeyedRandom.__enter__ = enter
    return {"quiet": sum(entered[1:4]), "drawing": entered[5] > 0, "digest": ps.digest(plan.gather(state).params)}


class Touching(nn.Module):
    def __init__(self):
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(4, 4), nn.Linear(4, 4)])

    def forward(self, x):
        return x @ self.blocks[0].weight.to(x.dtype)


def message(call):
    try:
        call()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "nothing was raised"


def refusals():
    def touch():
        tx = optim.sgd(0.1)
        state = fsdp().place(ps.init(Touching, tx))
        ps.make_step(lambda net, x: net(x).sum(), tx, plan=fsdp())(state, torch.ones(4, 4))

    return {
        "touched": message(touch),
        "fused": message(lambda: train(fsdp(), tx=lambda: optim.adamw(1e-2, fused=True))),
        "count": message(lambda: train(ddp(), v=3)),
        "synced": message(lambda: train(ddp(reduction="fast", sync_batchnorm=True), backend="eager")),
    }


class Attention(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.norm = nn.Embedding(12, 16), nn.LayerNorm(16)
        self.q, self.k, self.v, self.out = (nn.Linear(16, 16) for _ in range(4))
        self.up, self.down, self.head = nn.Linear(16, 32), nn.Linear(32, 16), nn.Linear(16, 12)

    def forward(self, x):
        x = self.embed(x)
        q, k, v = (f(self.norm(x)).unflatten(-1, (4, 4)).transpose(1, 2) for f in (self.q, self.k, self.v))
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return self.head(x + self.down(gelu(self.up(x)))).flatten(0, 1)


def tensor(size):
    """In two parts, whoever computes them: the bits are the same on every number of ranks and in every product."""
    rows = ("q.*", "k.*", "v.*", "up.*", "embed.*", "head.*")
    rules = {rows: Spec("tensor"), ("out.weight", "down.weight"): Spec(None, "tensor")}

    def parts(ranks):
        return tensor_parallel(rules, ranks, tensor_parts=2)

    found = {"none": None} if size == 1 else {"tensor": ddp() * parts(2)}
    found |= {"ddp": ddp() * parts(1)} if size < 4 else {"fsdp": fsdp() * parts(2)}
    for label, plan in found.items():

        def run(plan=plan):
            tx = optim.chain(optim.clip_by_global_norm(1.0), optim.adamw(1e-2))
            state = ps.init(Attention, tx, seed=7, plan=plan)
            step = ps.make_step(loss_fn, tx, microbatches=4, plan=plan)
            for batch in batches(Attention, 8, 3):
                state, metrics = step(state, batch)
            evaluate = ps.make_eval(loss_fn, plan=plan)(state, next(batches(Attention, 8, 1)))
            numbers = [float(m.compute()) for m in (metrics["loss"], evaluate["loss"], evaluate["largest"])]
            whole = state if plan is None else plan.gather(state)
            return [ps.digest([state, metrics]), *numbers, *whole.params["q.weight"].flatten().tolist()[:16]]

        yield f"tensor|{label}", run


class Normed(nn.Module):
    """Batch norm with and without weights, over samples and over places too; one under a checkpoint."""

    def __init__(self):
        super().__init__()
        self.conv, self.first = nn.Conv1d(2, 6, 3), nn.BatchNorm1d(6)
        self.blocks = nn.ModuleList([nn.Linear(24, 24), nn.Linear(24, 24)])
        self.second, self.head = nn.BatchNorm1d(24, affine=False, momentum=0.3), nn.Linear(24, 4)

    def forward(self, x):
        x = torch.tanh(self.first(self.conv(x))).flatten(1)
        for block in self.blocks:
            x = x + ps.checkpoint(lambda x, block=block: torch.tanh(self.second(block(x))), x)
        return self.head(x)


def synced(size):
    """With statistics over all ranks, uneven microbatches on several ranks are one batch on one process."""
    kinds = {"even": (8, loss_fn), "uneven": (7, loss_fn), "few": (3, loss_fn), "weighted": (7, masked_loss)}
    for label, plan in plans(size).items():
        if label not in ("ddp", "fsdp", "hsdp"):
            continue
        for kind, (samples, loss) in kinds.items():
            if kind == "few" and size == 2:
                continue

            def run(plan=plan, samples=samples, loss=loss):
                plan = dataclasses.replace(plan, reduction="fast", sync_batchnorm=True)
                tx = optim.sgd(0.5)
                state = plan.place(ps.init(Normed, tx, seed=3))
                step = ps.make_step(loss, tx, plan=plan)
                step = ps.jit(step, backend="eager", unjittable="eager") if loss is masked_loss else step
                g = torch.Generator().manual_seed(5)
                for _ in range(3):
                    x, y = torch.randn(samples, 2, 6, generator=g), torch.randint(0, 4, (samples,), generator=g)
                    state, metrics = step(state, {"x": x, "y": y})
                whole = plan.gather(state)
                tensors = whole.params | whole.buffers
                return {"loss": [float(metrics["loss"])]} | {n: t.flatten().tolist() for n, t in tensors.items()}

            yield f"synced|{label}|{kind}", run


def compressed(size):
    """What a step of SGD changes, by plan and dtype that is sent, as full tensors; and the dtypes that were sent."""
    for label, make in (("ddp", ddp), ("fsdp", fsdp), *([("hsdp", functools.partial(hsdp, fsdp=2))] * (size == 4))):
        for dtype in (None, "bf16", "fp16"):
            yield f"compressed|{label}|{dtype}", lambda make=make, dtype=dtype: one_step(make, dtype)


def one_step(make, dtype):
    plan, sent = make(reduction="fast", compress=dtype), []
    originals = {name: getattr(collectives, name) for name in ("sum_into", "scatter_sum")}

    def noting(original):
        def call(values, group):
            if group is not None:
                sent.append((str(values.dtype), values.numel()))
            return original(values, group)

        return call

    tx = optim.sgd(1.0)
    before = ps.init(Net, tx, seed=3, plan=plan)
    batch = {"x": torch.randn(8, 8, generator=torch.Generator().manual_seed(1)), "y": torch.arange(8) % 5}
    try:
        for name, original in originals.items():
            setattr(collectives, name, noting(original))
        after, _ = ps.make_step(loss_fn, tx, microbatches=4, plan=plan)(before, batch)
    finally:
        for name, original in originals.items():
            setattr(collectives, name, original)
    whole = [plan.gather(state).params for state in (before, after)]
    moved = {name: (whole[0][name] - whole[1][name]).flatten().tolist() for name in whole[0]}
    buffers = {name: x.tolist() for name, x in plan.gather(after).buffers.items()}
    return {"moved": moved, "buffers": buffers, "sent": sent}


def evaluated(size):
    for label, plan in plans(size).items():

        def run(plan=plan):
            state, _ = train(plan, keep=True, steps=1)
            evaluate = ps.make_eval(loss_fn, plan=plan)
            return ps.digest([evaluate(state, b) for b in batches(Net, 6, 2)])

        yield f"evaluated|{label}", run


def checks(size, number):
    yield from six(size)
    if size == 3:
        return
    yield from bits(size)
    yield from by_unit(size)
    yield from evaluated(size)
    yield from tensor(size)
    yield from synced(size)
    yield from compressed(size)
    for label, plan in expert_job.plans(size).items():
        yield f"experts|{label}", lambda plan=plan: expert_job.train("tokens", plan, 1)["digest"]
    yield "later", later
    if size == 4:
        yield "between", between
    from memory_cases import memory  # found once the script has said where

    yield from memory(size)
    if size == 2:
        yield "live", live
        yield "refusals", refusals


def main(directory, sizes, number, cases):
    def asked(name):
        return name in cases or name.partition("|")[0] in cases

    logging.getLogger("purestep.jit").setLevel(logging.ERROR)  # of gradients that run uncompiled, as they are to
    answer(directory, sizes, number, lambda size: checks(size, number), asked)


if __name__ == "__main__":
    sys.path += [str(Path(__file__).parent), str(Path(__file__).parents[1] / "shared")]
    from shared_ranks import answer

    main(sys.argv[1], [int(n) for n in sys.argv[2].split(",")], int(sys.argv[3]), sys.argv[4].split(";"))
