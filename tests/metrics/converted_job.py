"""What each process of `test_converted.py` runs: a training with many metrics, stopped in an epoch and resumed."""

from __future__ import annotations

import json
import sys
import warnings
from pathlib import Path

import torch

import purestep as ps
from purestep.distributed import control
from purestep.testing import comparable


def main(directory: Path, mode: str) -> None:
    import theirs

    directory.mkdir(exist_ok=True)
    names = list(theirs.ALL)
    plan = ps.sharding.fsdp() if mode == "fsdp" else ps.sharding.ddp()
    functions = {n: ps.metrics.from_torchmetrics(theirs.ALL[n][0](), pick=theirs.PICK.get(n)) for n in names}

    def loss_fn(net, batch):
        values = {n: f(*theirs.arguments(batch, theirs.ALL[n][1])) for n, f in functions.items()}
        return (net(batch["logits"]) - batch["p"]).square().mean(), values

    tx = ps.optim.sgd(0.1)
    step = ps.make_step(loss_fn, tx, microbatches=4, plan=plan)
    train, val = theirs.table(50, 0), theirs.table(23, 1)
    # 13 samples in 4 microbatches are uneven, and the last batch has fewer.
    job = {
        "step": step,
        "train": ps.data.batches(train, 13, seed=1, drop_last=False),
        "callbacks": [
            ps.callbacks.evaluate(loss_fn, ps.data.batches(val, 4, shuffle=False, drop_last=False)),
            ps.callbacks.log(every=ps.every.steps(3)),
            ps.callbacks.snapshots(every=ps.every.steps(1)),
        ],
        "run_dir": directory / "run",
        "loggers": [],
    }
    stopped = ps.fit(state=plan.place(ps.init(lambda: torch.nn.Linear(4, 4), tx, seed=0)), until=ps.steps(2), **job)
    result = ps.fit(state=plan.place(ps.init(lambda: torch.nn.Linear(4, 4), tx, seed=1)), until=ps.epochs(1), **job)
    answer = {
        "stopped": stopped.reason,
        "row": dict(result.metrics),
        "digest": ps.digest(comparable(result.loop.replace(train=plan.gather(result.loop.train)))),
    }
    (directory / f"{mode}-{control.size()}-{control.rank()}.json").write_text(json.dumps(answer))


if __name__ == "__main__":
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.path.insert(0, str(Path(__file__).parent))
    main(Path(sys.argv[1]), sys.argv[2])
