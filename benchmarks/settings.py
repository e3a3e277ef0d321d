"""How much is measured: the full benchmark, and the quick one for a look in between."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.peers import POLICIES

Names = tuple[str, ...]

EAGER: Names = (
    *("loop", "loop-fused", "lightning", "lightning-log", "fabric", "accelerate", "ignite", "keras"),
    *("ps-eager", "ps-fused"),
)
EVERYBODY: Names = (
    *EAGER[:2],
    "compile",
    "compile-all",
    *EAGER[2:8],
    "jax",
    *EAGER[8:],
    "ps-jit",
    "ps-donate",
    "ps-fit",
)
# Compiling a CNN twice more says nothing new; with 50 M parameters each needs 0.6 GB and loops cost nothing beside.
ON_CNN: Names = (*EAGER[:2], "compile-all", "lightning-log", "jax", "ps-eager", "ps-fused", "ps-donate", "ps-fit")
ON_WIDE: Names = (
    "loop",
    "loop-fused",
    "compile-all",
    "lightning",
    "jax",
    "ps-fused",
    "ps-eager-donate",
    "ps-fused-donate",
    "ps-jit",
    "ps-donate",
)
SHARDED: Names = (
    *("torch ddp", "torch ddp, compiled", "torch fully_shard"),
    *(f"{kind} {sums}{jit}" for kind in ("ddp", "fsdp") for sums in ("fast", "tree") for jit in ("", ", jit")),
)
QUICK_ONES: Names = ("loop", "loop-fused", "compile-all", "lightning-log", "jax", "ps-fused", "ps-donate")
SECTIONS: Names = (
    "training",
    "loop_cost",
    "host_cost",
    "compile_time",
    "memory",
    "precision",
    "snapshots",
    "imports",
    "sharding",
    "portable",
    "ensembles",
)


@dataclasses.dataclass(frozen=True)
class Settings:
    """What each section measures, and how often.

    Attributes:
        name: of the settings, and of the files with the results.
        sections: in order; each has a process of its own.
        training: trainers by workload.
        processes: of each trainer of the training section, one after the other: trainers that do the same differ from
            process to process, by where their memory comes to lie.
        rounds: rounds of the training section in each process; each trainer takes `round_seconds` in each.
        loop_rounds: turns of the loop section, of `loop_steps` steps each: as many as `fit` takes from row to row.
            The section `host_cost` takes a quarter of the turns.
        compile_rounds: by workload, how often everybody compiles with an empty cache.
        memory: trainers of the memory section.
        policies: precision policies, on `policy_workloads`; `policy_rounds` rounds of `policy_steps` steps each.
        import_rounds: by library, how often it is imported.
        snapshot_rounds: how often `snapshot_mb` MB are saved and restored, by each of `snapshot_kinds`.
        sharding: variants by model on several processes: `sharding_rounds` rounds of `sharding_steps` steps each.
        portable: trainers whose steps are measured with portable bits, by workload.
        ensemble_rounds: turns of the section on ensembles.
        cache: compiled code of all processes of a run, kept beside the results, so that a second run is quicker.
    """

    name: str
    sections: Names
    training: dict[str, Names]
    processes: int
    rounds: int
    round_seconds: float
    loop_rounds: int
    loop_steps: int
    compile_rounds: dict[str, int]
    memory: Names
    policies: Names
    policy_workloads: Names
    policy_rounds: int
    policy_steps: int
    import_rounds: dict[str, int]
    snapshot_kinds: Names
    snapshot_rounds: int
    sharding: dict[str, Names]
    sharding_rounds: int
    sharding_steps: int
    portable: dict[str, Names]
    ensemble_rounds: int = 15
    snapshot_mb: int = 500
    cache: Path = Path(__file__).parent / "results" / ".cache"


FULL = Settings(
    name="full",
    sections=SECTIONS,
    training={"mlp": EVERYBODY, "gpt": EVERYBODY, "cnn": ON_CNN, "wide": ON_WIDE},
    processes=3,
    rounds=3,
    round_seconds=0.25,
    loop_rounds=400,
    loop_steps=50,
    compile_rounds={"mlp": 2, "gpt": 1},
    memory=(
        *("loop", "loop-fused", "compile-all", "lightning", "jax"),
        *("ps-eager", "ps-fused", "ps-eager-donate", "ps-fused-donate", "ps-jit", "ps-donate"),
    ),
    policies=POLICIES,
    # The small one first: memory that a process keeps after it would count for the next.
    policy_workloads=("gpt", "mid"),
    policy_rounds=7,
    policy_steps=1,
    import_rounds={"torch": 7, "purestep": 7, "lightning": 3, "accelerate": 3, "jax": 3},
    snapshot_kinds=("torch", "purestep", "dcp", "dcp-async"),
    snapshot_rounds=7,
    sharding={"mlp": SHARDED, "gpt": SHARDED},
    sharding_rounds=11,
    sharding_steps=8,
    portable=dict.fromkeys(("mlp", "gpt", "cnn"), ("ps-eager", "ps-donate")),
)
# For a look in between, in less than five minutes with nothing compiled before.
QUICK = Settings(
    name="quick",
    sections=("training", "loop_cost", "host_cost", "memory", "precision", "snapshots", "imports"),
    training={"mlp": QUICK_ONES, "gpt": ("loop-fused", "jax", "ps-fused", "ps-donate")},
    processes=1,
    rounds=7,
    round_seconds=0.1,
    loop_rounds=100,
    loop_steps=50,
    compile_rounds={},
    memory=("loop-fused", "ps-fused-donate"),
    policies=("32", "bf16-mixed"),
    policy_workloads=("gpt",),
    policy_rounds=3,
    policy_steps=1,
    import_rounds={"torch": 2, "purestep": 2},
    snapshot_kinds=("torch", "purestep"),
    snapshot_rounds=3,
    sharding={"mlp": ("torch ddp", "torch fully_shard", "ddp fast", "ddp tree", "fsdp fast")},
    sharding_rounds=7,
    sharding_steps=4,
    portable={"mlp": ("ps-eager",)},
)
