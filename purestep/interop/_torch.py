"""Private names of torch that reading a distributed checkpoint needs.

`torch.distributed.checkpoint` reads the metadata of a checkpoint with plain pickle, which can run code. The unpickler
here allows only the classes of such metadata. If torch adds a class, add its name to `_SAFE`.
"""

from __future__ import annotations

import dataclasses
import pickle
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

# Classes in the modules of torch.distributed.checkpoint.
_SAFE = set(
    "Metadata TensorStorageMetadata TensorProperties ChunkStorageMetadata BytesStorageMetadata MetadataIndex "
    "StorageMeta _StorageInfo _MEM_FORMAT_ENCODING".split()
)
_SAFE_NAMES = {
    ("torch", "Size"),
    ("torch.serialization", "_get_layout"),
    ("collections", "OrderedDict"),
    ("collections", "defaultdict"),
    ("builtins", "set"),
    ("builtins", "slice"),
    ("pathlib", "PosixPath"),
    ("pathlib", "PurePosixPath"),
    ("pathlib._local", "PosixPath"),
}


class Key(str):
    """The name of a tensor in a distributed checkpoint; a placeholder until the tensor is read."""


@dataclasses.dataclass(frozen=True)
class DcpMetadata:
    """The description of a distributed checkpoint.

    Attributes:
        paths: path of each tensor in the saved tree, by key.
        shapes: shape and dtype by key.
    """

    paths: dict[Key, tuple[str, ...]]
    shapes: dict[Key, tuple[torch.Size, torch.dtype]]


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        checkpoint = module.startswith("torch.distributed.checkpoint.") and name in _SAFE
        dtype = module == "torch" and isinstance(getattr(torch, name, None), torch.dtype)
        if checkpoint or dtype or (module, name) in _SAFE_NAMES:
            return super().find_class(module, name)
        raise pickle.UnpicklingError(f"Unsupported global {module}.{name}")


def read_dcp_metadata(directory: Path) -> DcpMetadata:
    """Read the metadata of a checkpoint that `torch.distributed.checkpoint.save` wrote."""
    from torch.distributed.checkpoint.metadata import TensorStorageMetadata

    with (directory / ".metadata").open("rb") as file:
        metadata = _Unpickler(file).load()
    tensors = {Key(k): v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    planned = metadata.planner_data or {}
    paths = {key: tuple(str(p) for p in planned.get(key, (key,))) for key in tensors}
    return DcpMetadata(paths, {key: (v.size, v.properties.dtype) for key, v in tensors.items()})


def read_dcp_tensors(directory: Path, described: DcpMetadata, keys: set[Key]) -> dict[Key, Tensor]:
    """Read full tensors of a distributed checkpoint in this process alone; no process group is needed."""
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        """Reads the metadata as `read_dcp_metadata` does, without running code."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            with (directory / ".metadata").open("rb") as file:
                return _Unpickler(file).load()

    values: dict[str, Any] = {}
    for key in keys:
        shape, dtype = described.shapes[key]
        values[str(key)] = torch.empty(shape, dtype=dtype)
    # The names are flat already, so the planner must not flatten them again.
    planner = DefaultLoadPlanner(flatten_state_dict=False)
    load(values, storage_reader=Reader(str(directory)), planner=planner, no_dist=True)
    return {key: values[key] for key in keys}
