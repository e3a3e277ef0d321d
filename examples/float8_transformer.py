"""Train a transformer whose linear layers multiply in float8, under a plan, compiled.

    python examples/float8_transformer.py
    torchrun --nproc-per-node=8 examples/float8_transformer.py --width 1024 --layers 16 --heads 32 --context 512
    purestep run examples/float8_transformer.py --precision bf16-mixed

Precision, plan and compilation are three arguments: a policy by name with a rule for the last layer, a plan by which
each process makes and holds its shards only, and `ps.jit`. The script trains the same model in bfloat16, too, and
prints both losses. CPUs emulate both: on them float8 saves no time.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass, fields, replace
from typing import Literal

import torch
from transformer import Size, Transformer, batches, loss_fn, optimizer

import purestep as ps


@dataclass(frozen=True)
class Settings:
    """The settings of the experiment.

    Args:
        precision: of the linear layers; the last one is left in bfloat16.
        plan: fsdp shards parameters, gradients and optimizer state over all processes, ddp replicates them.
        jit: compile gradients and update.
        width: of the hidden states; a multiple of 16, as GPUs want it.
        layers: blocks.
        heads: of the attention.
        context: bytes that the model sees.
        batch: samples of all processes together.
        microbatches: of a batch; fix it where the number of processes may change.
        lr: peak of the learning rate.
        steps: until the end.
        megabytes: of source code to read.
    """

    precision: Literal["float8", "bf16-mixed"] = "float8"
    plan: Literal["fsdp", "ddp"] = "fsdp"
    jit: bool = True
    width: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 64
    batch: int = 16
    microbatches: int = 2
    lr: float = 5e-3
    steps: int = 100
    megabytes: float = 1.0


def make_policy(name: str) -> ps.precision.Policy:
    policy = ps.precision.policy(name)
    return policy.where("head", float8=False) if name == "float8" else policy


@ps.experiment
def experiment(settings: Settings) -> ps.Experiment:
    torch.set_num_threads(1)  # bits on a CPU depend on the number of threads
    s = settings
    train, held_out = batches(s.context, s.batch, s.megabytes)
    policy, tx = make_policy(s.precision), optimizer(s.lr, s.steps)
    plan = ps.sharding.fsdp() if s.plan == "fsdp" else ps.sharding.ddp()
    size = Size(s.width, s.layers, s.heads, s.context)
    step = ps.make_step(loss_fn, tx, microbatches=s.microbatches, policy=policy, plan=plan)
    # No process ever holds more than one full tensor.
    state = policy.apply(ps.init(lambda: Transformer(size), tx, plan=plan, deferred=True))
    callbacks = [
        ps.callbacks.log(every=ps.every.steps(25)),
        ps.callbacks.evaluate(ps.make_eval(loss_fn, policy=policy, plan=plan), held_out, every=ps.every.steps(s.steps)),
    ]
    step = ps.jit(step) if s.jit else step
    return ps.Experiment(step, state, train, until=ps.steps(s.steps), callbacks=callbacks, free_settings=["jit"])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for field in fields(Settings):
        action = {"action": argparse.BooleanOptionalAction} if field.name == "jit" else {"type": type(field.default)}
        parser.add_argument(f"--{field.name}", default=field.default, **action)
    settings = Settings(**vars(parser.parse_args()))
    losses = {}
    for precision in ("bf16-mixed", "float8"):
        result = experiment(replace(settings, precision=precision)).fit()
        losses[precision] = result.metrics["val/loss"]
        digest = ps.digest(result.state)  # of the whole state: every process takes part
        if result.interrupted:
            return result.exit_code
        if ps.sharding.rank() == 0:
            print(f"{precision:<24}  {losses[precision]:.4f} nats a byte, {result.loop.elapsed:.1f} s, digest {digest}")
    if ps.sharding.rank() == 0:
        print(f"{'processes, plan, jit':<24}  {ps.sharding.size()}, {settings.plan}, {settings.jit}")
        print(f"{'held-out loss in float8':<24}  {losses['float8']:.4f}")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
