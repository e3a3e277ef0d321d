"""Seconds to import each library, in new processes, in turns."""

from __future__ import annotations

import os
import subprocess
import sys
from typing import Any

from benchmarks.training import Say, spread
from benchmarks.worker import ENVIRONMENT

LIBRARIES = {
    "torch": "torch",
    "purestep": "purestep",
    "lightning": "lightning",
    "accelerate": "accelerate",
    "jax": "jax, flax.linen, optax",
}
CODE = "import time; t = time.perf_counter(); import {}; print(time.perf_counter() - t)"


def run(settings: Any, say: Say) -> dict[str, Any]:
    """Return `{name: {"seconds": (median, quartiles), "rounds": [...]}}`; what is not installed is left out."""
    rounds: dict[str, list[float]] = {name: [] for name in settings.import_rounds}
    for number in range(max(settings.import_rounds.values()) + 1):  # the first one fills the page cache
        for name in [name for name, times in settings.import_rounds.items() if number <= times]:
            done = subprocess.run(
                [sys.executable, "-c", CODE.format(LIBRARIES[name])],
                capture_output=True,
                text=True,
                env={**os.environ, **ENVIRONMENT},
                check=False,
            )
            if number and done.returncode == 0:
                rounds[name].append(float(done.stdout.split()[-1]))
    found = {name: {"seconds": spread(times), "rounds": times} for name, times in rounds.items() if times}
    say("import: " + ", ".join(f"{name} {v['seconds'][0]:.2f} s" for name, v in found.items()))
    return found
