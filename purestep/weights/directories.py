"""A directory of weights as Hugging Face's libraries read them: shards of safetensors, and the index that names them.

The ranks of a job write it together. Each tensor is gathered once, and each rank keeps the tensors of one shard at a
time, so none holds the full model.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import torch
import torch.distributed as dist
from torch import Tensor

from purestep.distributed import collectives
from purestep.distributed.mesh import this_rank
from purestep.errors import ConfigError, SnapshotError, explain
from purestep.sharding.placement import full, is_split, part_of
from purestep.snapshot import durable_directories, export

INDEX, SINGLE = "model.safetensors.index.json", "model.safetensors"


def write_directory(directory: Path, tensors: Mapping[str, Tensor], shard_bytes: int) -> Path:
    """Write named tensors as shards of safetensors with an index, or as one file where one shard is enough.

    The index, or the one file, appears last: a reader finds all of the weights or none.

    Args:
        directory: made if it is missing. It may hold other files (`config.json`), but no weights.
        tensors: by name; where some are split over processes every process calls this, else rank 0 writes.
        shard_bytes: a shard is not larger, unless one tensor is.

    Returns:
        The absolute path of the directory.

    Raises:
        ConfigError: the directory holds weights already.
        SnapshotError: another process could not write its shards.
    """
    directory = directory.absolute()
    split = [tensor for tensor in tensors.values() if is_split(tensor)]
    if not split and this_rank() != 0:
        return directory
    group = dist.group.WORLD if split else None
    device = part_of(split[0]).device if split else torch.device("cpu")
    _agree(lambda: _prepare(directory), group, device)
    shards = _shards(tensors, shard_bytes)
    failure: list[Exception] = []
    for first in range(0, len(shards), collectives.size_of(group)):
        _write_round(directory, shards[first : first + collectives.size_of(group)], tensors, group, failure)
    _agree(lambda: _raise_first(failure), group, device)
    _agree(lambda: _write_index(directory, shards, tensors, group), group, device)
    return directory


@dataclasses.dataclass(frozen=True)
class Shard:
    """A file of the directory, and the names of its tensors."""

    file: str
    names: tuple[str, ...]


def _shards(tensors: Mapping[str, Tensor], shard_bytes: int) -> list[Shard]:
    groups: list[list[str]] = [[]]
    size = 0
    for name, tensor in tensors.items():
        if groups[-1] and size + _bytes(tensor) > shard_bytes:
            groups.append([])
            size = 0
        groups[-1].append(name)
        size += _bytes(tensor)
    if len(groups) == 1:
        return [Shard(SINGLE, tuple(groups[0]))]
    return [Shard(f"model-{i:05}-of-{len(groups):05}.safetensors", tuple(g)) for i, g in enumerate(groups, 1)]


def _bytes(tensor: Tensor) -> int:
    return tensor.shape.numel() * tensor.dtype.itemsize


def _write_round(
    directory: Path,
    shards: Sequence[Shard],
    tensors: Mapping[str, Tensor],
    group: dist.ProcessGroup | None,
    failure: list[Exception],
) -> None:
    """Write a shard on each rank; all ranks take part in the gathers of all."""
    for owner, shard in enumerate(shards):
        mine = owner == collectives.rank_in(group)
        kept: dict[str, Tensor] = {}
        for name in shard.names:
            value = full(tensors[name]) if is_split(tensors[name]) else tensors[name]
            if mine:
                kept[name] = value.detach().cpu().contiguous()
            del value
        if mine and not failure:
            try:
                export.write_file(directory / shard.file, kept, {"format": "pt", "written_by": "purestep"})
            except Exception as error:  # the others wait in the next gather; they are told at the end
                failure.append(error)


def _prepare(directory: Path) -> None:
    durable_directories.make_root(directory)
    there = [name for name in (INDEX, SINGLE) if (directory / name).exists()]
    if there:
        raise ConfigError(
            explain(
                "the directory holds weights already",
                where=f"{directory}: {there[0]}",
                why="a reader would find shards of both models while they are written",
                instead="a new directory, or delete the old weights first",
            )
        )


def _write_index(
    directory: Path, shards: Sequence[Shard], tensors: Mapping[str, Tensor], group: dist.ProcessGroup | None
) -> None:
    if len(shards) == 1 or collectives.rank_in(group) != 0:
        return
    index = {
        "metadata": {"total_size": sum(map(_bytes, tensors.values()))},
        "weight_map": {name: shard.file for shard in shards for name in shard.names},
    }
    unfinished = directory / f".{INDEX}.{durable_directories.unique()}"
    unfinished.write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
    durable_directories.fsync(unfinished)
    os.rename(unfinished, directory / INDEX)
    durable_directories.fsync(directory)


def _raise_first(failure: list[Exception]) -> None:
    if failure:
        raise failure[0]


def _agree(act: Callable[[], None], group: dist.ProcessGroup | None, device: torch.device) -> None:
    """Do something on each rank; if it fails on one, it fails on all."""
    error: Exception | None = None
    try:
        act()
    except Exception as caught:  # told to the others first
        error = caught
    failed = collectives.numbers(int(error is not None), group, device)
    if error is not None:
        raise error
    if any(failed):
        raise SnapshotError(
            explain("another process could not write its part of the weights", where=f"rank {failed.index(1)}")
        )
