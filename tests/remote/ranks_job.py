"""What each rank of `test_ranks.py` runs: a training with a remote copy. It writes the digest and the events it saw."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

import purestep as ps
from purestep.distributed import control

run_dir, url, until, answer = sys.argv[1:]


def loss_fn(net, batch):
    return net(batch["x"]).square().mean()


def main():
    tx = ps.optim.adamw(1e-2)
    plan = ps.sharding.fsdp(control.size(), min_size=0)
    generator = torch.Generator().manual_seed(0)
    data = ps.data.batches({"x": torch.randn(64, 600, generator=generator)}, 8, seed=1)
    state = ps.init(lambda: nn.Sequential(nn.Linear(600, 700), nn.Linear(700, 4)), tx, seed=1)
    step = ps.make_step(loss_fn, tx, plan=plan, microbatches=4)
    callbacks = [ps.callbacks.snapshots(every=ps.every.steps(3))]
    run = ps.run(step, state, data, until=ps.steps(int(until)), run_dir=run_dir, remote=url, callbacks=callbacks)
    events = [repr(event) for event in run if isinstance(event, (ps.loop.Resumed, ps.loop.Copied, ps.loop.CopyLost))]
    told = {"digest": ps.digest(run.result().state), "events": events}
    Path(f"{answer}-{control.rank()}.json").write_text(json.dumps(told))


if __name__ == "__main__":
    main()
