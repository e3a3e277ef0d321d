"""Trees to store, and the bytes of a snapshot's files."""

from __future__ import annotations

import functools
import os
import subprocess
import sys
import warnings
from collections import OrderedDict, deque
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

DTYPES = [
    *(torch.float64, torch.float32, torch.float16, torch.bfloat16, torch.complex128, torch.complex64, torch.complex32),
    *(torch.float8_e4m3fn, torch.float8_e5m2, torch.float8_e4m3fnuz, torch.float8_e5m2fnuz, torch.float8_e8m0fnu),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint64, torch.uint32, torch.uint16, torch.uint8),
    *(torch.bool, torch.float4_e2m1fn_x2),
]


def random_tensor(dtype: torch.dtype, *shape: int) -> torch.Tensor:
    """A tensor of random bits: NaN payloads and all."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # ComplexHalf is experimental
        width = torch.empty(0, dtype=dtype).element_size()
        high = 2 if dtype is torch.bool else 256
        count = int(np.prod(shape))
        raw = torch.randint(0, high, (max(count, 1) * width,), dtype=torch.uint8)
        return raw.view(dtype)[:count].reshape(shape)


@pytest.fixture
def example(seed: int) -> dict[str, Any]:
    """Every kind of leaf and node that comes back without a template and without classes."""
    weight = torch.randn(37, 11)
    return {
        "dtypes": {str(dtype): random_tensor(dtype, 3, 5) for dtype in DTYPES},
        "zero_d": torch.tensor(3.5),
        "empty": torch.empty(0, 3, dtype=torch.bfloat16),
        "strided": torch.randn(6, 7)[::2, 1:].T,
        "expanded": torch.randn(1, 3).expand(4, 3),
        "conjugate": torch.randn(3, dtype=torch.complex64).conj(),
        "large": torch.randn(700, 613),
        "large_bf16": torch.randn(1301, 701).bfloat16(),
        "weight": weight,
        "tied": weight,
        "view": weight[:],
        "numpy": [np.arange(7.0)[::-2], np.asarray(3, ">i4"), np.float32(2.5), np.zeros((0, 2)), np.ones(3, ">f8")],
        "a.b": 1,
        "a": {"b": 2, 7: 3, -1: 4, "7": 5},
        "python": (0.1, -0.0, float("inf"), 10**4000, -3, True, "text \ud800 ü", b"\0\xff", 1 - 2j, None),
        "nodes": [[], (), {}, OrderedDict(z=1, a=2), deque([1, 2], maxlen=3)],
    }


@pytest.fixture
def python_process(zygote):
    """Run a script in a process that has torch and Orbax loaded; give its completed process."""
    return functools.partial(zygote.run, preload="orbax.checkpoint xxhash")


@pytest.fixture
def new_interpreter():
    """Run a script in a fresh interpreter; give its completed process."""

    def run(script: str, *args: str, timeout: float = 120) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-W", "error", "-c", script, *args],
            capture_output=True,
            text=True,
            timeout=timeout,
            env=os.environ | {"PYTHONPATH": str(Path(__file__).parents[2])},
        )

    return run
