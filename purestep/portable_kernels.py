"""Kernels that replace those of MKL which are not portable: square roots, inverse trigonometry, tangents, logarithms.

torch computes these functions of float32 and float64 tensors with MKL's vector library, which no setting pins: off
Intel's processors, and in its compatible branch, it starts from the processor's own estimate of 1/x or 1/sqrt(x)
(`rcpps`, `rsqrtps`), and every vendor has other estimates. The kernels here are made of operations that IEEE 754 rounds
exactly, and of kernels that are a fixed sequence of them (Sleef's, which torch brings along). `portable` installs them.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from torch import Tensor

from purestep import _torch_cpu

Kernel = Callable[[Tensor], Tensor]


def sqrt(x: Tensor) -> Tensor:
    """The square root, rounded exactly: numpy calls the processor's instruction for it."""
    with np.errstate(invalid="ignore"):
        return torch.from_numpy(np.asarray(np.sqrt(x.detach().numpy())))


def _in_double(function: Kernel) -> Kernel:
    """float32 is computed in float64 and rounded once."""
    return lambda x: function(x.detach().double()).to(x.dtype)


def _asin(x: Tensor) -> Tensor:
    return torch.atan2(x, sqrt((1 - x) * (1 + x)))


def _acos(x: Tensor) -> Tensor:
    return torch.atan2(sqrt((1 - x) * (1 + x)), x)


def _atan(x: Tensor) -> Tensor:
    return torch.atan2(x, torch.ones((), dtype=x.dtype))


def _tan(x: Tensor) -> Tensor:
    return torch.sin(x) / torch.cos(x)


def _log_parts(x: Tensor) -> tuple[Tensor, Tensor]:
    """Return (log(m), e) with x = m * 2**e and m in [sqrt(1/2), sqrt(2)); special values go with m."""
    m, e = torch.frexp(x)
    low = m < math.sqrt(0.5)
    m, e = torch.where(low, 2 * m, m), torch.where(low, e - 1, e).to(x.dtype)
    usual = torch.isfinite(x) & (x > 0)
    special = torch.where(x == 0, -math.inf, torch.where(x == math.inf, math.inf, math.nan))
    return torch.where(usual, torch.log1p(m - 1), special.to(x.dtype)), torch.where(usual, e, 0)


def _log(x: Tensor) -> Tensor:
    m, e = _log_parts(x)
    return m + e * math.log(2)


def _log2(x: Tensor) -> Tensor:
    m, e = _log_parts(x)
    return m / math.log(2) + e


def _log10(x: Tensor) -> Tensor:
    m, e = _log_parts(x)
    return m / math.log(10) + e * math.log10(2)


# MKL's float32 logarithm has no estimate in it, all other functions of its vector library neither.
_BOTH = (torch.float32, torch.float64)
REPLACED: dict[str, tuple[Kernel, tuple[torch.dtype, ...]]] = {
    "sqrt": (sqrt, _BOTH),
    "asin": (_in_double(_asin), _BOTH),
    "acos": (_in_double(_acos), _BOTH),
    "atan": (_in_double(_atan), _BOTH),
    "tan": (_in_double(_tan), _BOTH),
    "log": (_log, (torch.float64,)),
    "log2": (_in_double(_log2), _BOTH),
    "log10": (_in_double(_log10), _BOTH),
}

_library: Any = None


def install() -> None:
    """Put the kernels in the place of torch's for CPU tensors, for the life of the process."""
    global _library
    if _library is not None:
        return
    _library = torch.library.Library("aten", "IMPL")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that a kernel is replaced, which is what is wanted
        for name, (kernel, dtypes) in REPLACED.items():
            _replace(name, kernel, dtypes)
            _replace_in_place(f"{name}_", kernel, dtypes)
            _replace_out(f"{name}.out", kernel, dtypes)
        _replace_power()


def _put(name: str, function: Callable[..., Any]) -> None:
    _library.impl(name, function, "CPU", with_keyset=True)


def _replace(name: str, kernel: Kernel, dtypes: tuple[torch.dtype, ...]) -> None:
    original = _torch_cpu.cpu_kernel(f"aten::{name}")

    def run(keys: Any, x: Tensor) -> Tensor:
        return kernel(x) if x.dtype in dtypes else original(keys, x)

    _put(name, run)


def _replace_in_place(name: str, kernel: Kernel, dtypes: tuple[torch.dtype, ...]) -> None:
    original = _torch_cpu.cpu_kernel(f"aten::{name}")

    def run(keys: Any, x: Tensor) -> Tensor:
        return x.copy_(kernel(x)) if x.dtype in dtypes else original(keys, x)

    _put(name, run)


def _replace_out(name: str, kernel: Kernel, dtypes: tuple[torch.dtype, ...]) -> None:
    original = _torch_cpu.cpu_kernel(f"aten::{name}")

    def run(keys: Any, x: Tensor, *, out: Tensor) -> Tensor:
        if x.dtype not in dtypes:
            return original(keys, x, out=out)
        if out.shape != x.shape:
            out.resize_(x.shape)
        return out.copy_(kernel(x))

    _put(name, run)


def _replace_power() -> None:
    """`x ** 0.5` is a kernel of its own, which calls that of the square root without asking the dispatcher."""
    originals = {name: _torch_cpu.cpu_kernel(f"aten::{name}") for name in ("pow.Tensor_Scalar", "pow_.Scalar")}
    out_of = _torch_cpu.cpu_kernel("aten::pow.Tensor_Scalar_out")

    def power(keys: Any, x: Tensor, exponent: Any) -> Tensor:
        return sqrt(x) if exponent == 0.5 and x.dtype in _BOTH else originals["pow.Tensor_Scalar"](keys, x, exponent)

    def in_place(keys: Any, x: Tensor, exponent: Any) -> Tensor:
        if exponent == 0.5 and x.dtype in _BOTH:
            return x.copy_(sqrt(x))
        return originals["pow_.Scalar"](keys, x, exponent)

    def out(keys: Any, x: Tensor, exponent: Any, *, out: Tensor) -> Tensor:
        if exponent != 0.5 or x.dtype not in _BOTH:
            return out_of(keys, x, exponent, out=out)
        if out.shape != x.shape:
            out.resize_(x.shape)
        return out.copy_(sqrt(x))

    for name, function in (("pow.Tensor_Scalar", power), ("pow_.Scalar", in_place), ("pow.Tensor_Scalar_out", out)):
        _put(name, function)
