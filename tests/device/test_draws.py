"""The kernels that draw on a card: their words are the CPU's, they compile for real cards, and who uses them.

No card is needed: Triton has an interpreter, and its compiler makes code for cards that are not there.
"""

from __future__ import annotations

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from shared_fake_cuda import counting, fake_cuda, needs_cuda_build, on_cuda
from shared_gpt import TinyGPT

import purestep as ps
from purestep.random import card, remembered
from tests.device.test_steps import step_of

pytestmark = [needs_cuda_build, pytest.mark.skipif(not card.has_triton(), reason="Triton is not installed")]
ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def interpreted():
    environment = os.environ | {"TRITON_INTERPRET": "1", "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    script = [sys.executable, str(Path(__file__).with_name("interpreted.py"))]
    done = subprocess.run(script, env=environment, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(done.stdout)


def test_the_kernels_give_the_bits_of_the_cpu(interpreted):
    assert len(interpreted) > 100
    # The logarithm of float64 is another library's; the interpreter cuts bfloat16 off where a card rounds it.
    inexact = {n for n in interpreted if n.startswith("normal float64") or (n.startswith("dropout") and "bfloat" in n)}
    assert {name: found for name, found in interpreted.items() if name not in inexact and found[0]} == {}
    assert {name: found for name, found in interpreted.items() if not found[2]} == {}
    assert max(interpreted[n][1] for n in inexact if n.startswith("normal")) < 1e-13
    assert max(interpreted[n][1] for n in inexact if n.startswith("dropout")) <= 2.0**-7


# --- the compiler -----------------------------------------------------------------------------------------------------

POINTERS = {torch.int64: "*i64", torch.bool: "*i1", torch.float16: "*fp16", torch.bfloat16: "*bf16"}
POINTERS |= {torch.float32: "*fp32", torch.float64: "*fp64"}
DRAWS = [  # kind, dtype, width, words an element
    (card._BITS, torch.int64, 0, 1),
    (card._MASK, torch.bool, 0, 1),
    (card._UNIFORM, torch.bfloat16, 8, 1),
    (card._UNIFORM, torch.float32, 24, 1),
    (card._UNIFORM, torch.float64, 53, 2),
    (card._NORMAL, torch.float32, 0, 2),
    (card._NORMAL, torch.float64, 0, 2),
]


def compiled(kernel, pointers, constants, architecture):
    from triton.backends.compiler import GPUTarget
    from triton.compiler import ASTSource, compile

    types = {name: "constexpr" if name in constants else pointers.get(name, "i64") for name in kernel.arg_names}
    source = ASTSource(fn=kernel, signature=types, constexprs=constants)
    return compile(source, target=GPUTarget("cuda", architecture, 32)).asm


@pytest.mark.parametrize("architecture", [80, 90])
def test_the_kernels_compile_for_cards(architecture, tmp_path, monkeypatch):
    monkeypatch.setenv("TRITON_CACHE_DIR", str(tmp_path))
    from purestep.random import philox_triton as kernels

    for (kind, dtype, width, words), host, indexed in itertools.product(DRAWS, (True, False), (True, False)):
        constants = {"KIND": kind, "WIDTH": width, "PER_ELEMENT": words, "HOST": host, "INDEXED": indexed}
        pointers = {"out": POINTERS[dtype], "key": "*i64", "index": "*i64"}
        assert "cubin" in compiled(kernels.draw, pointers, constants | {"BLOCKS": kernels.BLOCKS}, architecture)
    for value in (True, False):
        pointers = dict.fromkeys(("out", "key", "value"), "*i64")
        assert "cubin" in compiled(kernels.fold, pointers, {"VALUE": value}, architecture)
    for kinds in ((2, 0, 0, 0, 1, 1), (2, 2, 0, 0, 2, 2), (1, 1, 0, 0, 1, 1)):
        pointers = dict.fromkeys(("out", *(f"w{i}" for i in range(6))), "*i64")
        constants = {f"K{i}": kind for i, kind in enumerate(kinds)} | {"BLOCKS": kernels.BLOCKS}
        assert "cubin" in compiled(kernels.block, pointers, constants, architecture)
    for dtype in card.FLOATS:
        pointers = {"out": POINTERS[dtype], "x": POINTERS[dtype], "key": "*i64"}
        constants = {"WIDE": dtype == torch.float64, "HOST": True, "BLOCKS": kernels.BLOCKS}
        made = compiled(kernels.dropout, pointers, constants, architecture)
        assert "cubin" in made
        if dtype == torch.bfloat16:  # it rounds to the nearest, as the CPU does
            assert "cvt.rn.bf16" in made["ptx"]
        assert "fma.rn.f" not in made["ptx"]  # one rounding for each operation


# --- launches ---------------------------------------------------------------------------------------------------------


def launched(call):
    with fake_cuda():
        x = torch.empty(7, 5, device="cuda")
        key = torch.empty(2, dtype=torch.int64, device="cuda")
        with counting() as counts:
            call(key, x)
        assert counts.blocking == {}
    return dict(counts.launches)


CALLS = {
    "fold": (lambda k, x: ps.random.fold_in(k, 3, "a"), {"philox_fold": 2}),
    "bits": (lambda k, x: ps.random.bits(k, (9,)), {"philox_draw": 1}),
    "uniform": (lambda k, x: ps.random.uniform(k, (9,)), {"philox_draw": 1}),
    "normal": (lambda k, x: ps.random.normal(k, (9,)), {"philox_draw": 1}),
    "bernoulli": (lambda k, x: ps.random.bernoulli(k, 0.3, (9,)), {"philox_draw": 1}),
    "dropout": (lambda k, x: ps.random.dropout(k, x, 0.3), {"philox_dropout": 1}),
    "split": (lambda k, x: ps.random.split(k, 9), {"philox_block": 1, "arange": 1, "stack": 1}),
    "a key of the host": (lambda k, x: ps.random.dropout(HOST_KEY, x, 0.3), {"philox_dropout": 1}),
    "on a card, from the host": (lambda k, x: ps.random.uniform(HOST_KEY, (9,), device="cuda"), {"philox_draw": 1}),
}
HOST_KEY = ps.random.key(3)


@pytest.mark.parametrize("name", CALLS)
def test_launches_of_a_draw(name):
    call, expected = CALLS[name]
    assert launched(call) == expected


def test_without_triton_operations_draw(monkeypatch):
    monkeypatch.setattr(card, "has_triton", lambda: False)
    found = launched(CALLS["dropout"][0])
    assert not any("philox" in name for name in found)
    assert sum(found.values()) > 100


@pytest.mark.parametrize("dropout", ["portable", "device"])
def test_a_dropout_is_one_launch_of_a_step_whose_key_the_host_knows(dropout):
    policy = None if dropout == "portable" else ps.precision.policy("32", dropout=dropout)
    found = {}
    for p in (0.0, 0.1):
        step, state, batch = step_of(make=lambda p=p: TinyGPT(p=p), policy=policy)
        with fake_cuda():
            state, batch = on_cuda(state), on_cuda(batch)
            remembered.remember(state.rng, [0, 0])
            remembered.remember(state.step, 0)
            state, _ = step(state, batch)
            with counting() as counts:
                state, _ = step(state, batch)
        assert counts.blocking == {}
        assert remembered.known(state.step) == 2
        found[p] = counts
    assert found[0.1].total == found[0.0].total + 4
    assert found[0.1].launches["philox_dropout" if dropout == "portable" else "native_dropout"] == 4
