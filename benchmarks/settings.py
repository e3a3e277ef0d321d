"""How much is measured: the full benchmark, the quick one, and one so small that only a test runs it."""

from __future__ import annotations

import dataclasses
from pathlib import Path


@dataclasses.dataclass(frozen=True)
class Settings:
    """Numbers of rounds and sizes. `rounds` are for medians, `seconds` is what one round of one trainer takes."""

    name: str = "full"
    rounds: int = 9
    round_seconds: float = 0.35
    loop_rounds: int = 15
    loop_steps: int = 1000
    compile_rounds: int = 2
    compile_workloads: tuple[str, ...] = ("mlp", "gpt")
    import_rounds: int = 5
    snapshot_rounds: int = 7
    snapshot_mb: int = 500
    policy_rounds: int = 7
    policy_steps: int = 4
    # One cache of compiled code for all processes of a run, on the side of the results, so that a second run is quick.
    cache: Path = Path(__file__).parent / "results" / ".cache"


FULL = Settings()
QUICK = Settings(
    name="quick",
    rounds=7,
    round_seconds=0.1,
    loop_rounds=9,
    loop_steps=500,
    compile_rounds=1,
    compile_workloads=("mlp",),
    import_rounds=3,
    snapshot_rounds=3,
    policy_rounds=3,
    policy_steps=2,
)
