"""How much is measured: the full benchmark, and the quick one for a look in between."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from benchmarks.peers import POLICIES

Names = tuple[str, ...]

EAGER: Names = ("loop", "loop-fused", "lightning", "lightning-log", "fabric", "accelerate", "ps-eager", "ps-fused")
EVERYBODY: Names = (
    *EAGER[:2],
    "compile",
    "compile-all",
    *EAGER[2:6],
    "jax",
    *EAGER[6:],
    "ps-jit",
    "ps-donate",
    "ps-fit",
)
# Compiling a CNN twice more says nothing new; with 50 M parameters each needs 0.6 GB and loops cost nothing beside.
ON_CNN: Names = (*EAGER[:2], "compile-all", "lightning-log", "jax", "ps-eager", "ps-fused", "ps-donate", "ps-fit")
ON_WIDE: Names = ("loop", "loop-fused", "compile-all", "lightning", "jax", "ps-fused", "ps-jit", "ps-donate")
QUICK_ONES: Names = ("loop", "loop-fused", "compile-all", "lightning-log", "jax", "ps-fused", "ps-donate", "ps-fit")


@dataclasses.dataclass(frozen=True)
class Settings:
    """What each section measures, and how often.

    Attributes:
        name: of the settings, and of the files with the results.
        training: trainers by workload.
        rounds: rounds of the training section; each trainer takes `round_seconds` in each.
        loop_rounds: turns of the loop section, of `loop_steps` steps each: as many as `fit` takes from row to row.
        compile_rounds: by workload, how often everybody compiles with an empty cache.
        memory: trainers of the memory section.
        policies: precision policies; `policy_rounds` rounds of `policy_steps` steps each.
        imports: libraries to import, `import_rounds` times.
        snapshot_rounds: how often `snapshot_mb` MB are saved and restored, by each kind.
        cache: compiled code of all processes of a run, kept beside the results, so that a second run is quicker.
    """

    name: str
    training: dict[str, Names]
    rounds: int
    round_seconds: float
    loop_rounds: int
    loop_steps: int
    compile_rounds: dict[str, int]
    memory: Names
    policies: Names
    policy_rounds: int
    policy_steps: int
    imports: Names
    import_rounds: int
    snapshot_rounds: int
    snapshot_mb: int = 500
    cache: Path = Path(__file__).parent / "results" / ".cache"


FULL = Settings(
    name="full",
    training={"mlp": EVERYBODY, "gpt": EVERYBODY, "cnn": ON_CNN, "wide": ON_WIDE},
    rounds=9,
    round_seconds=0.25,
    loop_rounds=400,
    loop_steps=50,
    compile_rounds={"mlp": 2, "gpt": 1},
    memory=("loop", "loop-fused", "compile-all", "lightning", "jax", "ps-eager", "ps-fused", "ps-jit", "ps-donate"),
    policies=POLICIES,
    policy_rounds=5,
    policy_steps=1,
    imports=("torch", "purestep", "lightning", "accelerate", "jax"),
    import_rounds=4,
    snapshot_rounds=7,
)
QUICK = Settings(
    name="quick",
    training={"mlp": QUICK_ONES, "gpt": QUICK_ONES},
    rounds=7,
    round_seconds=0.1,
    loop_rounds=150,
    loop_steps=50,
    compile_rounds={"mlp": 1},
    memory=("loop-fused", "ps-donate"),
    policies=("32", "bf16-mixed", "16-mixed"),
    policy_rounds=3,
    policy_steps=1,
    imports=("torch", "purestep"),
    import_rounds=3,
    snapshot_rounds=3,
)
