"""Memory of a process under each plan, predicted by `dry_run` and seen: `python -m benchmarks.plan_memory`.

Writes `results/plan_memory.json`, and from it `plan_memory.md`; `--resume` measures the rows that are missing.
Each row is a job of two gloo processes of its own, in which a residual multilayer perceptron takes donating AdamW
steps. Seen is the peak of resident memory (VmHWM, from the kernel) of rank 0 in the steps after the first, less what
the process held before it made the state. What is offloaded lies in the same memory where the device is the CPU, so of
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
from typing import Any

from benchmarks import machine
from benchmarks.report import table

FOLDER = Path(__file__).parent / "results"
RANKS, LAYERS, WIDTH, SAMPLES = 2, 6, 512, 256
PLANS = {
    "ddp()": ("ddp", {}),
    "zero1()": ("zero1", {}),
    "zero2()": ("zero2", {}),
    "fsdp(reshard_after_forward=False)": ("fsdp", {"reshard_after_forward": False}),
    "fsdp()": ("fsdp", {}),
}
POLICIES = "32", "bf16-mixed"
OFFLOADS = None, "optimizer", "params"


def state_under(plan_name: str, policy_name: str, offload: str | None = None, meta: bool = False) -> tuple[Any, ...]:
    """Return the plan, the policy, the transformation and the state of a row."""
    import torch
    from torch import nn

    import purestep as ps

    class Block(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH, bias=False), nn.Linear(4 * WIDTH, WIDTH, bias=False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + self.down(self.up(x).relu())

    preset, settings = PLANS[plan_name]
    plan = getattr(ps.sharding, preset)(RANKS if meta else -1, offload=offload, **settings)
    policy, tx = ps.precision.policy(policy_name), ps.optim.adamw(1e-4)
    if meta:
        with torch.device("meta"):
            return plan, policy, tx, policy.apply(ps.init(nn.Sequential(*[Block() for _ in range(LAYERS)]), tx))

    def make() -> nn.Module:
        return nn.Sequential(*[Block() for _ in range(LAYERS)])

    return plan, policy, tx, policy.apply(ps.init(make, tx, plan=plan, deferred=True))


def predicted(plan_name: str, policy_name: str, offload: str | None = None) -> tuple[int, int]:
    """Return the bytes of the device and of the host that a process needs, without activations."""
    plan, policy, _, state = state_under(plan_name, policy_name, offload, meta=True)
    run = plan.dry_run(state, compute_dtype=policy.copied, reduce_dtype=policy.reduce)
    return run.nbytes, sum(run.host.values())


def held(field: str) -> int:
    """Return a size that the kernel keeps of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field))


def work(plan_name: str, policy_name: str) -> None:
    """Train one row in one process of its job, and print what was seen."""
    import torch

    import purestep as ps

    torch.set_num_threads(1)
    # Freed tensors go back to the system at once, so that what is measured is what lives.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    ps.sharding.initialize(timeout=120)
    x = torch.ones(RANKS * SAMPLES, WIDTH)
    small = ps.make_step(lambda net, b: net(b).square().mean(), ps.optim.sgd(0.1), plan=ps.sharding.fsdp())
    small(ps.init(lambda: torch.nn.Linear(8, 8), ps.optim.sgd(0.1), plan=ps.sharding.fsdp()), torch.ones(4, 8))
    before = held("VmRSS")
    plan, policy, tx, state = state_under(plan_name, policy_name)
    rest = ps.tree.nbytes(ps.sharding.placement.local(state))
    step = ps.make_step(lambda net, b: net(b).square().mean(), tx, plan=plan, policy=policy)
    step = ps.donate(step)
    state, _ = step(state, x)
    Path("/proc/self/clear_refs").write_text("5")
    for _ in range(2):
        state, _ = step(state, x)
    if ps.sharding.rank() == 0:
        print(json.dumps({"seen": held("VmHWM") - before, "rest": rest, "digest": ps.digest(plan.gather(state))}))
    else:
        ps.digest(plan.gather(state))


def seen(plan_name: str, policy_name: str) -> dict[str, Any]:
    """Run the job of a row, and return what its rank 0 saw."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    shared = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "WORLD_SIZE": str(RANKS), "OMP_NUM_THREADS": "1"}
    row = json.dumps([plan_name, policy_name])
    jobs = [
        subprocess.Popen(
            [sys.executable, "-m", "benchmarks.plan_memory", "--row", row],
            env={**os.environ, **shared, "RANK": str(rank), "LOCAL_RANK": str(rank)},
            stdout=subprocess.PIPE,
            text=True,
        )
        for rank in range(RANKS)
    ]
    first, *_ = [job.communicate(timeout=600)[0] for job in jobs]
    found: dict[str, Any] = json.loads(first.splitlines()[-1])
    return found


def main() -> int:
    """Measure every row, and write the tables."""
    if "--row" in sys.argv:
        work(*json.loads(sys.argv[sys.argv.index("--row") + 1]))
        return 0
    known = json.loads((FOLDER / "plan_memory.json").read_text())["rows"] if "--resume" in sys.argv else []
    rows = []
    for policy, plan in itertools.product(POLICIES, PLANS):
        row = {"plan": plan, "policy": policy}
        rows += [r for r in known if row.items() <= r.items()] or [
            row | {"predicted": predicted(plan, policy)[0]} | seen(plan, policy)
        ]
        print(rows[-1], file=sys.stderr)
        write(rows)
    return 0


def write(rows: list[dict[str, Any]]) -> None:
    """Write what has been seen so far, and the predictions."""
    offloaded = [
        {"plan": plan, "policy": policy, "offload": offload, "bytes": predicted(plan, policy, offload)}
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

    head = ["plan", "policy", "state", "predicted", "seen", "seen / predicted"]
    rows = [
        [
            f"`{r['plan']}`",
            r["policy"],
            *map(mb, (r["rest"], r["predicted"], r["seen"])),
            f"{r['seen'] / r['predicted']:.2f}",
        ]
        for r in found["rows"]
    ]
    digests = {(r["policy"], r["digest"]) for r in found["rows"]}
    policies = {r["policy"] for r in found["rows"]}
    away = [[f"`{r['plan']}`", r["policy"], str(r["offload"]), *map(mb, r["bytes"])] for r in found["offloaded"]]
    params = LAYERS * 8 * WIDTH**2
    return "\n".join(
        [
            "# Memory of a process under each plan",
            "",
            f"{params / 1e6:.0f} million parameters in {LAYERS} blocks, AdamW, {RANKS} processes, {SAMPLES} samples "
            f"each; MB (10^6 bytes). {found['machine']['cpu']}, {found['machine']['cores']} cores, shared with "
            "other work. `python -m benchmarks.plan_memory` writes this file.",
            "",
            table(head, rows),
            "",
            "All rows of a policy end with one digest of the state."
            if len(digests) == len(policies)
            else f"DIFFERENT digests: {len(digests)} for {len(policies)} policies",
            "",
            "`state` is what rests between steps. The prediction, `Plan.dry_run`, leaves out activations, the copy of "
            "all parameters in the compute dtype where they are whole, and temporary buffers of the sums over ranks. "
            "They are most of the difference here: the model is small, and two ranks exchange whole buckets.",
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
