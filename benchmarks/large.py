"""A step of a 70 B model on 1,024 ranks that are pretended: `python -m benchmarks.large`.

Writes `results/large.md`. Rank 0 runs a step of AdamW of a model with the shapes of Llama 2 70B, in mixed precision
with activation checkpoints, on fake tensors and a fake process group: nothing is computed or sent. Counted are
operators that compute (launches, were it a card), collectives, the bytes that leave the rank, and the memory that its
tensors take; beside that stands what `plan.dry_run` predicts. The batch has one sequence for each rank that computes a
microbatch of its own. Models of 4 and 6 layers are measured, from which follow the numbers of 80, since all layers are
the same; `--plan "fsdp()"` measures all 80 of one plan, and gave the very numbers of its row.
"""

from __future__ import annotations

import argparse
import dataclasses
import gc
import sys
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

import purestep as ps
from benchmarks import fake_ranks, machine
from benchmarks.report import table

FILE = Path(__file__).parent / "results" / "large.md"
RANKS, GROUP = 1024, 8  # a machine has 8 cards
FEW = 4, 6  # layers that are measured


@dataclasses.dataclass(frozen=True)
class Shape:
    """Sizes of a model; those of Llama 2 70B by default (Touvron et al., arXiv 2307.09288)."""

    words: int = 32_000
    width: int = 8192
    hidden: int = 28_672
    layers: int = 80
    heads: int = 64
    pairs: int = 8  # of keys and values
    length: int = 4096


class Norm(nn.Module):
    """Root mean square layer norm."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(width))

    def forward(self, x: Tensor) -> Tensor:
        return nn.functional.rms_norm(x, x.shape[-1:], self.weight, 1e-5)


def _linear(inputs: int, outputs: int) -> nn.Linear:
    return nn.Linear(inputs, outputs, bias=False)


class Attention(nn.Module):
    """Causal attention with rotary positions and fewer keys than queries."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.size = shape.width // shape.heads
        self.q_proj = _linear(shape.width, shape.width)
        self.k_proj = _linear(shape.width, shape.pairs * self.size)
        self.v_proj = _linear(shape.width, shape.pairs * self.size)
        self.o_proj = _linear(shape.width, shape.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        q, k, v = (f(x).unflatten(-1, (-1, self.size)).transpose(1, 2) for f in (self.q_proj, self.k_proj, self.v_proj))
        q, k = _turned(q, cos, sin), _turned(k, cos, sin)
        out = scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
        return self.o_proj(out.transpose(1, 2).flatten(2))


def _turned(x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
    first, second = x.chunk(2, -1)
    return x * cos + torch.cat([-second, first], -1) * sin


class Layer(nn.Module):
    """A block of Llama."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.input_norm, self.post_norm = Norm(shape.width), Norm(shape.width)
        self.self_attn = Attention(shape)
        self.gate_proj, self.up_proj = _linear(shape.width, shape.hidden), _linear(shape.width, shape.hidden)
        self.down_proj = _linear(shape.hidden, shape.width)

    def forward(self, x: Tensor, cos: Tensor, sin: Tensor) -> Tensor:
        x = x + self.self_attn(self.input_norm(x), cos, sin)
        y = self.post_norm(x)
        return x + self.down_proj(silu(self.gate_proj(y)) * self.up_proj(y))


class Llama(nn.Module):
    """A language model with the layers of Llama 2."""

    def __init__(self, shape: Shape) -> None:
        super().__init__()
        self.shape = shape
        self.embed_tokens = nn.Embedding(shape.words, shape.width)
        self.layers = nn.ModuleList([Layer(shape) for _ in range(shape.layers)])
        self.norm, self.lm_head = Norm(shape.width), _linear(shape.width, shape.words)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed_tokens(tokens)
        half = self.shape.width // self.shape.heads // 2
        angles = torch.outer(torch.arange(tokens.shape[1]), 10_000.0 ** (-torch.arange(half) / half)).repeat(1, 2)
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        for layer in self.layers:
            x = layer(x, cos, sin)
        return self.lm_head(self.norm(x))


def loss_fn(net: Any, tokens: Tensor) -> Tensor:
    """Return the mean cross entropy of the next token."""
    logits = net(tokens[:, :-1])
    return cross_entropy(logits.flatten(0, 1).float(), tokens[:, 1:].flatten())


def plans() -> dict[str, Any]:
    """Return the plans of the table by name; a row is added here."""
    sharding = ps.sharding
    return {
        "ddp()": sharding.ddp(),
        "zero1()": sharding.zero1(),
        "zero2()": sharding.zero2(),
        "fsdp()": sharding.fsdp(),
        'fsdp(reduction="fast")': sharding.fsdp(reduction="fast"),
        f"hsdp(fsdp={GROUP})": sharding.hsdp(fsdp=GROUP),
        f"hsdp(fsdp={8 * GROUP})": sharding.hsdp(fsdp=8 * GROUP),
        f'fsdp() * tensor_parallel("llama", {GROUP})': sharding.fsdp() * sharding.tensor_parallel("llama", size=GROUP),
    }


@dataclasses.dataclass(frozen=True)
class Row:
    """What a step under a plan asks of rank 0: counts, bytes, and seconds of this process."""

    plan: str
    launches: int
    collectives: int
    sent: int
    predicted_sent: int
    rest: int
    peak: int
    predicted: int
    seconds: float


def measure(name: str, plan: Any, shape: Shape, ranks: int) -> Row:
    """Run the second step under a plan; the first one agrees on an order."""
    with fake_ranks.job(ranks):
        tx, policy = ps.optim.adamw(1e-4), ps.precision.policy("bf16-mixed")
        count = plan.replicas
        with torch.device("meta"):
            whole = policy.apply(ps.init(lambda: Llama(shape), tx))
        run = plan.dry_run(whole, microbatches=count, compute_dtype=policy.copied, reduce_dtype=policy.reduce)
        split = plan.place(whole)
        step = ps.make_step(loss_fn, tx, plan=plan, microbatches=count, policy=policy, checkpoint="layers.*")
        step = ps.donate(step)
        with fake_ranks.fake_tensors():
            fake_ranks.agreed(plan, count)
            state = fake_ranks.faked(split)
            rows = torch.zeros(1, shape.length + 1, dtype=torch.int64)
            batch = ps.sharding.LocalBatch(rows, samples=count, microbatches=count)
            state, _ = step(state, batch)
            gc.collect()
            with fake_ranks.watching(state, batch) as asked:
                rest, began = asked.live, time.process_time()
                state, _ = step(state, batch)
                seconds = time.process_time() - began
    return Row(
        name,
        asked.launches.total(),
        asked.collectives.total(),
        asked.sent.total(),
        sum(run.sent.values()),
        rest,
        asked.peak,
        run.nbytes,
        seconds,
    )


def extended(few: Row, more: Row, layers: tuple[int, int], to: int) -> Row:
    """Return the row of more layers: all layers are the same, so every quantity is affine in their number."""
    times = (to - layers[0]) / (layers[1] - layers[0])
    numbers = {
        field.name: type(getattr(few, field.name))(
            getattr(few, field.name) + times * (getattr(more, field.name) - getattr(few, field.name))
        )
        for field in dataclasses.fields(Row)
        if field.name != "plan"
    }
    return Row(few.plan, **numbers)


def main() -> int:
    """Measure every plan, and write the table; or print one with all layers."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--ranks", type=int, default=RANKS)
    parser.add_argument("--plan", help="measure this one with all layers, and write nothing")
    given = parser.parse_args()
    found = []
    for name, plan in plans().items():
        if given.plan == name:
            print(measure(name, plan, Shape(), given.ranks))
        if given.plan is None:
            few, more = (measure(name, plan, Shape(layers=layers), given.ranks) for layers in FEW)
            found.append(extended(few, more, FEW, Shape.layers))
            print(found[-1], file=sys.stderr, flush=True)
    if given.plan is None and given.ranks == RANKS:
        FILE.write_text(report(found, given.ranks))
    return 0


def report(rows: list[Row], ranks: int) -> str:
    """Return the table in Markdown."""
    about = machine.describe()
    head = (
        "plan, launches, collectives, GB sent, predicted, GB at rest, GB at the peak before the update, "
        "predicted without activations"
    )
    cells = [
        [
            f"`{r.plan}`",
            f"{r.launches:,}",
            f"{r.collectives:,}",
            *(f"{n / 1e9:,.1f}" for n in (r.sent, r.predicted_sent, r.rest, r.peak, r.predicted)),
        ]
        for r in rows
    ]
    where = f"{about['cpu']}, torch {torch.__version__}"
    about_rows = (__doc__ or "").strip().partition("\n\n")[2]
    seconds = ", ".join(f"{r.seconds:.0f}" for r in rows)
    return (
        f"# A step of a 70 B model on {ranks:,} ranks\n\n{where}.\n{about_rows}\n\n{table(head.split(', '), cells)}\n\n"
        f"{Shape()}. CPU seconds of such a step here, on fake tensors: {seconds}.\n"
    )


if __name__ == "__main__":
    sys.exit(main())
