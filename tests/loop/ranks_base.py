"""Fine-tunes adapters beside a base in bf16, split over gloo processes; run by test_frozen_base.py in each of them.

`ranks_base.py RANK WORLD FOLDER UNTIL`: prints the digest of the state.
"""

from __future__ import annotations

import datetime
import sys
from pathlib import Path

import torch
import torch.distributed as dist
from torch import nn

import purestep as ps

RULE = ps.lora("[02]", rank=3, dropout=0.1, base=torch.bfloat16)
TX = ps.optim.adamw(1e-2)
WIDTH = 1100  # a weight of the base is split, and digested by one of the ranks that have it


def net() -> nn.Module:
    return nn.Sequential(nn.Linear(8, WIDTH), nn.Tanh(), nn.Linear(WIDTH, WIDTH), nn.Tanh(), nn.Linear(WIDTH, 3))


def loss_fn(model, batch):
    return (model(batch["x"]).float() - batch["y"]).square().mean()


def experiment(until: int, seed: int = 0, plan: ps.sharding.Plan | None = None) -> ps.Experiment:
    x = torch.randn(48, 8, generator=torch.Generator().manual_seed(1))
    data = ps.data.batches({"x": x, "y": x[:, :3].sin()}, 8, seed=3)
    saving = ps.callbacks.snapshots(every=ps.every.steps(2), keep=ps.snapshot.latest(2))
    state = ps.init(RULE(net), TX, seed=seed, plan=plan)
    step = ps.make_step(loss_fn, TX, microbatches=4, plan=plan)
    return ps.Experiment(step, state, data, until=ps.steps(until), callbacks=[saving])


def main() -> None:
    torch.set_num_threads(1)
    rank, world, root, until = int(sys.argv[1]), int(sys.argv[2]), Path(sys.argv[3]), int(sys.argv[4])
    store = f"file://{root / f'store-{until}'}"
    limit = datetime.timedelta(seconds=120)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world, timeout=limit)
    result = experiment(until, plan=RULE.plan(ps.sharding.fsdp(world, min_size=0))).fit(run_dir=root / "run")
    print(ps.digest(result.state))
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main()
