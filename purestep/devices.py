"""Which device a state lives on: one rule, for `init`, `fit`, meshes, the process group and the command.

What is said nearest to the run counts: `fit(..., device=)` and `--device`, then `init(..., device=)`, then the variable
PURESTEP_DEVICE, then the accelerator of this machine. Batches follow the state. Without an accelerator all of it is the
CPU.
"""

from __future__ import annotations

import contextlib
import os
from typing import Any, TypeVar

import torch

from purestep import portable, tree
from purestep.arguments import DeviceChoice, checked
from purestep.errors import ConfigError, explain

T = TypeVar("T")
VARIABLE = "PURESTEP_DEVICE"
_NUMBERED = ("cuda", "xpu")  # a machine may have several of them, and each has streams and memory to ask for
_COLLECTIVES = {"cuda": "nccl", "xpu": "xccl"}


@checked(ConfigError)
def default_device(device: DeviceChoice | None = None) -> torch.device:
    """Return the device that a first state is put on where no argument names one; or the one that a name stands for.

    The accelerator of this machine: CUDA, else XPU, else MPS, else the CPU. Under torchrun the card is that of
    LOCAL_RANK, otherwise torch's current one. The environment variable PURESTEP_DEVICE names another default. Where
    portable bits are asked for, the default is the CPU, because they are those of CPUs.

    Args:
        device: "auto" or None for the default; or a device, in which an accelerator without a number becomes that of
            LOCAL_RANK or the current one.

    Raises:
        ConfigError: PURESTEP_DEVICE names no device, or there are fewer cards than LOCAL_RANK counts.

    Examples:
        >>> default_device("cpu")
        device(type='cpu')
    """
    if device is not None and device != "auto":
        return _numbered(torch.device(device))
    told = os.environ.get(VARIABLE, "").strip()
    if told and told != "auto":
        return _numbered(_read(told))
    return torch.device("cpu") if portable.mode() == "portable" else _numbered(torch.device(accelerator()))


def accelerator() -> str:
    """Return the type of the best device that this process can compute on."""
    if torch.cuda.is_available():
        return "cuda"
    if torch.xpu.is_available():
        return "xpu"
    return "mps" if torch.backends.mps.is_available() else "cpu"


def _read(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise ConfigError(
            explain(
                f"{VARIABLE} names a device",
                where=f"{VARIABLE}={text}",
                why=str(error).partition("\n")[0],
                instead=f"{VARIABLE}=cpu, or auto, cuda, cuda:1, xpu, mps",
            )
        ) from error


def _numbered(device: torch.device) -> torch.device:
    """Return a device with the number of its card: that of LOCAL_RANK, or the current one."""
    if ":" in str(device) or device.type not in _NUMBERED:
        return device
    module = torch.get_device_module(device)
    if not module.is_available():
        return device  # torch itself says so where a tensor is put there
    return torch.device(device.type, _card(module.device_count(), module.current_device))


def _card(count: int, current: Any) -> int:
    told = os.environ.get("LOCAL_RANK", "")
    if not told.isdecimal() or count == 1:  # a launcher may show each process its own card only
        return int(current())
    if int(told) >= count:
        raise ConfigError(
            explain(
                "there are more processes than cards on this machine",
                where=f"LOCAL_RANK={told}, {count} cards",
                why="each process computes on a card of its own",
                instead=f"torchrun --nproc-per-node={count} ..., or {VARIABLE}=cpu",
            )
        )
    return int(told)


# --- the processes of a job -------------------------------------------------------------------------------------------


def backend() -> str:
    """Return the backend of `torch.distributed` for tensors on the CPU and on the default device."""
    kind = default_device().type
    return f"cpu:gloo,{kind}:{_COLLECTIVES[kind]}" if kind in _COLLECTIVES else "gloo"


def of_backend(name: str) -> torch.device | None:
    """Return where this process's tensors have to live for a backend to send them: its card under NCCL or XCCL, the CPU
    under gloo alone; None where the backend is none of these."""
    for kind, collectives in _COLLECTIVES.items():
        if collectives in name:
            return _numbered(torch.device(kind))
    return torch.device("cpu") if "gloo" in name else None


def select(device: torch.device | None) -> None:
    """Make a card the current one of this process, so that what names none uses it."""
    if device is not None and device.type in _NUMBERED and torch.get_device_module(device).is_available():
        torch.get_device_module(device).set_device(device)


# --- values on a device -----------------------------------------------------------------------------------------------


def move(value: T, device: torch.device) -> T:
    """Return a tree whose tensors are on a device; those that are there already are the very same."""
    return tree.map(lambda leaf: leaf.to(device) if isinstance(leaf, torch.Tensor) else leaf, value)


def name_of(device: torch.device) -> str:
    """Return what a device is, as far as bits depend on it: "cpu", or the type and the name of the card.

    Examples:
        >>> name_of(torch.device("cpu"))
        'cpu'
    """
    if device.type in _NUMBERED and torch.get_device_module(device).is_available():
        return f"{device.type}, {torch.get_device_module(device).get_device_name(device)}"
    return device.type


def memory_of(device: torch.device) -> int | None:
    """Return the bytes of memory of a card, None where it does not say."""
    if device.type in _NUMBERED:
        with contextlib.suppress(RuntimeError, AssertionError):
            return int(torch.get_device_module(device).get_device_properties(device).total_memory)
    return None


def free_memory_of(device: torch.device) -> int | None:
    """Return how many bytes this process can allocate on an accelerator, None where it does not say."""
    if device.type in _NUMBERED:
        module = torch.get_device_module(device)
        free, _ = module.mem_get_info(device)
        return int(free + module.memory_reserved(device) - module.memory_allocated(device))
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory()
    return None
