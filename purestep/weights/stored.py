"""`Stored`: a tensor in a file, of which any part can be read without the rest.

Each kind of file has its own class. Only what is asked for is read, so a rank of many can read its part of a model that
fits no single process.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor

from purestep.errors import import_extra
from purestep.sharding.messages import slice_of
from purestep.sharding.placement import is_split, rewrap, shard_of
from purestep.sharding.spec import Box


class Stored(Protocol):
    """A tensor that is read when it is asked for.

    Attributes:
        shape: of the full tensor.
        dtype: as it is stored.
    """

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> torch.dtype: ...

    def part(self, box: Box) -> Tensor:
        """Return the part at `(offset, shape)`, on the CPU. It may share memory with the file: copy it to keep it."""
        ...


def whole(stored: Stored) -> Tensor:
    """Return the full tensor; it may share memory with the file."""
    return stored.part(((0,) * len(stored.shape), tuple(stored.shape)))


def leaf_like(old: Tensor, value: Stored) -> Tensor:
    """Return a value with the dtype and device of a leaf of the state; for a split leaf, this rank's shard."""
    # A part of a file may be a window on memory that is not its own.
    part = value.part(shard_of(old)).to(old.device, old.dtype, copy=True).contiguous()
    return rewrap(part, old) if is_split(old) else part


def described(stored: Stored) -> str:
    """Return dtype and shape as `tree.describe` shows those of a tensor."""
    return f"{str(stored.dtype).removeprefix('torch.')}{list(stored.shape)}"


@dataclasses.dataclass(frozen=True, eq=False)
class InMemory:
    """A tensor that exists already: of a module, or of a file that `torch.load` has mapped into memory."""

    tensor: Tensor

    @property
    def shape(self) -> tuple[int, ...]:
        return tuple(self.tensor.shape)

    @property
    def dtype(self) -> torch.dtype:
        return self.tensor.dtype

    def part(self, box: Box) -> Tensor:
        return slice_of(self.tensor.detach(), box)


@dataclasses.dataclass(frozen=True, eq=False)
class OnDemand:
    """A tensor of a file that a function reads in parts."""

    shape: tuple[int, ...]
    dtype: torch.dtype
    read: Callable[[Box], Tensor]

    def part(self, box: Box) -> Tensor:
        return self.read(box)


# --- safetensors ------------------------------------------------------------------------------------------------------

# The format's names of dtypes: https://github.com/huggingface/safetensors#format
_DTYPES = {
    "BOOL": "bool",
    "U8": "uint8",
    "I8": "int8",
    "U16": "uint16",
    "I16": "int16",
    "U32": "uint32",
    "I32": "int32",
    "U64": "uint64",
    "I64": "int64",
    "F16": "float16",
    "BF16": "bfloat16",
    "F32": "float32",
    "F64": "float64",
    "C64": "complex64",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
    "F8_E8M0": "float8_e8m0fnu",
}


class Safetensors:
    """The tensors of safetensors files, of which one at a time is mapped into memory.

    Shards are mapped in turns because the address space of a process may be limited to less than a model.
    """

    def __init__(self) -> None:
        self._open: tuple[Path, Any] | None = None

    def contents(self, path: Path) -> dict[str, Stored]:
        """Return what a file holds, by name."""
        file = self._file(path)
        return {name: self._stored(path, name, file.get_slice(name)) for name in file.keys()}  # noqa: SIM118

    def _file(self, path: Path) -> Any:
        if self._open is None or self._open[0] != path:
            module = import_extra("safetensors", extra="export", needed_by=f"reading {path.name}")
            self._open = None  # unmapped before the next is mapped
            self._open = (path, module.safe_open(str(path), framework="pt", device="cpu"))
        return self._open[1]

    def _stored(self, path: Path, name: str, found: Any) -> Stored:
        kind = found.get_dtype()
        if kind not in _DTYPES:
            raise ValueError(f"{name!r} has the dtype {kind}, which torch does not have")

        def read(box: Box) -> Tensor:
            ranges = tuple(slice(start, start + length) for start, length in zip(*box, strict=True))
            part: Tensor = self._file(path).get_slice(name)[ranges or ...]
            return part

        return OnDemand(tuple(found.get_shape()), getattr(torch, _DTYPES[kind]), read)


def read_metadata(path: Path) -> dict[str, str]:
    """Return the texts in the header of a file of safetensors; none of a file of another kind."""
    if path.suffix != ".safetensors":
        return {}
    module = import_extra("safetensors", extra="export", needed_by=f"reading {path.name}")
    with module.safe_open(str(path), framework="pt", device="cpu") as file:
        return dict(file.metadata() or {})
