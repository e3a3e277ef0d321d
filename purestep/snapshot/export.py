"""A snapshot as one file for other programs: `.safetensors`, or what `torch.load` reads without running code.

It needs neither the classes of the stored tree nor torch.distributed. The file appears complete or not at all.
"""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, Literal, get_args

import torch

from purestep.errors import ConfigError, SnapshotError, TreeError, explain, import_extra
from purestep.snapshot import durable_directories, orbax_io
from purestep.snapshot.codec import JSON, Leaf, from_text
from purestep.snapshot.listing import Index
from purestep.snapshot.manifest import Manifest, read_manifest
from purestep.snapshot.packing import materialize
from purestep.snapshot.reader import find, load
from purestep.snapshot.shards import full_box

Only = Literal["params", "model", "all"]
_FIELDS = {"params": ("params",), "model": ("params", "buffers")}
Named = dict[str, int]  # dotted name -> index of the leaf


def consolidate(root: Path, out: str | Path, *, step: int | None = None, only: Only = "params") -> Path:
    """Write the leaves of a snapshot under their dotted names. See `purestep.snapshot.consolidate`."""
    if only not in get_args(Only):
        raise ConfigError(explain("only= is 'params', 'model' or 'all'", where=f"only={only!r}"))
    target = _checked(out)
    index = Index(root)
    if step is None:
        steps = index.steps()
        if not steps:
            raise SnapshotError(explain("there is no snapshot", where=str(root), instead="save one first"))
        step = steps[-1]
    directory = find(index, step).path
    manifest = read_manifest(directory)
    names = _selected(manifest, only)
    # Tied leaves are read once, from the leaf that has the bytes, and written under both names.
    first = {name: _first(manifest, i) for name, i in names.items()}
    requested = {i: {full_box(manifest.leaves[i])} for i in first.values() if manifest.leaves[i].has_bytes}
    contents = load(directory, manifest, requested, orbax_io.read_arrays, verify=True)

    def value(index: int) -> Any:
        leaf = manifest.leaves[index]
        if leaf.text is not None:
            return _plain(leaf)
        return _as_tensor(leaf, materialize(leaf, contents[index, full_box(leaf)]))

    values = {name: value(i) for name, i in first.items()}
    metadata = {"format": "pt", "step": str(manifest.step), "digest": manifest.digest, "written_by": "purestep"}
    _write(target, values, metadata)
    return target


def write_file(out: str | Path, values: dict[str, Any], metadata: dict[str, str]) -> Path:
    """Write named tensors and plain values as one file, complete or not at all, and return its absolute path.

    Args:
        out: ends in `.safetensors`, `.pt` or `.pth`, which says what kind of file is written.
        values: by name.
        metadata: texts, of which only a `.safetensors` has a place.

    Raises:
        ConfigError: another suffix.
    """
    target = _checked(out)
    _write(target, values, metadata)
    return target


def _checked(given: str | Path) -> Path:
    out = Path(given)
    if out.suffix not in (".safetensors", ".pt", ".pth"):
        what = "the suffix says what kind of file is written"
        raise ConfigError(explain(what, where=f"path: {out}", instead="'model.safetensors', or .pt for torch.load"))
    return out.absolute()


def _first(manifest: Manifest, index: int) -> int:
    alias = manifest.leaves[index].alias
    return index if alias is None else alias


# --- names ------------------------------------------------------------------------------------------------------------


def _selected(manifest: Manifest, only: Only) -> Named:
    """Return the leaves to write by name: a model's are named as in its `state_dict`."""
    if only == "all":
        return dict(_walk(manifest.structure, ()))
    states = [(path, node) for path, node in _nodes(manifest.structure, ()) if _is_state(node)]
    if not states:
        what = f"the snapshot holds no state with {only}, as `ps.init` makes them"
        raise TreeError(explain(what, where=f"step {manifest.step}", instead='only="all"'))
    named: Named = {}
    for path, node in states:
        prefix = path if len(states) > 1 else ()  # a GAN has two models; one needs no prefix
        children = dict(_children(node))
        for field in _FIELDS[only]:
            named |= dict(_walk(children.get(field), prefix))
    return named


def _is_state(node: JSON) -> bool:
    return isinstance(node, dict) and {"params", "buffers", "opt_state"} <= set(node.get("fields", ()))


def _children(node: JSON) -> list[tuple[str, JSON]]:
    names = node.get("keys") or node.get("fields") or range(len(node["items"]))
    return [(str(name), item) for name, item in zip(names, node["items"], strict=True)]


def _nodes(node: JSON, path: tuple[str, ...]) -> list[tuple[tuple[str, ...], JSON]]:
    if not isinstance(node, dict):
        return []
    below = [] if _is_state(node) else _children(node)  # master weights inside of a state are no model of their own
    return [(path, node)] + [found for name, item in below for found in _nodes(item, (*path, name))]


def _walk(node: JSON, path: tuple[str, ...]) -> list[tuple[str, int]]:
    if isinstance(node, int):
        return [(".".join(path), node)]
    if node is None:
        return []
    return [found for name, item in _children(node) for found in _walk(item, (*path, name))]


# --- writing ----------------------------------------------------------------------------------------------------------


def _plain(leaf: Leaf) -> bool | int | float | str:
    """Return a Python leaf as a value that every reader supports: long integers, complex numbers and bytes as text."""
    text = leaf.text or ""
    value: Any = from_text(leaf.kind, text)
    if leaf.kind in ("complex", "bytes") or (leaf.kind == "int" and value.bit_length() > 63):
        return text
    return value


def _as_tensor(leaf: Leaf, value: Any) -> torch.Tensor:
    if leaf.kind == "tensor":
        tensor: torch.Tensor = value
        return tensor
    return torch.as_tensor(value.astype(value.dtype.newbyteorder("=")))


def _write(target: Path, values: dict[str, Any], metadata: dict[str, str]) -> None:
    durable_directories.make_root(target.parent)
    unfinished = target.with_name(f".{target.name}.{durable_directories.unique()}")
    try:
        if target.suffix == ".safetensors":
            _save_safetensors(unfinished, values, metadata)
        else:
            torch.save(values, unfinished)
        # Content before name, as in a commit of a snapshot: a reader finds the complete file or none.
        durable_directories.fsync(unfinished)
        os.rename(unfinished, target)
    except BaseException:
        unfinished.unlink(missing_ok=True)
        raise
    durable_directories.fsync(target.parent)


def _save_safetensors(path: Path, values: dict[str, Any], metadata: dict[str, str]) -> None:
    module = import_extra("safetensors.torch", extra="export", needed_by="snapshot.consolidate(..., 'x.safetensors')")
    tensors: dict[str, torch.Tensor] = {}
    written: set[int] = set()
    for name, value in values.items():
        if isinstance(value, torch.Tensor):  # the format refuses tied tensors, so they are written twice
            tensors[name] = value.clone() if value.data_ptr() in written else value
            written.add(value.data_ptr())
        else:
            metadata[f"value:{name}"] = json.dumps(value)
    try:
        module.save_file(tensors, str(path), metadata=metadata)
    except (KeyError, ValueError, TypeError) as error:
        dtypes = ", ".join(sorted({str(value.dtype) for value in tensors.values()}))
        what, instead = "safetensors cannot hold these leaves", "consolidate(..., 'model.pt')"
        raise SnapshotError(explain(what, where=dtypes, why=str(error), instead=instead)) from error
