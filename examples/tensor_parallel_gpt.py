"""Split the matrices of a transformer over processes that compute each microbatch together.

    python examples/tensor_parallel_gpt.py                       # starts 2 processes, then trains on 1, and compares
    torchrun --nproc-per-node=2 examples/tensor_parallel_gpt.py  # only the first of these
    torchrun --nproc-per-node=8 examples/tensor_parallel_gpt.py --tensor 4 --width 4096 --layers 32 --heads 32
    purestep run examples/tensor_parallel_gpt.py --processes 2

The rules are those of the family "gpt": of the two matrices around each nonlinearity the first is split by its outputs
and the second by its inputs, so the processes exchange one sum after each pair (Megatron-LM: Shoeybi et al., arXiv
1909.08053); embedding and output layer are split by the vocabulary. Matrices are cut into `--parts`, whoever computes
them, so the digest at the end is the same on 1 process. With more processes than `--tensor`, groups of them shard what
is left (`fsdp() * tensor_parallel(...)`).
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from dataclasses import dataclass, fields, replace
from pathlib import Path

import torch
from torch.distributed.tensor import DTensor
from transformer import Size, Transformer, batches, loss_fn, optimizer

import purestep as ps


@dataclass(frozen=True)
class Settings:
    """The settings of the experiment.

    Args:
        tensor: processes that compute a microbatch together.
        parts: into how many parts matrices are cut; a divisor of `heads`, and a power of two times `tensor`.
        width: of the hidden states.
        layers: blocks.
        heads: of the attention.
        context: bytes that the model sees.
        batch: samples of all processes together.
        microbatches: of a batch; a multiple of the groups of `tensor` processes.
        lr: peak of the learning rate.
        steps: until the end.
        megabytes: of source code to read.
    """

    tensor: int = 2
    parts: int = 2
    width: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 64
    batch: int = 16
    microbatches: int = 2
    lr: float = 5e-3
    steps: int = 40
    megabytes: float = 0.5


@ps.experiment
def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    s = settings
    train, held_out = batches(s.context, s.batch, s.megabytes)
    plan = ps.sharding.fsdp() * ps.sharding.tensor_parallel("gpt", size=s.tensor, tensor_parts=s.parts)
    tx = optimizer(s.lr, s.steps)
    size = Size(s.width, s.layers, s.heads, s.context)
    # No process ever holds more than one full tensor, and the first values do not depend on the plan.
    state = ps.init(lambda: Transformer(size), tx, plan=plan, deferred=True)
    evaluation = ps.make_eval(loss_fn, plan=plan)
    callbacks = [
        ps.callbacks.log(every=ps.every.steps(1)),
        ps.callbacks.evaluate(evaluation, held_out, every=ps.every.steps(s.steps)),
    ]
    step = ps.make_step(loss_fn, tx, microbatches=s.microbatches, plan=plan)
    return ps.Experiment(step, state, train, until=ps.steps(s.steps), callbacks=callbacks, free_settings=["tensor"])


def share(state: ps.TrainState) -> tuple[int, int]:
    """Return how many numbers this process holds of the parameters, and how many there are."""
    tensors = state.params.values()
    local = [p.to_local() if isinstance(p, DTensor) else p for p in tensors]
    return sum(p.numel() for p in local), sum(p.numel() for p in tensors)


def train(settings: Settings, run_dir: Path) -> dict[str, object]:
    """Train in this process of the job, and return the held-out loss and the digest of the last state."""
    result = experiment(settings).fit(run_dir=run_dir)
    held, all_ = share(result.state)
    found = {"loss": result.metrics["val/loss"], "digest": ps.digest(result.state)}  # every process takes part
    if ps.sharding.rank() == 0:
        processes = f"{ps.sharding.size()} process{'es' if ps.sharding.size() > 1 else ''}"
        print(f"{processes}: held-out loss {found['loss']:.6f}, digest {found['digest']}")
        print(f"each has {held:,} of {all_:,} parameters")
    return found


def compare(settings: Settings, words: list[str]) -> int:
    """Train on several processes and then in this one, and print whether the digests are the same."""
    with tempfile.TemporaryDirectory() as directory:
        found = Path(directory, "found.json")
        command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
        command += [f"--nproc-per-node={settings.tensor}", __file__, *words, "--found", str(found)]
        code = subprocess.run(command, env={"OMP_NUM_THREADS": "1", **os.environ}, check=False).returncode
        if code:
            return code
        together = json.loads(found.read_text())
        alone = train(replace(settings, tensor=1), Path(directory, "alone"))
        # One process reads what several have written, by the rules of its own plan.
        state = experiment(replace(settings, tensor=1)).state
        restored = ps.restore(found.with_suffix(".run"), like=state)
    print(f"digest of their snapshot, read by 1 process  {ps.digest(restored)}")
    same = together["digest"] == alone["digest"] == ps.digest(restored)
    print("the same bits" if same else "other bits")
    return 0 if same else 1


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        parser.add_argument(f"--{field.name}", type=type(field.default), default=field.default)
    parser.add_argument("--found", type=Path, help=argparse.SUPPRESS)
    args = vars(parser.parse_args())
    report = args.pop("found")
    settings = Settings(**args)
    if "RANK" not in os.environ:
        return compare(settings, sys.argv[1:])
    found = train(settings, report.with_suffix(".run") if report else Path("runs/tensor_parallel_gpt"))
    if report and ps.sharding.rank() == 0:
        report.write_text(json.dumps(found))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
