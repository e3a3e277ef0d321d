"""Steps under a plan beside torch's DistributedDataParallel and fully_shard: two gloo processes, in turns.

Each has one thread. Two processes on two cores: whatever else runs on the machine holds up both.
"""

from __future__ import annotations

import json
import multiprocessing
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import purestep as ps
from benchmarks.training import Say, spread

RANKS, SAMPLES = 2, 16
WORDS, WIDTH, HEADS, LENGTH = 256, 128, 4, 32


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self) -> None:
        super().__init__()
        self.before, self.after = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.qkv, self.out = nn.Linear(WIDTH, 3 * WIDTH), nn.Linear(WIDTH, WIDTH)
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = self.qkv(self.before(x)).unflatten(-1, (3, HEADS, -1)).permute(2, 0, 3, 1, 4)
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        return x + self.down(nn.functional.gelu(self.up(self.after(x))))


class GPT(nn.Module):
    """A small language model."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(WORDS, WIDTH)
        self.blocks = nn.ModuleList([Block() for _ in range(4)])
        self.head = nn.Linear(WIDTH, WORDS)

    def forward(self, x: Tensor) -> Tensor:
        x = self.embed(x)
        for block in self.blocks:
            x = block(x)
        return self.head(x).flatten(0, 1)


class MLP(nn.Module):
    """Four linear layers."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(64, 384), *[nn.Linear(384, 384) for _ in range(3)]])
        self.head = nn.Linear(384, 10)

    def forward(self, x: Tensor) -> Tensor:
        for block in self.blocks:
            x = block(x).relu()
        return self.head(x)


def data(model: str, samples: int) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    if model == "mlp":
        return {"x": torch.randn(samples, 64, generator=g), "y": torch.randint(0, 10, (samples,), generator=g)}
    words = torch.randint(0, WORDS, (samples, LENGTH + 1), generator=g)
    return {"x": words[:, :-1], "y": words[:, 1:].contiguous()}


def loss_fn(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return cross_entropy(net(batch["x"]), batch["y"].flatten())


def torch_step(wrap: str, model: Callable[[], nn.Module], batch: dict[str, Tensor]) -> Callable[[], None]:
    """Return what takes one step of torch's own kind."""
    torch.manual_seed(0)
    net: nn.Module = model()
    if wrap == "fully_shard":
        for block in net.blocks:  # type: ignore[union-attr]
            fully_shard(block)
        fully_shard(net)
    else:
        net = DistributedDataParallel(net)
    if wrap == "ddp, compiled":
        net = torch.compile(net)  # type: ignore[assignment]
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, foreach=True)
    own = {k: v.chunk(dist.get_world_size())[dist.get_rank()] for k, v in batch.items()}

    def run() -> None:
        loss_fn(net, own).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def our_step(
    plan: ps.sharding.Plan, compiled: bool, model: Callable[[], nn.Module], batch: dict[str, Tensor]
) -> Callable[[], None]:
    """Return what takes one step under a plan. Like torch's it updates in place."""
    tx = ps.optim.adamw(1e-3)
    step: Any = ps.make_step(loss_fn, tx, plan=plan)
    step = ps.jit(step, donate=True) if compiled else ps.donate(step)
    held = [plan.place(ps.init(model, tx, seed=0))]
    own = ps.sharding.local_batch(batch, plan, dist.get_world_size())

    def run() -> None:
        held[0], _ = step(held[0], own)

    return run


def _ours(kind: str, reduction: str, compiled: bool) -> Callable[..., Callable[[], None]]:
    def make(model: Callable[[], nn.Module], batch: dict[str, Tensor]) -> Callable[[], None]:
        return our_step(getattr(ps.sharding, kind)(reduction=reduction), compiled, model, batch)

    return make


def _theirs(wrap: str) -> Callable[..., Callable[[], None]]:
    return lambda model, batch: torch_step(wrap, model, batch)


# What is compared with which, by name.
VARIANTS: dict[str, Callable[..., Callable[[], None]]] = {
    "torch ddp": _theirs("ddp"),
    "torch ddp, compiled": _theirs("ddp, compiled"),
    "torch fully_shard": _theirs("fully_shard"),
} | {
    f"{kind} {reduction}{', jit' if compiled else ''}": _ours(kind, reduction, compiled)
    for kind in ("ddp", "fsdp")
    for reduction in ("fast", "tree")
    for compiled in (False, True)
}
MODELS = {"mlp": MLP, "gpt": GPT}


def run(settings: Any, say: Say) -> dict[str, Any]:
    """Return `{model: {"seconds": {variant: seconds of a step by round}, "failed": {variant: why}}}`."""
    results = {}
    for model, variants in settings.sharding.items():
        context = multiprocessing.get_context("spawn")
        with tempfile.TemporaryDirectory(prefix="purestep-bench-") as folder:
            arguments = model, variants, folder, settings.sharding_rounds, settings.sharding_steps
            ranks = [context.Process(target=_rank, args=(number, *arguments)) for number in range(RANKS)]
            for process in ranks:
                process.start()
            for process in ranks:
                process.join()
            results[model] = json.loads(Path(folder, "found.json").read_text())
        shown = [f"{n} {spread(times)[0] * 1e3:.1f} ms" for n, times in results[model]["seconds"].items()]
        say(f"{model} on {RANKS} processes: {', '.join(shown)}")
    return results


def _rank(number: int, model: str, variants: Sequence[str], folder: str, rounds: int, steps: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{folder}/store", rank=number, world_size=RANKS)
    batch, failed = data(model, SAMPLES), {}
    made: dict[str, Callable[[], None]] = {}
    for name in variants:
        try:
            made[name] = VARIANTS[name](MODELS[model], batch)
            made[name]()  # compiles, and learns in which order things come
        except Exception as error:
            failed[name] = f"{type(error).__name__}: {error}"
            made.pop(name, None)
    seconds: dict[str, list[float]] = {name: [] for name in made}
    for turn in range(rounds + 1):
        names = list(made)
        for name in names[turn % len(names) :] + names[: turn % len(names)]:
            dist.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                made[name]()
            if turn:
                seconds[name].append((time.perf_counter() - start) / steps)
    if number == 0:
        Path(folder, "found.json").write_text(json.dumps({"seconds": seconds, "failed": failed}))
    dist.barrier()
    dist.destroy_process_group()


def ratio(results: Any, model: str, ours: str, theirs: str) -> tuple[float, float, float]:
    """Return the time of a step over that of another, median and quartiles of the rounds."""
    seconds = results[model]["seconds"]
    return spread([a / b for a, b in zip(seconds[ours], seconds[theirs], strict=True)])
