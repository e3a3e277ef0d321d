"""The same experiment under Hydra: a structured config, groups of files, and multirun sweeps.

    python examples/hydra/train.py model=conv optimizer=lion optimizer.learning_rate=3e-4 until="2 epochs"
    python examples/hydra/train.py --multirun optimizer=adamw,lion seed=0,1

Each run is in the directory that Hydra gives it; `purestep runs multirun` lists them.
"""

from __future__ import annotations

import math
import sys
from dataclasses import dataclass, field
from typing import Any

import hydra
from experiment import experiment
from hydra.core.config_store import ConfigStore
from hydra.core.hydra_config import HydraConfig
from omegaconf import MISSING, DictConfig

import purestep as ps


@dataclass
class Samples:
    samples: int = 1438
    batch: int = 64


@dataclass
class Config:
    """The types that Hydra checks; those of what goes by name are checked by purestep."""

    seed: int = 0
    until: str = "5 epochs"
    model: dict[str, Any] = MISSING
    optimizer: dict[str, Any] = MISSING
    plan: Any = None
    data: Samples = field(default_factory=Samples)


ConfigStore.instance().store(name="schema", node=Config)


@hydra.main(version_base="1.3", config_path="conf", config_name="config")
def main(config: DictConfig) -> float:
    digits = ps.Experiment.of(experiment, config)
    result = digits.fit(run_dir=HydraConfig.get().runtime.output_dir)
    loss = result.metrics.get("val/loss", math.nan)
    print(f"{result.reason}: val/loss {loss:.4f}, digest {ps.digest(result.state)}")
    if result.interrupted:
        sys.exit(result.exit_code)
    return loss  # what a sweeper such as Optuna's makes small


if __name__ == "__main__":
    main()
