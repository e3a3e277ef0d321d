"""What decides which kernels torch runs on a CPU, and which operation is running: torch's private names, in one place.

Owns every access to names that torch does not document: MKL's branch inside `libtorch_cpu`, the settings of Inductor's
C++ code, and the sequence numbers that lead from an operation to its node in the graph of autograd. `portable` and
`trace_bits` call it. Where a build of torch has no such name the functions return None, and the caller says so.
"""

from __future__ import annotations

import ctypes
import functools
import os
import platform
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch

COMPATIBLE = 3  # MKL_CBWR_COMPATIBLE of mkl_types.h: one order of operations on every x86-64 processor
_ALL = -1  # MKL_CBWR_ALL: what `mkl_cbwr_get` is asked for


@functools.cache
def _library() -> ctypes.CDLL | None:
    try:
        return ctypes.CDLL(str(Path(torch.__file__).parent / "lib" / "libtorch_cpu.so"))
    except OSError:
        return None


def mkl_branch() -> int | None:
    """Return the branch that MKL's kernels are taken from, which this call settles; None in a build without MKL.

    torch links MKL statically and offers no function for it; the symbol is the one behind `mkl_cbwr_get`.
    """
    get = getattr(_library(), "mkl_serv_cbwr_get", None)
    return None if get is None else int(get(_ALL))


def has_mkl() -> bool:
    """Return whether this build of torch has an MKL whose branch can be asked for. Asking this settles nothing."""
    return hasattr(_library(), "mkl_serv_cbwr_get")


def has_avx2() -> bool:
    """Return whether the processor has AVX2. Asking this settles nothing."""
    return bool(torch.cpu._is_avx2_supported())


def set_inductor(settings: Mapping[str, Any]) -> None:
    """Set what Inductor has read from the environment already, where it was imported before."""
    config = sys.modules.get("torch._inductor.config")
    for name, value in settings.items() if config is not None else ():
        setattr(config.cpp, name, value)  # type: ignore[union-attr]


def cpu_kernel(name: str) -> Callable[..., Any]:
    """Return the kernel that torch has for CPU tensors, as a function of the dispatch keys and the arguments.

    A kernel that replaces it can call it so for what it does not replace.
    """
    return torch.library.get_kernel(name, "CPU").call_boxed


def nnpack_enabled() -> bool:
    """Return whether convolutions may go to NNPACK; torch offers a way to set it, and none to read it."""
    return bool(torch._C._get_nnpack_enabled())


def sequence_number() -> int:
    """Return the number of the node of autograd that the running operation of a forward pass belongs to."""
    return int(torch.autograd._get_sequence_nr()) - 1


def backward_number() -> int | None:
    """Return the number of the node whose gradient is being computed, None outside a backward pass."""
    node = torch._C._current_autograd_node()
    return None if node is None else int(node._sequence_nr())


def backward_running() -> bool:
    """Return whether this thread is in a backward pass, also between its nodes, where gradients are added up."""
    return int(torch._C._current_graph_task_id()) != -1


@functools.cache
def processor() -> str:
    """Return the name of the processor as the system has it."""
    if os.path.exists("/proc/cpuinfo"):
        with open("/proc/cpuinfo") as lines:
            for line in lines:
                if line.startswith("model name"):
                    return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()
