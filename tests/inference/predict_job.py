"""What each process of `test_predict.py` runs: evaluations and predictions on two ranks, whole and continued."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import torch
from torch import nn

import purestep as ps
from purestep.distributed import control


def make_model():
    return nn.Sequential(nn.Linear(5, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 3))


def both(net, batch):
    return {"logits": net(batch["x"])}


def main(directory: Path) -> None:
    torch.set_num_threads(1)
    rank = control.rank()
    state = ps.init(make_model, ps.optim.sgd(0.1), seed=0)
    x = torch.randn(37, 5, generator=torch.Generator().manual_seed(0))
    data = ps.data.batches({"x": x}, 4, shuffle=True, seed=3, drop_last=False)
    plans = {"ddp": ps.sharding.ddp(), "fsdp": ps.sharding.fsdp()}
    evaluations = [
        ps.evaluate(state, lambda net, batch: net(batch["x"]).square().mean(), data, plan=plan)
        for plan in plans.values()
    ]
    for name, plan in plans.items():
        ps.predict(plan.place(state), both, data, plan=plan, to=directory / name, batches_per_file=2)
    indices = [i for p in ps.predict(state, both, data, plan=plans["ddp"]) for i in p.indices.tolist()]

    # One rank has lost its last files: all go back to the round that every rank has.
    ps.predict(state, both, data, plan=plans["fsdp"], to=directory / "resumed", batches_per_file=2, format="npy")
    if rank == 1:
        path = directory / "resumed" / "rank-0001.json"
        note = json.loads(path.read_text())
        path.write_text(json.dumps({**note, "parts": note["parts"][:1], "batches": 2, "complete": False}))
    ps.predict(state, both, data, plan=plans["fsdp"], to=directory / "resumed", batches_per_file=2, format="npy")

    other = directory / f"only-{rank}"
    if rank == 0:
        other.mkdir()
        (other / "mine.txt").write_text("x")
    try:
        ps.predict(state, both, data, plan=plans["ddp"], to=directory / "only-0" if rank == 0 else other)
        refused = "no error"
    except Exception as error:
        refused = f"{type(error).__name__}: {error}"
    answer = {"rank": rank, "evaluations": [dict(e) for e in evaluations], "indices": indices, "refused": refused}
    (directory / f"{rank}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    main(Path(sys.argv[1]))
