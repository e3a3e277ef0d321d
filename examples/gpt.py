"""Train a small GPT on the source code of Python's standard library, on one process or on many.

    python examples/gpt.py
    torchrun --nproc-per-node=4 examples/gpt.py --plan fsdp
    purestep run examples/gpt.py --processes 4 --plan fsdp

The loss and the digest at the end are the same either way: plans and processes change where the work is done, and
nothing else. Two plans have bits of their own: `none` sums the norm in another order, `tensor` cuts matrices in four.
"""

from __future__ import annotations

import argparse
import math
import sysconfig
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention

import purestep as ps
from purestep import sharding

CONTEXT = 64  # bytes that the model sees
WIDTH, HEADS, BLOCKS = 96, 4, 3
DROPOUT = 0.1
BATCH = 16
LEARNING_RATE = 3e-3
HELD_OUT = 0.05
SEED = 0
PLANS = ("none", "ddp", "zero1", "zero2", "fsdp", "hsdp", "tensor", "pipeline")


def read(megabytes: float) -> np.ndarray:
    """Return the first bytes of the standard library's modules, in the order of their paths: uint8[n]."""
    limit, parts, total = int(megabytes * 1e6), [], 0
    library = Path(sysconfig.get_path("stdlib"))
    for path in sorted(library.glob("*.py")) + sorted(library.glob("[a-z]*/*.py")):
        if "site-packages" in path.parts or "test" in path.parts:
            continue
        parts.append(np.frombuffer(path.read_bytes(), np.uint8))
        total += len(parts[-1])
        if total >= limit:
            break
    return np.concatenate(parts)[:limit]


def windows(text: np.ndarray) -> dict[str, np.ndarray]:
    """Cut a text into samples of CONTEXT bytes, and for each the byte that follows: int64[n, CONTEXT] both."""
    count = (len(text) - 1) // CONTEXT
    cut = text[: count * CONTEXT + 1].astype(np.int64)
    return {"x": cut[:-1].reshape(count, CONTEXT), "y": cut[1:].reshape(count, CONTEXT)}


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.query, self.key, self.value = (nn.Linear(WIDTH, WIDTH, bias=False) for _ in range(3))
        self.out = nn.Linear(WIDTH, WIDTH, bias=False)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)
        self.drop = nn.Dropout(DROPOUT)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.norm1(x)
        q, k, v = (layer(h).unflatten(-1, (HEADS, -1)).transpose(1, 2) for layer in (self.query, self.key, self.value))
        seen = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.drop(self.out(seen.transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(nn.functional.gelu(self.up(self.norm2(x)))))


class GPT(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(256, WIDTH), nn.Embedding(CONTEXT, WIDTH)
        self.drop = nn.Dropout(DROPOUT)
        self.blocks = nn.ModuleList(Block() for _ in range(BLOCKS))
        self.norm = nn.LayerNorm(WIDTH)
        self.head = nn.Linear(WIDTH, 256, bias=False)
        self.head.weight = self.token.weight  # tied
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.drop(self.token(x) + self.position(torch.arange(x.shape[1], device=x.device)))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def loss_fn(net: nn.Module, batch: dict[str, torch.Tensor]) -> torch.Tensor:
    return cross_entropy(net(batch["x"]).flatten(0, 1), batch["y"].flatten())


def make_plan(name: str) -> sharding.Plan | None:
    size = min(2, sharding.size())
    if name == "hsdp":
        return sharding.hsdp(fsdp=size)
    if name == "tensor":
        return sharding.ddp() * sharding.tensor_parallel("gpt", size, tensor_parts=4)
    if name == "pipeline":
        return sharding.ddp() * sharding.pipeline(sharding.even_stages(GPT, 2), size)
    plans = {"ddp": sharding.ddp, "zero1": sharding.zero1, "zero2": sharding.zero2, "fsdp": sharding.fsdp}
    return None if name == "none" else plans[name]()


@dataclass(frozen=True)
class Settings:
    """What one may change.

    Args:
        plan: which process holds and computes what.
        steps: batches until the end.
        microbatches: of a batch; fix it where the number of processes may change.
        precision: policy.
        jit: compile the step.
        megabytes: of source code to read.
        schedule_steps: of the learning rate's schedule; those of the run by default.
    """

    plan: Literal["none", "ddp", "zero1", "zero2", "fsdp", "hsdp", "tensor", "pipeline"] = "ddp"
    steps: int = 200
    microbatches: int = 4
    precision: str = "32"
    jit: bool = False
    megabytes: float = 1.0
    schedule_steps: int | None = None


@ps.experiment
def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    steps, text = settings.steps, read(settings.megabytes)
    cut = int(len(text) * (1 - HELD_OUT))
    data = ps.data.batches(windows(text[:cut]), BATCH, seed=SEED)
    held_out = ps.data.batches(windows(text[cut:]), 4 * BATCH, shuffle=False, drop_last=False).take(8)

    total = settings.schedule_steps or steps
    schedule = ps.optim.warmup_cosine_decay_schedule(0.0, LEARNING_RATE, warmup_steps=total // 10, decay_steps=total)
    tx = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(schedule, weight_decay=0.1))
    policy, placement = ps.precision.policy(settings.precision), make_plan(settings.plan)
    step = ps.make_step(loss_fn, tx, microbatches=settings.microbatches, policy=policy, plan=placement)
    state = policy.apply(ps.init(GPT, tx, seed=SEED))
    if placement is not None:
        state = placement.place(state)
    evaluate = ps.make_eval(loss_fn, policy=policy, plan=placement)
    callbacks = [
        ps.callbacks.log(every=ps.every.steps(min(20, steps))),
        ps.callbacks.evaluate(evaluate, held_out, every=ps.every.steps(max(total // 4, 1))),
        ps.callbacks.snapshots(every=ps.every.steps(max(total // 4, 1))),
    ]
    step = ps.jit(step) if settings.jit else step
    free = ["plan", "steps"]  # a resume may change where it runs and where it ends
    return ps.Experiment(step, state, data, until=ps.steps(steps), callbacks=callbacks, free_settings=free)


def train(plan: str = "ddp", *, run_dir: Path | None = None, **settings: Any) -> ps.Result:
    """Train for so many steps; a run directory with snapshots in it continues, whatever plan they were taken under."""
    gpt = experiment(Settings(plan=plan, **settings))
    if run_dir is None:
        gpt = replace(gpt, callbacks=gpt.callbacks[:-1])  # without snapshots
    return gpt.fit(run_dir=run_dir)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--plan", choices=PLANS, default="ddp")
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--microbatches", type=int, default=4, help="fix it where the number of processes may change")
    parser.add_argument("--precision", default="32", choices=[n for n in ps.precision.NAMES if n != "float8"])
    parser.add_argument("--run-dir", type=Path, default=None, help="for the log and snapshots; none by default")
    parser.add_argument("--megabytes", type=float, default=1.0, help="of source code to read")
    parser.add_argument("--jit", action="store_true")
    args = parser.parse_args()

    result = train(**vars(args))
    digest = ps.digest(result.state)  # of the whole state: every process takes part
    if sharding.rank() == 0:
        loss = result.metrics.get("val/loss", math.nan)
        report = {
            "why it ended": result.reason,
            "processes, plan": f"{sharding.size()}, {args.plan}",
            "training loss, last": f"{result.metrics['train/loss']:.4f}",
            "held-out loss, last": f"{loss:.4f} ({loss / math.log(2):.3f} bits a byte)",
            "time in training": f"{result.loop.elapsed:.1f} s",
            "digest of the last state": digest,
        }
        width = max(len(name) for name in report)
        print("\n".join(f"{name:<{width}}  {value}" for name, value in report.items()))
    return result.exit_code


if __name__ == "__main__":
    raise SystemExit(main())
