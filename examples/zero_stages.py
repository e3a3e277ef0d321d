"""The stages of ZeRO as plans: what a process holds and sends, and that all of them compute the same bits.

    python examples/zero_stages.py                        # a table, then a small training in 2 processes for each stage
    python examples/zero_stages.py --width 8192 --layers 80 --ranks 1024
    purestep run examples/zero_stages.py --processes 2 --stage 3

ZeRO (Rajbhandari et al., arXiv 1910.02054) shards the optimizer state, the gradients and the parameters of a data
parallel training. Here a stage is a value that a step takes, `plan=`; the model, the loss and the optimizer do not know
of it. The first table is arithmetic for a cluster that need not be there: a model on the meta device, and its plan on
so many processes.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from transformer import Size, Transformer, batches, loss_fn, optimizer

import purestep as ps


def hsdp() -> ps.sharding.Plan:
    return ps.sharding.hsdp(fsdp=min(2, ps.sharding.size()))


# 0: all replicated. 1: optimizer state split. 2: gradients too. 3: parameters too, gathered layer by layer.
# hybrid: stage 3 inside of a machine, replicated over machines.
STAGES: dict[str, Callable[[], ps.sharding.Plan]] = {
    "0": ps.sharding.ddp,
    "1": ps.sharding.zero1,
    "2": ps.sharding.zero2,
    "3": ps.sharding.fsdp,
    "hybrid": hsdp,
}


@dataclass(frozen=True)
class Settings:
    """The settings of the experiment.

    Args:
        stage: of ZeRO.
        width: of the hidden states.
        layers: blocks.
        heads: of the attention.
        batch: samples of all processes together.
        microbatches: of a batch; a multiple of the number of processes.
        steps: until the end.
        megabytes: of source code to read.
    """

    stage: Literal["0", "1", "2", "3", "hybrid"] = "3"
    width: int = 64
    layers: int = 2
    heads: int = 4
    batch: int = 16
    microbatches: int = 4
    steps: int = 20
    megabytes: float = 0.2


@ps.experiment
def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    s = settings
    size = Size(s.width, s.layers, s.heads)
    train, _ = batches(size.context, s.batch, s.megabytes)
    plan, tx = STAGES[s.stage](), optimizer(5e-3, s.steps)
    state = ps.init(lambda: Transformer(size), tx, plan=plan, deferred=True)
    step = ps.make_step(loss_fn, tx, microbatches=s.microbatches, plan=plan)
    return ps.Experiment(step, state, train, until=ps.steps(s.steps), free_settings=["stage"])


def costs(width: int, layers: int, ranks: int) -> None:
    """Print what a process would hold and send in a step, with AdamW, float32 state and bfloat16 compute."""
    with torch.device("meta"):
        model = Transformer(Size(width, layers, width // 128, 4096))
    state = ps.init(model, ps.optim.adamw(1e-4))
    count = sum(p.numel() for p in state.params.values())
    print(f"{count / 1e9:.1f} billion parameters on {ranks} processes: GB of a process, without activations\n")
    kinds = ("params", "optimizer", "grads", "gathered")
    print("stage   " + "".join(f"{kind:>11}" for kind in (*kinds, "all", "sent")))
    for stage, make in STAGES.items():
        sizes = {"data": ranks // 8, "fsdp": 8} if stage == "hybrid" else {"fsdp" if stage == "3" else "data": ranks}
        run = make().dry_run(state, sizes, compute_dtype=torch.bfloat16)
        row = [run.memory.get(kind, 0) for kind in kinds] + [run.nbytes, sum(run.sent.values())]
        print(f"{stage:<8}" + "".join(f"{nbytes / 1e9:>11.2f}" for nbytes in row))


def train(settings: Settings, processes: int) -> dict[str, str]:
    """Train every stage in a job of so many processes, and return the digests."""
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory, "digests.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}"]
        command += [__file__, "--digests", str(found), "--steps", str(settings.steps)]
        environment = {"OMP_NUM_THREADS": "1", **os.environ}
        subprocess.run(command, env=environment, check=True)
        digests: dict[str, str] = json.loads(found.read_text())
        return digests


def work(steps: int, found: Path) -> None:
    """What each process of a job does: train every stage in turn."""
    digests = {}
    for stage in STAGES:
        digests[stage] = ps.digest(experiment(Settings(stage=stage, steps=steps)).fit().state)
    if ps.sharding.rank() == 0:
        found.write_text(json.dumps(digests))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=4096, help="of the model of the table")
    parser.add_argument("--layers", type=int, default=32, help="of the model of the table")
    parser.add_argument("--ranks", type=int, default=64, help="processes of the table, a multiple of 8")
    parser.add_argument("--steps", type=int, default=Settings.steps, help="of the small training")
    parser.add_argument("--processes", type=int, default=2, help="of the small training: 1, 2 or 4")
    parser.add_argument("--digests", type=Path, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.digests:
        work(args.steps, args.digests)
        return 0
    costs(args.width, args.layers, args.ranks)
    print(f"\n{args.steps} steps of a small model on {args.processes} processes\n\nstage   digest of the state")
    digests = train(Settings(steps=args.steps), args.processes)
    for stage, digest in digests.items():
        print(f"{stage:<8}{digest}")
    same = len(set(digests.values())) == 1
    print(f"\n{'the same bits' if same else 'DIFFERENT'}")
    return 0 if same else 1


if __name__ == "__main__":
    raise SystemExit(main())
