"""Reading named tensors from files of other programs: safetensors, `torch.save`, Lightning,
torch.distributed.checkpoint.

Owns `read_weights`, and `stored_weights`, which reads what it is asked for. No code in a file is run: files of
`torch.save` are read with `weights_only=True`, and the pickled metadata of a distributed checkpoint by an unpickler
that allows only its classes.
"""

from __future__ import annotations

import contextlib
import functools
import json
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purestep.arguments import Location, Name, checked
from purestep.errors import ConfigError, MissingExtra, SnapshotError, explain
from purestep.sharding.spec import Box
from purestep.weights import _torch
from purestep.weights.stored import InMemory, OnDemand, Safetensors, Stored, whole

Named = dict[str, Stored]
# Usual names of the entry with the weights, in the order of search: Lightning's, torch's tutorials', others.
_ENTRIES = ("state_dict", "model_state_dict", "model", "module", "weights", "params")
_INDICES = ("model.safetensors.index.json", "pytorch_model.bin.index.json")
_SINGLES = ("model.safetensors", "pytorch_model.bin")


@checked(ConfigError)
def read_weights(path: Location, *, entry: Name | None = None) -> dict[str, Tensor]:
    """Read the named tensors of a file or directory that another program wrote.

    Args:
        path: one of
            `x.safetensors`;
            `x.safetensors.index.json`, or `.bin.index.json`, the index of a model in several files;
            a directory of a Hugging Face model, with `model.safetensors`, `pytorch_model.bin` or such an index;
            `.pt`, `.pth`, `.bin`, `.ckpt`: files of `torch.save`, also Lightning's, read with `weights_only=True`;
            a directory of `torch.distributed.checkpoint`, which one process reads.
        entry: name of the entry that holds the weights, with dots for nested entries. By default the whole file if it
            is a dict of tensors, else the first of `state_dict`, `model_state_dict`, `model`, `module`, `weights` and
            `params` that the file has.

    Returns:
        Tensors on the CPU by name. Tensors of `.pt` files may be memory-mapped: copy them before deleting the file.

    Raises:
        ConfigError: the file does not exist, has an unknown format, or has no such entry.
        SnapshotError: the file is damaged, or holds objects that `weights_only=True` refuses.

    Examples:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     torch.save({"epoch": 3, "state_dict": {"w": torch.ones(2)}}, f"{directory}/last.ckpt")
        ...     read_weights(f"{directory}/last.ckpt")
        {'w': tensor([1., 1.])}
    """
    return {name: whole(tensor) for name, tensor in stored_weights(path, entry=entry).items()}


def stored_weights(path: str | Path, *, entry: str | None = None) -> Named:
    """Return what `read_weights` reads as tensors that are read when they are asked for, and in parts."""
    found = Path(path)
    if not found.exists():
        raise ConfigError(explain("there is no such file of weights", where=f"path: {found}"))
    return _of_directory(found, entry) if found.is_dir() else _of_file(found, entry)


def _of_directory(directory: Path, entry: str | None) -> Named:
    if (directory / ".metadata").is_file():
        return _distributed(directory, entry)
    for name in (*_INDICES, *_SINGLES):
        if (directory / name).is_file():
            return _of_file(directory / name, entry)
    raise ConfigError(
        explain(
            "the directory holds no weights of a kind that is known",
            where=f"{directory}: {', '.join(sorted(p.name for p in directory.iterdir())[:8]) or 'empty'}",
            instead=f"a directory with one of {', '.join((*_INDICES, *_SINGLES))}, or .metadata of a distributed "
            "checkpoint\nps.restore(run_dir, state)   # for a run of purestep",
        )
    )


def _of_file(path: Path, entry: str | None) -> Named:
    if path.name.endswith(".index.json"):
        return _sharded(path, entry)
    if path.suffix == ".safetensors":
        return _chosen(path, _safetensors(path, Safetensors()), entry)
    if path.suffix in (".pt", ".pth", ".bin", ".ckpt"):
        return {name: InMemory(tensor) for name, tensor in _chosen(path, _pickled(path), entry).items()}
    raise ConfigError(
        explain(
            "the suffix says what kind of file is read",
            where=str(path),
            instead=".safetensors, .safetensors.index.json, .pt, .pth, .bin or .ckpt",
        )
    )


def _safetensors(path: Path, files: Safetensors) -> Named:
    with _reading(path):
        return {n: OnDemand(t.shape, t.dtype, _guarded(path, t.part)) for n, t in files.contents(path).items()}


def _guarded(path: Path, read: Callable[[Box], Tensor]) -> Callable[[Box], Tensor]:
    def part(box: Box) -> Tensor:
        with _reading(path):
            return read(box)

    return part


def _pickled(path: Path) -> Any:
    with _reading(
        path, "with torch.serialization.safe_globals([TheClass]):   # if you trust who wrote the file\n    ..."
    ):
        # Only the zip format of torch 1.6 and later can be memory-mapped; older files are read into memory.
        return torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))


def _sharded(index: Path, entry: str | None) -> Named:
    with _reading(index):
        weight_map = json.loads(index.read_text())["weight_map"]
        files = {name: index.parent / file for name, file in weight_map.items()}
    shards = Safetensors()
    read = {f: _of_shard(f, shards, entry) for f in dict.fromkeys(files.values()) if f.is_file()}
    lost = sorted(name for name, file in files.items() if name not in read.get(file, {}))
    if lost:
        raise SnapshotError(
            explain(
                "an index names tensors that its files do not have",
                where=f"{index}: {', '.join(f'{n!r} in {files[n].name}' for n in lost[:8])}; {len(lost)} in all",
            )
        )
    return {name: read[file][name] for name, file in files.items()}


def _of_shard(path: Path, shards: Safetensors, entry: str | None) -> Named:
    if path.suffix == ".safetensors":
        return _chosen(path, _safetensors(path, shards), entry)
    return _of_file(path, entry)


def _distributed(directory: Path, entry: str | None) -> Named:
    with _reading(directory):
        described = _torch.read_dcp_metadata(directory)
    # Nested names have dots. An entry that is no tensor (a step, a learning rate) has no shape and is not read.
    nested = _nested({path: key for key, path in described.paths.items()})

    def stored(key: _torch.Key) -> Stored:
        shape, dtype = described.shapes[key]
        read = functools.partial(_torch.read_dcp_part, directory, key, dtype)
        return OnDemand(tuple(shape), dtype, _guarded(directory, read))

    return {name: stored(key) for name, key in _chosen(directory, nested, entry).items()}


def _nested(flat: Mapping[tuple[str, ...], str]) -> Any:
    nested: dict[str, Any] = {}
    for path, key in flat.items():
        here = nested
        for part in path[:-1]:
            here = here.setdefault(part, {})
        here[path[-1]] = key
    return nested


@contextlib.contextmanager
def _reading(path: Path, instead: str | None = None) -> Any:
    try:
        yield
    except (SnapshotError, MissingExtra):
        raise
    except Exception as error:  # each format has its own errors for damaged files
        why = f"{type(error).__name__}: {error}".split("\n")[0][:300]
        what = "the weights cannot be read"
        refused = "weights_only" in str(error).lower() or "Unsupported global" in str(error)
        raise SnapshotError(
            explain(
                what, where=str(path), why=_refusal(error) if refused else why, instead=instead if refused else None
            )
        ) from error


def _refusal(error: Exception) -> str:
    line = next((line for line in str(error).splitlines() if "GLOBAL" in line or "global" in line), str(error))
    return f"it holds objects of other classes than tensors and plain values: {line.strip()[:200]}"


# --- which part of a checkpoint ---------------------------------------------------------------------------------------


def _chosen(path: Path, content: Any, entry: str | None) -> Any:
    """Return the mapping of names to tensors in a checkpoint; in a distributed one, to keys of tensors."""
    if entry is not None:
        return _flat(path, _at(path, content, entry), f"entry {entry!r}")
    if not isinstance(content, Mapping):
        raise _no_weights(path, content)
    if any(_is_weight(value) for value in content.values()):
        return _flat(path, content, "the file")
    for name in _ENTRIES:
        if isinstance(content.get(name), Mapping) and _has_weights(content[name]):
            return _flat(path, content[name], f"entry {name!r}")
    raise _no_weights(path, content)


def _at(path: Path, content: Any, entry: str) -> Any:
    for part in [entry] if isinstance(content, Mapping) and entry in content else entry.split("."):
        if not isinstance(content, Mapping) or part not in content:
            there = ", ".join(map(str, content)) if isinstance(content, Mapping) else type(content).__name__
            raise ConfigError(explain(f"the checkpoint has no entry {entry!r}", where=f"{path}: {there[:300]}"))
        content = content[part]
    return content


def _is_weight(value: object) -> bool:
    return isinstance(value, (Tensor, OnDemand, _torch.Key))


def _has_weights(value: Any) -> bool:
    return any(_is_weight(v) or (isinstance(v, Mapping) and _has_weights(v)) for v in value.values())


def _flat(path: Path, content: Any, what: str) -> dict[str, Any]:
    """Return the tensors below an entry, with nested names joined by dots; other values are left out."""
    if not isinstance(content, Mapping):
        raise _no_weights(path, content)
    flat: dict[str, Any] = {}

    def walk(node: Mapping[Any, Any], prefix: str) -> None:
        for name, value in node.items():
            if isinstance(value, Mapping):
                walk(value, f"{prefix}{name}.")
            elif _is_weight(value):
                flat[f"{prefix}{name}"] = value

    walk(content, "")
    if not flat:
        raise ConfigError(explain(f"{what} holds no tensors", where=f"{path}: {', '.join(map(str, content))[:300]}"))
    return flat


def _no_weights(path: Path, content: object) -> ConfigError:
    if not isinstance(content, Mapping):
        why = "a module that was pickled as a whole is code" if isinstance(content, torch.nn.Module) else None
        where = f"{path}: {type(content).__name__}"
        return ConfigError(
            explain(
                "the file is no dict of tensors", where=where, why=why, instead="torch.save(model.state_dict(), path)"
            )
        )
    inner = [str(k) for k, v in content.items() if isinstance(v, Mapping) and _has_weights(v)]
    return ConfigError(
        explain(
            "the checkpoint does not say which of its entries are the weights",
            where=f"{path}: {', '.join(map(str, content))[:300]}",
            instead=f"entry={inner[0]!r}" if inner else None,
        )
    )
