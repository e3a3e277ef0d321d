"""`import purestep` stays light: what it must not load, and proof that this test would notice."""

from __future__ import annotations

import json

# Modules that nothing may load before it is used. A dotted name forbids only that part of its package.
FORBIDDEN = (
    "grain jax jaxlib matplotlib mlflow optax orbax pandas rich scipy sklearn tensorboard tensorstore torchdata wandb "
    "torch._dynamo torch._inductor torch.utils.tensorboard IPython hypothesis pytest"
).split()


def loaded_by(bare, code: str) -> list[str]:
    """The forbidden modules that an interpreter holds after running the code, beyond those of torch alone."""
    script = f"""
import json, sys, warnings
before = set(sys.modules)
warnings.simplefilter("error")
{code}
names = {FORBIDDEN!r}
print(json.dumps([n for n in names if n in sys.modules and n not in before]))
"""
    run = bare.run(script)
    assert run.returncode == 0, run.stderr
    return json.loads(run.stdout.splitlines()[-1])


def test_importing_purestep_and_its_rooms_loads_no_extra(bare):
    assert loaded_by(bare, "import purestep, purestep.loggers, purestep.ui, purestep.notebook") == []


def test_values_that_name_an_extra_do_not_load_it(bare):
    code = "from purestep import loggers; loggers.tensorboard(); loggers.wandb(project='p'); loggers.mlflow()"
    assert loaded_by(bare, code) == []


def test_this_test_can_fail(bare):
    found = loaded_by(bare, "import purestep, rich, torch._dynamo")
    assert {"rich", "torch._dynamo"} <= set(found)


def test_torch_alone_loads_nothing_forbidden(bare):
    """Otherwise the comparison with `before` would hide it."""
    script = f"import sys, numpy, torch; sys.exit(', '.join(n for n in {FORBIDDEN!r} if n in sys.modules))"
    assert bare.run(script).stderr.strip() == ""
