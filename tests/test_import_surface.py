"""`import purestep` stays light: what it must not load, and proof that this test would notice."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]

# Modules that nothing may load before it is used. A dotted name forbids only that part of its package.
FORBIDDEN = (
    "grain jax jaxlib matplotlib mlflow optax orbax pandas rich scipy sklearn tensorboard tensorstore torchdata wandb "
    "torch._dynamo torch._inductor torch.utils.tensorboard IPython hypothesis pytest"
).split()


def loaded_by(code: str) -> list[str]:
    """The forbidden modules that a fresh interpreter holds after running the code, beyond those of torch alone."""
    script = f"""
import json, sys
import numpy, torch
before = set(sys.modules)
{code}
names = {FORBIDDEN!r}
print(json.dumps([n for n in names if n in sys.modules and n not in before]))
"""
    command = [sys.executable, "-W", "error", "-c", script]
    run = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120, check=False)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_purestep_and_its_rooms_loads_no_extra():
    assert loaded_by("import purestep, purestep.loggers, purestep.ui, purestep.notebook") == []


def test_values_that_name_an_extra_do_not_load_it():
    code = "from purestep import loggers; loggers.tensorboard(); loggers.wandb(project='p'); loggers.mlflow()"
    assert loaded_by(code) == []


def test_this_test_can_fail():
    found = loaded_by("import purestep, rich, torch._dynamo")
    assert {"rich", "torch._dynamo"} <= set(found)


def test_torch_alone_loads_nothing_forbidden():
    """Otherwise the comparison with `before` would hide it."""
    script = f"import sys, numpy, torch; sys.exit(', '.join(n for n in {FORBIDDEN!r} if n in sys.modules))"
    run = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, check=False)
    assert run.stderr.strip() == ""
