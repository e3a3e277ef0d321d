"""Steps a second under a plan against torch's DistributedDataParallel and fully_shard: ratios inside one run.

Two gloo processes of one thread each; the variants take turns, and each number is the median over the rounds of the
time of some steps. Run it where nothing else runs: `python benchmarks/sharding.py [--rounds 9] [--steps 8]`.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import statistics
import tempfile
import time
from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import fully_shard
from torch.nn.functional import cross_entropy, scaled_dot_product_attention
from torch.nn.parallel import DistributedDataParallel

import purestep as ps

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


def torch_step(model: Callable[[], nn.Module], wrap: str, batch: dict[str, Tensor]) -> Callable[[], None]:
    torch.manual_seed(0)
    net: nn.Module = model()
    if wrap == "ddp":
        net = DistributedDataParallel(net)
    else:
        for block in net.blocks:  # type: ignore[union-attr]
            fully_shard(block)
        fully_shard(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, foreach=True)
    own = {k: v.chunk(dist.get_world_size())[dist.get_rank()] for k, v in batch.items()}

    def run() -> None:
        loss_fn(net, own).backward()
        optimizer.step()
        optimizer.zero_grad()

    return run


def our_step(
    model: Callable[[], nn.Module], plan: ps.sharding.Plan, batch: dict[str, Tensor], compiled: bool = False
) -> Callable[[], None]:
    tx = ps.optim.adamw(1e-3)
    step = ps.make_step(loss_fn, tx, plan=plan)
    if compiled:
        step = ps.jit(step, donate=True)
    held = [plan.place(ps.init(model, tx, seed=0))]
    own = ps.sharding.local_batch(batch, plan, dist.get_world_size())

    def run() -> None:
        held[0], _ = step(held[0], own)

    return run


def variants(model: str, samples: int, compiled: bool) -> dict[str, Callable[[], None]]:
    make, batch = {"mlp": MLP, "gpt": GPT}[model], data(model, samples)
    sharding = ps.sharding
    found = {
        "torch ddp": torch_step(make, "ddp", batch),
        "ddp fast": our_step(make, sharding.ddp(reduction="fast"), batch),
        "ddp tree": our_step(make, sharding.ddp(), batch),
        "torch fully_shard": torch_step(make, "fsdp", batch),
        "fsdp fast": our_step(make, sharding.fsdp(reduction="fast"), batch),
        "fsdp tree": our_step(make, sharding.fsdp(), batch),
    }
    if compiled:
        found["ddp fast, jit"] = our_step(make, sharding.ddp(reduction="fast"), batch, compiled=True)
        found["ddp tree, jit"] = our_step(make, sharding.ddp(), batch, compiled=True)
        found["fsdp fast, jit"] = our_step(make, sharding.fsdp(reduction="fast"), batch, compiled=True)
        found["fsdp tree, jit"] = our_step(make, sharding.fsdp(), batch, compiled=True)
    return found


def measure(rank: int, options: argparse.Namespace, store: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo", init_method=f"file://{store}", rank=rank, world_size=options.ranks)
    for model in options.models.split(","):
        found = variants(model, options.samples, options.compiled)
        times: dict[str, list[float]] = {name: [] for name in found}
        for turn in range(options.rounds + 1):
            for name, run in found.items():
                dist.barrier()
                start = time.perf_counter()
                for _ in range(options.steps):
                    run()
                if turn:
                    times[name].append((time.perf_counter() - start) / options.steps)
        if rank == 0:
            show(model, times)
    dist.destroy_process_group()


def show(model: str, times: dict[str, list[float]]) -> None:
    print(f"{model:>20}  steps/s  best     / torch")
    for name, taken in times.items():
        against = times["torch ddp" if "ddp" in name else "torch fully_shard"]
        # Turns of one round see the same machine; the ratio is taken in each.
        ratio = statistics.median(a / b for a, b in zip(against, taken, strict=True))
        print(f"{name:>20}  {1 / statistics.median(taken):7.1f}  {1 / min(taken):7.1f}  {ratio:5.2f}", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ranks", type=int, default=2)
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--samples", type=int, default=16)
    parser.add_argument("--models", default="mlp,gpt")
    parser.add_argument("--compiled", action="store_true")
    options = parser.parse_args()
    context = multiprocessing.get_context("fork")
    with tempfile.TemporaryDirectory() as folder:
        store = os.path.join(folder, "store")
        workers = [context.Process(target=measure, args=(r, options, store)) for r in range(options.ranks)]
        for worker in workers:
            worker.start()
        for worker in workers:
            worker.join()


if __name__ == "__main__":
    main()
