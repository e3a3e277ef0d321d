"""What purestep wants to reach: each target is a number read from the results and a limit it shall not exceed."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

from benchmarks import sharding, snapshots, training
from benchmarks.training import spread

Results = Mapping[str, Any]
Spread = tuple[float, float, float]


@dataclasses.dataclass(frozen=True)
class Target:
    """One row of the table.

    Attributes:
        what: the row's text.
        limit: the largest value that reaches the target.
        read: reads (median, quartile, quartile) from the results; a KeyError says it was not measured.
        unit: of the value; "" for a ratio.
    """

    what: str
    limit: float
    read: Callable[[Results], Spread]
    unit: str = ""


@dataclasses.dataclass(frozen=True)
class Verdict:
    """A target, what was reached, and the quartiles of the rounds; None where it was not measured."""

    target: Target
    reached: float | None
    low: float | None = None
    high: float | None = None

    @property
    def text(self) -> str:
        if self.reached is None:
            return "not measured"
        return "reached" if self.reached <= self.target.limit else "missed"


def verdicts(results: Results) -> list[Verdict]:
    """Return the verdict on every target."""
    found = []
    for target in TARGETS:
        try:
            found.append(Verdict(target, *target.read(results)))
        except (KeyError, IndexError, ValueError):
            found.append(Verdict(target, None))
    return found


def _step(workload: str, a: str, b: str) -> Callable[[Results], Spread]:
    return lambda results: training.ratio(results["training"][workload], a, b)


def _fastest_compiled(workload: str) -> Callable[[Results], Spread]:
    """Against the faster of the two ways to use `torch.compile`."""

    def read(results: Results) -> Spread:
        peers = results["training"][workload]["peers"]
        best = min((n for n in ("compile", "compile-all") if n in peers), key=lambda n: peers[n]["us"])
        return training.ratio(results["training"][workload], "ps-donate", best)

    return read


def _compile(workload: str) -> Callable[[Results], Spread]:
    def read(results: Results) -> Spread:
        seconds = results["compile_time"][workload]["seconds"]
        pairs = zip(seconds["ps-donate"]["cold"], seconds["compile-all"]["cold"], strict=True)
        return spread([a / b for a, b in pairs])

    return read


def _warm(workload: str) -> Callable[[Results], Spread]:
    def read(results: Results) -> Spread:
        seconds = results["compile_time"][workload]["seconds"]["ps-donate"]
        return spread([a / b for a, b in zip(seconds["warm"], seconds["cold"], strict=True)])

    return read


def _memory(name: str) -> Callable[[Results], Spread]:
    def read(results: Results) -> Spread:
        peers = results["memory"]["peers"]
        value = peers[name]["peak"] / peers["loop-fused"]["peak"]
        return value, value, value

    return read


def _snapshot(what: str) -> Callable[[Results], Spread]:
    return lambda results: snapshots.ratio(results["snapshots"], "purestep", what)


def _import(results: Results) -> Spread:
    pairs = zip(results["imports"]["purestep"]["rounds"], results["imports"]["torch"]["rounds"], strict=True)
    return spread([a / b for a, b in pairs])


def _sharding(model: str, ours: str, theirs: str) -> Callable[[Results], Spread]:
    return lambda results: sharding.ratio(results["sharding"], model, ours, theirs)


def _host(name: str) -> Callable[[Results], Spread]:
    return lambda results: results["host_cost"][name]


def _ensemble(name: str) -> Callable[[Results], Spread]:
    return lambda results: results["ensembles"]["ratio"][name]


def _ensemble_compile(results: Results) -> Spread:
    seconds = results["ensembles"]["compile"]
    value = seconds["stacked"] / seconds["one"]
    return value, value, value


_JIT, _EAGER = "jit, donated", "eager, fused=True, donated"
TARGETS: tuple[Target, ...] = (
    Target(f"MLP: {_JIT} / hand-written loop, AdamW foreach", 0.35, _step("mlp", "ps-donate", "loop")),
    Target(f"MLP: {_JIT} / JAX jit, donated", 1.2, _step("mlp", "ps-donate", "jax")),
    Target(f"MLP: {_JIT} / Lightning Trainer with one log", 0.15, _step("mlp", "ps-donate", "lightning-log")),
    Target(f"GPT: {_JIT} / hand-written loop, AdamW fused", 0.85, _step("gpt", "ps-donate", "loop-fused")),
    Target(f"CNN: {_JIT} / hand-written loop, AdamW fused", 0.85, _step("cnn", "ps-donate", "loop-fused")),
    Target(f"GPT: {_JIT} / torch.compile, the faster way", 1.0, _fastest_compiled("gpt")),
    Target(f"GPT: {_JIT} / JAX jit, donated", 0.5, _step("gpt", "ps-donate", "jax")),
    Target("GPT: eager, fused=True / hand-written loop, AdamW fused", 1.05, _step("gpt", "ps-fused", "loop-fused")),
    Target("MLP: eager, fused=True / hand-written loop, AdamW foreach", 1.2, _step("mlp", "ps-fused", "loop")),
    Target(f"50 M: {_EAGER} / hand-written loop, AdamW fused", 1.1, _step("wide", "ps-fused-donate", "loop-fused")),
    Target("fit over a bare loop, a step", 10.0, lambda r: r["loop_cost"]["step_us"], "us"),
    Target("fit over a bare loop, a further metric key and step", 2.0, lambda r: r["loop_cost"]["key_us"], "us"),
    Target("fit over torch's DataLoader, beyond a bare loop, a batch", 20.0, _host("loader_us"), "us"),
    Target("fit over ps.data.batches, beyond a bare loop, a batch", 10.0, _host("batches_us"), "us"),
    Target("ps.evaluate, beyond a bare loop, a batch", 10.0, _host("evaluate_us"), "us"),
    Target("a list of samples as data, beyond its collation, a sample", 5.0, _host("samples_us"), "us"),
    Target("MLP: eager / hand-written loop, AdamW foreach, CPU time", 1.1, _host("foreach")),
    Target("MLP: eager, fused=True / hand-written loop, AdamW fused, CPU time", 1.1, _host("fused")),
    Target("from import purestep to the first batch, a new process", 0.3, _host("first_batch_s"), "s"),
    Target("MLP: cold compile / torch.compile of model and AdamW", 0.5, _compile("mlp")),
    Target("GPT: cold compile / torch.compile of model and AdamW", 0.5, _compile("gpt")),
    Target("MLP: warm start / cold", 0.25, _warm("mlp")),
    Target("GPT: warm start / cold", 0.25, _warm("gpt")),
    Target(f"50 M: peak memory, {_JIT} / hand-written in place", 1.05, _memory("ps-donate")),
    Target(f"50 M: peak memory, {_EAGER} / hand-written in place", 1.1, _memory("ps-fused-donate")),
    Target("64 MLPs: stacked, jit / one after another, jit", 0.7, _ensemble("one after another, compiled")),
    Target("64 MLPs: stacked, jit / hand-written loops one after another", 0.1, _ensemble("hand-written loops")),
    Target("64 MLPs: compiling the stacked step / compiling one", 1.3, _ensemble_compile),
    Target("import purestep / import torch", 1.1, _import),
    Target("500 MB snapshot: blocking / torch.save + fsync", 0.3, _snapshot("block")),
    Target("500 MB snapshot: durable / torch.save + fsync", 1.2, _snapshot("total")),
    Target("500 MB snapshot: verified restore / torch.load", 2.5, _snapshot("restore")),
    *(
        Target(f"{model.upper()}, 2 processes: {ours} / {theirs}", limit, _sharding(model, ours, theirs))
        for model in ("mlp", "gpt")
        for ours, theirs, limit in (
            ("ddp fast", "torch ddp", 1.0),
            ("ddp fast, jit", "torch ddp", 1.0),
            ("ddp tree", "torch ddp", 1.25),
            ("fsdp fast", "torch fully_shard", 0.667),
            ("fsdp fast, jit", "torch fully_shard", 0.667),
        )
    ),
)
