"""What `ps.step_memory` says of a step, beside what a step of this rank holds: ratios by plan."""

from __future__ import annotations

import torch
from torch import nn

import purestep as ps
from purestep.optim.kernels import workspace
from purestep.parallel import ddp, scattered
from purestep.sharding import placement, step_account
from purestep.testing.storages import Storages

WIDTH, WORDS = 128, 700
BUCKETS = 1 << 16, 1 << 18  # so that the gradients of this model are several buckets


class Block(nn.Module):
    def __init__(self):
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, 512), nn.Linear(512, WIDTH)

    def forward(self, x):
        return x + self.down(self.up(self.norm(x)).relu())


class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.embed, self.head = nn.Embedding(WORDS, WIDTH), nn.Linear(WIDTH, 24)
        self.blocks = nn.Sequential(*[Block() for _ in range(5)])

    def forward(self, x):
        return self.head(self.blocks(self.embed(x)))


def loss_fn(net, batch):
    return net(batch).square().mean()


S = ps.sharding
QUICK = {
    "ddp": (S.ddp, "32", {}),
    "zero1": (S.zero1, "bf16-mixed", {}),
    "zero2": (S.zero2, "32", {}),
    "fsdp": (S.fsdp, "32", {"checkpoint": "blocks.*"}),
}
MORE = {
    f"{name}, {policy}, {microbatches}, {donate}": (plan, policy, {"microbatches": microbatches, "donate": donate})
    for name, plan in (
        ("ddp", S.ddp),
        ("zero1", S.zero1),
        ("zero2", S.zero2),
        ("fsdp", S.fsdp),
        ("kept", lambda: S.fsdp(reshard_after_forward=False)),
        ("fast", lambda: S.ddp(reduction="fast")),
        ("hsdp", lambda: S.hsdp(fsdp=2)),
        ("single", S.single),
    )
    for policy, microbatches, donate in (("32", 8, True), ("bf16-mixed", 4, False))
} | {f"fsdp, jit, {policy}": (S.fsdp, policy, {"microbatches": 4, "compiled": True}) for policy in ("32", "bf16-mixed")}


def ratio(plan, policy, *, samples=96, donate=True, compiled=False, **settings):
    """Return what a rank holds at most in a step, as a part of what was said; and both."""
    policy, tx = ps.precision.policy(policy), ps.optim.adamw(1e-3)
    before = step_account.BUCKETS
    step_account.BUCKETS = ddp.BUCKETS = scattered.BUCKETS = BUCKETS
    try:
        step = ps.make_step(loss_fn, tx, plan=plan, policy=policy, **settings)
        step = ps.jit(step, backend="eager", donate=donate) if compiled else step
        step = ps.donate(step) if donate else step
        state, batch = policy.apply(ps.init(Net, tx, plan=plan)), torch.arange(samples) % WORDS
        said = ps.step_memory(step, state, batch).nbytes
        state, _ = step(state, batch)
        workspace._local.__dict__.clear()  # what an update keeps is seen when it is made
        with Storages(placement.local(state)) as storages:
            state, _ = step(state, batch)
            storages.most = storages.now
            state, _ = step(state, batch)
    finally:
        step_account.BUCKETS = ddp.BUCKETS = scattered.BUCKETS = before
    return [storages.most / said, storages.most, said]


TWO = [["embed", "blocks.0-1"], ["blocks.2-4", "head"]]
FOUR = [["embed", "blocks.0"], ["blocks.1-2"], ["blocks.3"], ["blocks.4", "head"]]
# By number of processes. Microbatches of many samples, so that activations are most of it.
PIPELINES = {
    2: {
        "1f1b": (lambda: S.pipeline(TWO), "32", {}),
        "1f1b, bf16": (lambda: S.pipeline(TWO), "bf16-mixed", {"donate": False}),
        "gpipe": (lambda: S.pipeline(TWO, schedule="gpipe"), "32", {}),
        "interleaved": (lambda: S.pipeline(FOUR, schedule="interleaved"), "32", {}),
        "checkpoint": (lambda: S.pipeline(TWO), "32", {"checkpoint": "blocks.*"}),
        "few samples": (lambda: S.pipeline(TWO), "32", {"samples": 96}),
    },
    4: {
        "1f1b": (lambda: S.pipeline(FOUR), "32", {}),
        "gpipe": (lambda: S.pipeline(FOUR, schedule="gpipe"), "32", {}),
        "ddp": (lambda: S.ddp() * S.pipeline(TWO, 2), "32", {"samples": 96}),
        "zero1": (lambda: S.zero1() * S.pipeline(TWO, 2), "32", {"samples": 96}),
        "zero2": (lambda: S.zero2() * S.pipeline(TWO, 2), "bf16-mixed", {"samples": 96}),
        "fsdp": (lambda: S.fsdp() * S.pipeline(TWO, 2), "32", {"samples": 96}),
        "fsdp, many samples": (lambda: S.fsdp() * S.pipeline(FOUR, 2, schedule="interleaved"), "32", {}),
    },
}


def of_pipelines(size):
    """The same of stages: what is said is what the rank with the most needs."""
    for name, (make, policy, settings) in PIPELINES.get(size, {}).items():
        chosen = {"microbatches": 8, "samples": 2048} | settings
        yield f"memory|{name}", lambda row=(make, policy, chosen): ratio(row[0](), row[1], **row[2])


def memory(size):
    for label, cases in (("memory", QUICK), ("memory-more", MORE)):
        for name, (make, policy, settings) in cases.items():
            fits = size == 4 if name.startswith("hsdp") else size == 1 if name.startswith("single") else True
            if fits and not ("jit" in name and size != 2):
                yield f"{label}|{name}", lambda row=(make, policy, settings): ratio(row[0](), row[1], **row[2])
