"""Reading and writing distributed checkpoints, and the private names of torch that it takes.

`torch.distributed.checkpoint` reads the metadata of a checkpoint with plain pickle, which can run code. The unpickler
here allows only the classes of such metadata. If torch adds a class, add its name to `_SAFE`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import pickle
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purestep.sharding.spec import Box

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

    metadata = _metadata(directory)
    tensors = {Key(k): v for k, v in metadata.state_dict_metadata.items() if isinstance(v, TensorStorageMetadata)}
    planned = metadata.planner_data or {}
    paths = {key: tuple(str(p) for p in planned.get(key, (key,))) for key in tensors}
    return DcpMetadata(paths, {key: (v.size, v.properties.dtype) for key, v in tensors.items()})


def read_dcp_part(directory: Path, key: Key, dtype: torch.dtype, box: Box) -> Tensor:
    """Read the part at `(offset, shape)` of a tensor in this process alone; no process group is needed."""
    from torch.distributed.checkpoint import DefaultLoadPlanner, FileSystemReader
    from torch.distributed.checkpoint.metadata import ChunkStorageMetadata
    from torch.distributed.checkpoint.planner import LoadPlan
    from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list
    from torch.distributed.checkpoint.state_dict_loader import load

    class Reader(FileSystemReader):
        """Reads the metadata as `read_dcp_metadata` does, without running code."""

        def read_metadata(self, *args: Any, **kwargs: Any) -> Any:
            return _metadata(directory)

    class PartPlanner(DefaultLoadPlanner):
        """Asks for one part of one tensor."""

        def create_local_plan(self) -> LoadPlan:
            described = self.metadata.state_dict_metadata[str(key)]  # type: ignore[union-attr]
            chunk = ChunkStorageMetadata(torch.Size(box[0]), torch.Size(box[1]))
            return LoadPlan(create_read_items_for_chunk_list(str(key), described, [chunk]))  # type: ignore[arg-type]

        def lookup_tensor(self, index: Any) -> Tensor:
            return part

    part = torch.empty(box[1], dtype=dtype)
    with _alone():
        load({str(key): part}, storage_reader=Reader(str(directory)), planner=PartPlanner(False), no_dist=True)
    return part


def write_dcp(directory: Path, content: dict[str, Any], *, alone: bool) -> None:
    """Write a distributed checkpoint: each rank its parts, or this process alone."""
    from torch.distributed.checkpoint import save

    with _alone() if alone else contextlib.nullcontext():
        save(content, checkpoint_id=directory, no_dist=alone)


@contextlib.contextmanager
def _alone() -> Iterator[None]:
    # torch warns that it takes one process to be meant, which `no_dist=True` has said.
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled, unavailable or uninitialized")
        yield


def _metadata(directory: Path) -> Any:
    with (directory / ".metadata").open("rb") as file:
        return _Unpickler(file).load()
