"""Portable bits: each case in a fresh process, as torch chooses its kernels once."""

from __future__ import annotations

import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest
import torch

ROOT = Path(__file__).parents[1]
pytestmark = pytest.mark.skipif(
    platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkl.is_available(),
    reason="portable bits are those of MKL's and torch's kernels for x86-64",
)

STEP = """
import torch
from torch import nn
import purestep as ps
from purestep import portable

def loss_fn(net, batch):
    return nn.functional.cross_entropy(net(batch["x"]), batch["y"])

def model():
    head = [nn.Conv2d(1, 8, 3, padding=1), nn.BatchNorm2d(8), nn.GELU(), nn.Flatten()]
    return nn.Sequential(*head, nn.Linear(512, 32), nn.LayerNorm(32), nn.Tanh(), nn.Linear(32, 10))

tx = ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(1e-2))
state = ps.init(model, tx, seed=0)
step = ps.make_step(loss_fn, tx)
batch = {"x": ps.random.normal(ps.random.key(1), (16, 1, 8, 8)), "y": torch.arange(16) % 10}

def digest(step, state=state):
    for _ in range(3):
        state, _ = step(state, batch)
    return ps.digest(state)
"""


def run(code, *, fails=False, **environment):
    """The lines that the code prints; with `fails` the text of its error."""
    clean = {k: v for k, v in os.environ.items() if not k.startswith(("PURESTEP_", "ATEN_", "MKL_CBWR", "ONEDNN_"))}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT,
        env=clean | environment,
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert (done.returncode != 0) == fails, done.stderr
    return done.stderr if fails else done.stdout.splitlines()


def available():
    return torch.backends.cpu.get_cpu_capability() in ("AVX2", "AVX512")


needs_avx2 = pytest.mark.skipif(not available(), reason="portable bits need AVX2")
needs_wider = pytest.mark.skipif(
    torch.backends.cpu.get_cpu_capability() != "AVX512", reason="torch chooses the kernels of portable bits by itself"
)


@needs_avx2
@pytest.mark.parametrize(
    ("before", "name"),
    [
        pytest.param("torch.ones(3) + 1", "torch's kernels", marks=needs_wider),
        pytest.param("torch.ones(9, 9) @ torch.ones(9, 9)", "MKL's branch", marks=pytest.mark.slow),
    ],
)
def test_too_late_is_refused(before, name):
    code = f"import torch; {before}; import purestep as ps; ps.bits.portable()"
    # With torch's kernels right already, MKL's are found by themselves.
    error = run(code, fails=True, **({"ATEN_CPU_CAPABILITY": "avx2"} if name == "MKL's branch" else {}))
    assert "it is too late for portable bits: torch has chosen its kernels" in error
    assert f"where:   {name}" in error
    assert "PURESTEP_BITS=portable python train.py" in error


def test_a_processor_without_avx2_is_refused():
    code = "import torch; torch.ones(3) + 1; import purestep"
    error = run(code, fails=True, PURESTEP_BITS="portable", ATEN_CPU_CAPABILITY="default")
    assert "portable bits need a processor with AVX2 and FMA" in error
    assert "torch runs its DEFAULT kernels" in error


def test_unknown_bits_are_refused():
    error = run("import purestep", fails=True, PURESTEP_BITS="portabel")
    assert "there are no such bits" in error
    assert "where:   PURESTEP_BITS=portabel" in error


# Which functions of the C library, of torch and of oneDNN a processor with less would take.
LESSER = {
    "GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX512F,-AVX512DQ,-AVX512VL,-AVX2,-FMA,-AVX,-BMI2",
    "ONEDNN_MAX_CPU_ISA": "SSE41",
    "MKL_ENABLE_INSTRUCTIONS": "SSE4_2",
}


@needs_avx2
@pytest.mark.slow
def test_a_step_has_one_digest_on_lesser_processors_eager_and_compiled(tmp_path):
    code = STEP + "print(digest(step), digest(ps.jit(step)), portable.record(), portable.probe())"
    entered = "import purestep as ps; ps.bits.portable()\n" + code
    caches = [{"TORCHINDUCTOR_CACHE_DIR": str(tmp_path / name)} for name in "ab"]
    here, lesser = run(code, PURESTEP_BITS="portable", **caches[0]), run(entered, **LESSER, **caches[1])
    assert here == lesser
    eager, compiled, record, _ = here[0].split()
    assert record == "portable"
    assert eager != compiled  # each has a row of its own in the table of the documentation
    if torch.__version__.startswith("2.13.0"):
        assert eager[:16] == "ba79ef6f455a6655"
        assert compiled[:16] == "435296515ae31230"


RESUMED = """
import warnings
from purestep.errors import ConfigError
from purestep.loop.identity import RunChangedWarning

def fit(until):
    data = ps.data.batches({"x": batch["x"].numpy(), "y": batch["y"].numpy()}, 8, seed=0)
    return ps.fit(step, state, data, until=ps.steps(until), run_dir=RUN_DIR)
"""


@pytest.mark.slow
@needs_avx2
def test_a_run_records_its_bits_warns_when_resumed_under_others_and_checks_them(tmp_path):
    start = STEP + RESUMED.replace("RUN_DIR", repr(str(tmp_path / "run")))
    first = start + (
        "fit(2)\n"
        "print('recorded', ps.snapshot.manifest(PATH, 2).environment['bits'])\n"
        "torch.set_num_threads(2)\n"
        "try:\n    fit(4)\nexcept ConfigError as error:\n    print(error)\n"
    ).replace("PATH", repr(str(tmp_path / "run")))
    said = "\n".join(run(first, PURESTEP_BITS="portable", OMP_NUM_THREADS="1"))
    assert "recorded portable" in said
    assert "a setting has changed since the mode was entered" in said
    assert "torch.get_num_threads() is 2, portable bits need 1" in said
    second = start + (
        "with warnings.catch_warnings(record=True) as caught:\n"
        "    warnings.simplefilter('always'); fit(4)\n"
        "print([str(w.message) for w in caught if w.category is RunChangedWarning][0])\n"
    )
    warning = "\n".join(run(second, OMP_NUM_THREADS="1"))
    assert "bits: saved under portable, now native" in warning
    assert "PURESTEP_BITS=portable" in warning


@pytest.mark.slow
@needs_avx2
def test_replaced_kernels_agree_with_numpy_in_every_form():
    code = """
import numpy as np, torch
import purestep as ps
from purestep.portable_kernels import REPLACED
other = {"asin": "arcsin", "acos": "arccos", "atan": "arctan"}
for name, (_, dtypes) in REPLACED.items():
    for dtype in dtypes:
        x = torch.rand(7, 11, dtype=dtype)
        y, z, out = getattr(torch, name)(x), x.clone(), torch.empty_like(x)
        expected = getattr(np, other.get(name, name))(x.double().numpy())
        np.testing.assert_allclose(y.double().numpy(), expected, rtol=4 * torch.finfo(dtype).eps)
        getattr(z, name + "_")()
        getattr(torch, name)(x, out=out)
        assert y.dtype == dtype and torch.equal(z, y) and torch.equal(out, y), name
x = torch.rand(1001)
exact = torch.from_numpy(np.sqrt(x.numpy()))
assert torch.equal(x.sqrt(), exact) and torch.equal(x ** 0.5, exact) and torch.equal(x.clone().pow_(0.5), exact)
assert torch.equal(torch._foreach_sqrt([x])[0], exact) and torch.equal(torch.func.vmap(torch.sqrt)(x), exact)
special = torch.tensor([0.0, -1.0, torch.inf, torch.nan, 1.0, 5e-324], dtype=torch.float64)
expected = torch.tensor([-torch.inf, torch.nan, torch.inf, torch.nan, 0.0, -744.4400719213812], dtype=torch.float64)
torch.testing.assert_close(special.log(), expected, rtol=1e-15, atol=0, equal_nan=True)
assert torch.ones(2, dtype=torch.int64).sqrt().dtype == torch.float32
assert torch.full((2,), -1.0 + 0j).sqrt().imag.tolist() == [1.0, 1.0]
print(ps.bits.mode())
"""
    assert run(code, PURESTEP_BITS="portable") == ["portable"]
