"""Memory of a process under each plan, predicted by `ps.step_memory` and seen: `python -m benchmarks.plan_memory`.

Writes `results/plan_memory.json`, and from it `plan_memory.md`; `--resume` measures the rows that are missing.
Each row is a job of gloo processes of its own, in which a residual multilayer perceptron takes donating AdamW steps.
Seen is the peak of resident memory (VmHWM, from the kernel) of rank 0 in the steps after the first, less what the
process held before it made the state. What is offloaded lies in the same memory where the device is the CPU, so of
those rows there is a prediction only.
"""

from __future__ import annotations

import ctypes
import itertools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from benchmarks import machine
from benchmarks.report import table

if TYPE_CHECKING:
    import torch

FOLDER = Path(__file__).parent / "results"
LAYERS, WIDTH = 6, 1024
SAMPLES, MANY = 256, 1536  # of a process; many where activations are to be most of the memory
PLANS = {
    "ddp()": ("ddp", {}),
    "zero1()": ("zero1", {}),
    "zero2()": ("zero2", {}),
    "fsdp(reshard_after_forward=False)": ("fsdp", {"reshard_after_forward": False}),
    "fsdp()": ("fsdp", {}),
    "hsdp(fsdp=2)": ("hsdp", {"data": 2, "fsdp": 2}),
}
POLICIES = "32", "bf16-mixed"
CHECKPOINTED = "ddp()", "fsdp()"
OFFLOADS = None, "optimizer", "params"


def ranks_of(plan_name: str) -> int:
    """Return the number of processes of a row."""
    return 4 if plan_name.startswith("hsdp") else 2


def made(plan_name: str, policy_name: str, checkpoint: str, offload: str | None = None) -> tuple[Any, ...]:
    """Return the model, the policy, the transformation and the step of a row."""
    from torch import nn

    import purestep as ps

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x).relu())

    def make() -> nn.Module:
        return nn.Sequential(*[Block() for _ in range(LAYERS)])

    preset, settings = PLANS[plan_name]
    plan = getattr(ps.sharding, preset)(offload=offload, **settings)
    policy, tx = ps.precision.policy(policy_name), ps.optim.adamw(1e-4)
    step = ps.make_step(
        lambda net, b: net(b).square().mean(), tx, plan=plan, policy=policy, checkpoint=checkpoint or None
    )
    return make, policy, tx, ps.donate(step)


def predicted(
    plan_name: str, policy_name: str, checkpoint: str, samples: int, offload: str | None = None
) -> dict[str, Any]:
    """Return the bytes by kind of the device that a process needs, and those of the host."""
    import torch

    import purestep as ps

    make, policy, tx, step = made(plan_name, policy_name, checkpoint, offload)
    ranks = ranks_of(plan_name)
    with torch.device("meta"):
        state = policy.apply(ps.init(make(), tx))
        batch = torch.empty(ranks * samples, WIDTH)
    sizes = {"data": 2, "fsdp": 2} if ranks == 4 else {step.facts.plan.mesh.axes[0]: ranks}
    found = ps.step_memory(step, state, batch, sizes)
    return {"kinds": found.memory, "predicted": found.nbytes, "host": sum(found.host.values())}


def held(field: str) -> int:
    """Return a size that the kernel keeps of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def work(plan_name: str, policy_name: str, checkpoint: str, samples: int) -> None:
    """Train one row in one process of its job, and print what was seen."""
    import torch

    import purestep as ps

    torch.set_num_threads(1)
    # Freed tensors go back to the system at once, so that what is measured is what lives.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    ps.sharding.initialize(timeout=300)
    x = torch.ones(ranks_of(plan_name) * samples, WIDTH)
    small = ps.make_step(lambda net, b: net(b).square().mean(), ps.optim.sgd(0.1), plan=ps.sharding.fsdp())
    small(ps.init(lambda: torch.nn.Linear(8, 8), ps.optim.sgd(0.1), plan=ps.sharding.fsdp()), torch.ones(4, 8))
    before = held("VmRSS")
    make, policy, tx, step = made(plan_name, policy_name, checkpoint)
    plan = step.facts.plan
    state = policy.apply(ps.init(make, tx, plan=plan, deferred=True))
    rest = ps.tree.nbytes(ps.sharding.placement.local(state))
    state, _ = step(state, x)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        state, _ = step(state, x)
    found = {"seen": held("VmHWM") - before, "rest": rest, "digest": ps.digest(plan.gather(state))}
    if ps.sharding.rank() == 0:
        print(json.dumps(found))


def seen(plan_name: str, policy_name: str, checkpoint: str, samples: int) -> dict[str, Any]:
    """Run the job of a row, and return what its rank 0 saw."""
    ranks = ranks_of(plan_name)
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(ranks), "OMP_NUM_THREADS": "1"}
    row = json.dumps([plan_name, policy_name, checkpoint, samples])
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.plan_memory", "--row", row],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(ranks)
    ]
    first, *_ = [job.communicate(timeout=1200)[0] for job in jobs]
    found: dict[str, Any] = json.loads(first.splitlines()[-1])
    return found


def main() -> int:
    """Measure every row, and write the tables."""
    if "--row" in sys.argv:
        work(*json.loads(sys.argv[sys.argv.index("--row") + 1]))
        return 0
    known = json.loads((FOLDER / "plan_memory.json").read_text())["rows"] if "--resume" in sys.argv else []
    wanted = [(plan, policy, "", SAMPLES) for policy, plan in itertools.product(POLICIES, PLANS)]
    wanted += [(plan, "32", rule, MANY) for plan in CHECKPOINTED for rule in ("", "*")]
    rows = []
    for case in wanted:
        row = dict(zip(("plan", "policy", "checkpoint", "samples"), case, strict=True))
        found = [r for r in known if row.items() <= r.items()] or [row | seen(*case)]
        rows += [r | predicted(*case) for r in found]
        print(rows[-1], file=sys.stderr)
        write(rows)
    return 0


def write(rows: list[dict[str, Any]]) -> None:
    """Write what has been seen so far, and the predictions."""
    offloaded = [
        {"plan": plan, "policy": policy, "offload": offload} | predicted(plan, policy, "", SAMPLES, offload)
        for plan, policy, offload in itertools.product(PLANS, POLICIES, OFFLOADS)
    ]
    found = {"machine": machine.describe(), "rows": rows, "offloaded": offloaded}
    FOLDER.mkdir(exist_ok=True)
    (FOLDER / "plan_memory.json").write_text(json.dumps(found, indent=1) + "\n")
    (FOLDER / "plan_memory.md").write_text(page(found))


def page(found: dict[str, Any]) -> str:
    """Return the tables as Markdown."""

    def mb(count: int) -> str:
        return f"{count / 1e6:,.0f}"

    kinds = ("grads", "gathered", "sums", "update", "activations")
    head = ["plan", "policy", "checkpoint", "samples", "state", *kinds, "predicted", "seen", "seen / predicted"]
    rows = [
        [
            f"`{r['plan']}`",
            r["policy"],
            f"`{r['checkpoint']}`" if r["checkpoint"] else "",
            str(r["samples"]),
            mb(r["rest"]),
            *(mb(r["kinds"].get(kind, 0)) for kind in kinds),
            *map(mb, (r["predicted"], r["seen"])),
            f"{r['seen'] / r['predicted']:.2f}",
        ]
        for r in found["rows"]
    ]
    # Four processes see another batch than two.
    groups = {(ranks_of(r["plan"]), r["policy"], r["samples"]) for r in found["rows"]}
    digests = {(ranks_of(r["plan"]), r["policy"], r["samples"], r["digest"]) for r in found["rows"]}
    away = [
        [f"`{r['plan']}`", r["policy"], str(r["offload"]), mb(r["predicted"]), mb(r["host"])]
        for r in found["offloaded"]
    ]
    params = LAYERS * 8 * WIDTH**2
    return "\n".join(
        [
            "# Memory of a process under each plan",
            "",
            f"{params / 1e6:.0f} million parameters in {LAYERS} blocks, donating steps of AdamW, two "
            "processes (`hsdp`: four), samples a process; MB (10^6 bytes). "
            f"{found['machine']['cpu']}, {found['machine']['cores']} cores, shared with other work. "
            "`python -m benchmarks.plan_memory` writes this file.",
            "",
            table(head, rows),
            "",
            "All rows of a policy, a number of processes and of samples end with one digest of the state."
            if len(digests) == len(groups)
            else f"DIFFERENT digests: {len(digests)} for {len(groups)} policies and numbers of processes and samples",
            "",
            "`state` is what rests between steps; the kinds after it are those of the prediction, `ps.step_memory`, at "
            "the moment of a step in which most is there. Seen is the peak of resident memory: it has the workspace of "
            "kernels and what the C library keeps, too.",
            "",
            "## With offload, predicted",
            "",
            "Of a process whose device is a card; not seen, because here the device is the CPU.",
            "",
            table(["plan", "policy", "offload", "device", "host"], away),
            "",
        ]
    )


if __name__ == "__main__":
    raise SystemExit(main())
