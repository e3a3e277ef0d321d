"""Plans on several cards, each with a process: ddp and fsdp beside DistributedDataParallel and fully_shard.

`benchmarks.gpu` calls it where several cards are there, or for `--processes 2`; without cards the processes talk by
gloo, and nothing is compiled. The states of plans after the same steps must have the same bits, and every way of a step
is timed in turns.
"""

from __future__ import annotations

import contextlib
import json
import multiprocessing
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

import purestep as ps

Once = Callable[[], object]
Model = Callable[[], nn.Module]
LossFunction = Callable[[Any, Any], Any]


def transformation() -> Any:
    return ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(1e-3, weight_decay=0.1))


def by_hand(wrap: str, make: Model, loss: LossFunction, own: dict[str, Tensor], device: torch.device) -> Once:
    """Return what takes a step of torch's own kind: bf16 autocast, clipping, AdamW."""
    from torch.distributed.fsdp import fully_shard
    from torch.nn.parallel import DistributedDataParallel

    torch.manual_seed(0)
    net = make().to(device)
    if wrap == "fully_shard":
        for block in net.get_submodule("blocks").children():
            fully_shard(block)
        fully_shard(net)
    else:
        net = DistributedDataParallel(net)
    optimizer = torch.optim.AdamW(net.parameters(), lr=1e-3, weight_decay=0.1, foreach=True)

    def once() -> None:
        optimizer.zero_grad()
        with torch.autocast(device.type, torch.bfloat16):
            found = loss(net, own)
        found.backward()
        torch.nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()

    return once


def ours(
    plan: ps.sharding.Plan, compiled: bool, make: Model, loss: LossFunction, own: Any, device: torch.device
) -> tuple[Once, Callable[[], str]]:
    """Return what takes a step under a plan, donated, and what gives the digest of the state."""
    policy = ps.precision.policy("bf16-mixed")
    step = ps.make_step(loss, transformation(), policy=policy, plan=plan)
    held = [policy.apply(ps.init(make, transformation(), seed=0, plan=plan, device=device))]
    called = ps.jit(step, donate=True) if compiled else ps.donate(step)

    def once() -> None:
        held[0] = called(held[0], own)[0]

    return once, lambda: ps.digest(held[0])


PLANS: dict[str, tuple[str, str]] = {
    f"{kind} {reduction}": (kind, reduction) for kind in ("ddp", "fsdp") for reduction in ("tree", "fast")
}


def compared(make: Model, loss: LossFunction, batch: Any, device: torch.device, quick: bool) -> dict[str, Any]:
    """Return what this rank found; all call it."""
    plans = {name: getattr(ps.sharding, kind)(reduction=reduction) for name, (kind, reduction) in PLANS.items()}
    own = ps.sharding.local_batch(batch, plans["ddp tree"], dist.get_world_size())
    theirs = {name: x.chunk(dist.get_world_size())[dist.get_rank()] for name, x in batch.items()}
    runs: dict[str, Once] = {}
    digests: dict[str, Callable[[], str]] = {}
    failed: dict[str, str] = {}
    makers: dict[str, Callable[[], Once]] = {
        "torch ddp": lambda: by_hand("ddp", make, loss, theirs, device),
        "torch fully_shard": lambda: by_hand("fully_shard", make, loss, theirs, device),
    }

    def one(name: str, compiled: bool) -> Once:
        once, digest = ours(plans[name], compiled, make, loss, own, device)
        if not compiled:
            digests[name] = digest
        return once

    for name in PLANS:
        makers[f"purestep {name}"] = lambda name=name: one(name, False)
        if device.type == "cuda":
            makers[f"purestep {name}, jit"] = lambda name=name: one(name, True)
    for name, maker in makers.items():
        try:
            runs[name] = maker()
            for _ in range(2):  # compiles, and learns in which order things come
                runs[name]()
        except Exception as error:
            runs.pop(name, None)
            failed[name] = f"{type(error).__name__}: {error}"[:200]
    bits = {name: digest() for name, digest in digests.items()}
    same = bits.get("ddp tree") == bits.get("fsdp tree") is not None
    times = timed(runs, device, 3 if quick else 5, 10 if device.type == "cuda" else 2)
    return {"ok": same and not failed, "same bits": same, "ms": times, **({"failed": failed} if failed else {})}


def timed(runs: dict[str, Once], device: torch.device, rounds: int, steps: int) -> dict[str, float]:
    """Return the milliseconds of a step of each, the median of rounds in turns."""
    found: dict[str, list[float]] = {name: [] for name in runs}
    wait: Callable[[], object] = torch.cuda.synchronize if device.type == "cuda" else lambda: None
    for _ in range(rounds):
        for name, once in runs.items():
            wait()
            dist.barrier()
            start = time.perf_counter()
            for _ in range(steps):
                once()
            wait()
            found[name].append((time.perf_counter() - start) / steps * 1e3)
    return {name: round(statistics.median(values), 3) for name, values in found.items()}


def rank(number: int, count: int, kind: str, root: str, quick: bool) -> None:
    """Be one process of a job."""
    from benchmarks import gpu

    device = torch.device(kind, number) if kind == "cuda" else torch.device(kind)
    if kind == "cuda":
        torch.cuda.set_device(device)
    else:
        torch.set_num_threads(1)
    where = f"file://{root}/ranks"
    dist.init_process_group("nccl" if kind == "cuda" else "gloo", init_method=where, rank=number, world_size=count)
    card = gpu.Card(device, quick, Path(root))
    try:
        found = compared(card.gpt, gpu.next_word, card.words(2 * count), device, quick)
        if number == 0:
            Path(root, "ranks.json").write_text(json.dumps(found))
    finally:
        with contextlib.suppress(RuntimeError):
            dist.destroy_process_group()


def on_processes(kind: str, count: int, root: Path, quick: bool, seconds: float = 360.0) -> dict[str, Any]:
    """Start processes, one a card, and return what the first of them found."""
    context = multiprocessing.get_context("spawn")
    ranks = [context.Process(target=rank, args=(i, count, kind, str(root), quick)) for i in range(count)]
    for process in ranks:
        process.start()
    end = time.monotonic() + seconds
    for process in ranks:
        process.join(max(0.0, end - time.monotonic()))
    late = [process for process in ranks if process.is_alive()]
    for process in late:
        process.kill()
    codes = [process.exitcode for process in ranks]
    if late or any(codes):
        raise RuntimeError(f"of {count} processes {len(late)} did not end in {seconds:.0f} s; they ended with {codes}")
    found: dict[str, Any] = json.loads((root / "ranks.json").read_text())
    return {"processes": count, **found}
