"""Predictions on disk: files of several batches each, and for each rank a JSON file that lists the complete ones.

`predict(..., to=)` writes with `Writer`; `load_predictions` merges the files of all ranks in the order of the samples.
Nothing here depends on a model.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import Location, checked
from purestep.errors import ConfigError, SnapshotError, explain, import_extra
from purestep.snapshot import durable_directories
from purestep.tree import pytree
from purestep.views import Block, Note, Printed

Format = Literal["safetensors", "npy", "parquet"]
_INDEX = "index"
_ONLY = "output"  # the name of an output that is one tensor


@pytree
class Predictions(Printed):
    """Outputs of a model for n samples.

    Attributes:
        indices: int64[n], indices of the samples.
        outputs: a tensor [n, ...], or a pytree of them.
    """

    indices: Tensor
    outputs: Any

    def view(self) -> list[Block]:
        """Return the blocks that show it: each tensor with its dtype and shape, and how many samples there are."""
        from purestep.display import notebook

        samples = len(self.indices)
        said = f"predictions for {samples} {'sample' if samples == 1 else 'samples'}"
        return [Note(said), *notebook.show(self, root="predictions").view()]


def named(outputs: Any) -> dict[str, Tensor]:
    """Return the tensors of outputs by their dotted names; a single tensor is called "output".

    Raises:
        ConfigError: a name is "index", or cannot be part of a file name.
    """
    found = {name or _ONLY: leaf for name, leaf in zip(tree.names(outputs), tree.leaves(outputs), strict=True)}
    odd = [name for name in found if name == _INDEX or "/" in name or name.startswith(".")]
    if odd:
        raise ConfigError(
            explain(
                "an output needs another name to be written",
                where=", ".join(map(repr, odd)),
                why="'index' holds the indices of the samples, and a name is part of a file name",
                instead='return {"logits": logits}',
            )
        )
    return found


def check_format(format: object) -> None:
    """Refuse an unknown format.

    Raises:
        ConfigError: the format is unknown.
    """
    if not isinstance(format, str) or format not in get_args(Format):
        raise ConfigError(explain("format= is 'safetensors', 'npy' or 'parquet'", where=f"format={format!r}"[:200]))


class Writer:
    """The files of one rank.

    Args:
        directory: directory in which all ranks write.
        format: format of the files.
        batches_per_file: batches of each file but the last.
        place: rank, and number of ranks.
        of: JSON that identifies the predictions; a directory begun with another value is refused.

    Attributes:
        batches: number of this rank's batches in complete files.
        complete: whether all batches are written.

    Raises:
        ConfigError: the directory holds other predictions or other files.
    """

    def __init__(
        self, directory: Path, format: Format, batches_per_file: int, place: tuple[int, int], *, of: dict[str, Any]
    ) -> None:
        _import(format)
        self._directory, self._format, self._rank = directory, format, place[0]
        durable_directories.make_root(directory)
        self._note: dict[str, Any] = {
            "purestep": "predictions",
            "ranks": place[1],
            "format": format,
            "batches_per_file": batches_per_file,
            **json.loads(json.dumps(of)),
            "parts": [],
            "batches": 0,
            "tensors": None,
            "complete": False,
        }
        self._check_others(place[1])
        old = _read(self._note_path) if self._note_path.exists() else None
        if old is not None:
            fixed = [k for k in self._note if k not in ("parts", "batches", "tensors", "complete")]
            changed = [key for key in fixed if old.get(key) != self._note[key]]
            if changed:
                raise ConfigError(
                    explain(
                        "the directory holds predictions of something else",
                        where=f"{directory}: {', '.join(changed)} {'is' if len(changed) == 1 else 'are'} not the same",
                        why="files of both would be mixed up",
                        instead="another to=, or delete the directory",
                    )
                )
            self._note = old
        self._write_note()

    @property
    def batches(self) -> int:
        return int(self._note["batches"])

    @property
    def complete(self) -> bool:
        return bool(self._note["complete"])

    @property
    def _note_path(self) -> Path:
        return self._directory / f"rank-{self._rank:04d}.json"

    def _check_others(self, ranks: int) -> None:
        others = [p.name for p in sorted(self._directory.glob("rank-*.json")) if int(p.stem[5:]) >= ranks]
        strange = [
            p.name
            for p in sorted(self._directory.iterdir())
            if not p.name.startswith(("rank-", "part-")) and durable_directories.MARK not in p.name
        ]
        if others or strange:
            raise ConfigError(
                explain(
                    "the directory holds something else than predictions of this many ranks",
                    where=f"{self._directory}: {', '.join([*others, *strange][:5])}",
                    instead="another to=, or delete the directory",
                )
            )

    def add(self, predictions: Sequence[Predictions]) -> None:
        """Write the predictions of several batches as one file, durably, then list the file in the JSON file."""
        columns = [{_INDEX: p.indices, **named(p.outputs)} for p in predictions]
        tensors = {name: torch.cat([c[name] for c in columns]).contiguous() for name in columns[0]}
        shapes = {n: [str(x.dtype).removeprefix("torch."), *x.shape[1:]] for n, x in tensors.items()}
        if self._note["tensors"] not in (None, shapes):
            raise ConfigError(
                explain(
                    "outputs of two batches differ in shape or dtype",
                    where=f"{self._note['tensors']}, then {shapes}",
                    why="they become one array for each name",
                    instead="pad them to one shape",
                )
            )
        name = f"part-{self._rank:04d}-{len(self._note['parts']):06d}"
        path = _WRITE[self._format](self._directory, name, tensors)
        self._note["tensors"] = shapes
        self._note["parts"].append([path, len(tensors[_INDEX])])
        self._note["batches"] += len(predictions)
        self._write_note()

    def finish(self) -> None:
        """Record that all batches are written."""
        self._note["complete"] = True
        self._write_note()

    def _write_note(self) -> None:
        temporary = durable_directories.temporary_path(
            self._directory, self._note_path.name, durable_directories.unique()
        )
        temporary.write_text(json.dumps(self._note, indent=1))
        _commit(temporary, self._note_path)


@checked(ConfigError)
def load_predictions(directory: Location) -> Predictions:
    """Read the predictions of all ranks that `ps.predict(..., to=directory)` wrote, in the order of the samples.

    Args:
        directory: the directory given as `to=`.

    Returns:
        `Predictions` with increasing indices. The outputs are one tensor if the model returned one, else a dict of
        tensors by dotted names.

    Raises:
        SnapshotError: the directory has no predictions, a rank has not finished, or a file is missing.

    Examples:
        >>> import tempfile
        >>> import purestep as ps
        >>> state = ps.init(lambda: torch.nn.Linear(2, 3), ps.optim.sgd(0.1))
        >>> test = ps.data.batches({"x": torch.ones(5, 2)}, 2, shuffle=False, drop_last=False)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     found = load_predictions(ps.predict(state, lambda net, batch: net(batch["x"]), test, to=directory))
        >>> found.indices.tolist(), found.outputs.shape
        ([0, 1, 2, 3, 4], torch.Size([5, 3]))
    """
    root = Path(directory)
    notes = [_read(path) for path in sorted(root.glob("rank-*.json"))]
    if not notes:
        raise SnapshotError(
            explain("there are no predictions", where=str(root), instead=f"ps.predict(..., to={str(root)!r})")
        )
    missing = [rank for rank in range(notes[0]["ranks"]) if not (root / f"rank-{rank:04d}.json").exists()]
    unfinished = [str(rank) for rank, note in enumerate(notes) if not note["complete"]]
    if missing or unfinished:
        words = [f"rank {rank} wrote nothing" for rank in missing] + [f"rank {r} did not finish" for r in unfinished]
        raise SnapshotError(
            explain(
                "the predictions are not complete",
                where=f"{root}: {', '.join(words)}",
                instead="the same call of ps.predict again: it continues after the last whole file",
            )
        )
    parts: list[dict[str, Tensor]] = []
    for note in notes:
        for name, samples in note["parts"]:
            parts.append(_part(root / name, note))
            if len(parts[-1][_INDEX]) != samples:
                raise SnapshotError(
                    explain("a file of predictions has changed", where=f"{root / name}: {samples} samples were written")
                )
    if not parts:
        raise SnapshotError(explain("the predictions are of no samples", where=str(root)))
    whole = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    indices, order = whole.pop(_INDEX).sort()
    if (indices[1:] == indices[:-1]).any():
        raise SnapshotError(explain("a sample has two predictions", where=str(root)))
    outputs: Any = {name: column[order] for name, column in whole.items()}
    return Predictions(indices, outputs[_ONLY] if outputs.keys() == {_ONLY} else outputs)


def _part(path: Path, note: dict[str, Any]) -> dict[str, Tensor]:
    if not path.exists():
        raise SnapshotError(explain("a file of predictions is missing", where=str(path)))
    return _READ[note["format"]](path, note["tensors"])


def _read(path: Path) -> dict[str, Any]:
    try:
        note = json.loads(path.read_text())
        if note["purestep"] == "predictions":
            return dict(note)
    except (ValueError, KeyError, TypeError):
        pass
    raise SnapshotError(explain("a file of predictions does not make sense", where=str(path)))


def _commit(temporary: Path, target: Path) -> None:
    """Rename a file or directory to its final name, durably. An existing one is not listed, so it is replaced."""
    if temporary.is_dir():
        for path in temporary.iterdir():
            durable_directories.fsync(path)
        shutil.rmtree(target, ignore_errors=True)
    durable_directories.fsync(temporary)
    os.replace(temporary, target)
    durable_directories.fsync(target.parent)


# --- formats ----------------------------------------------------------------------------------------------------------


def _import(format: str) -> None:
    if format == "safetensors":
        import_extra("safetensors", extra="export", needed_by="predict(format='safetensors')")
    if format == "parquet":
        import_extra("pyarrow", extra="parquet", needed_by="predict(format='parquet')")


def _temporary(directory: Path, name: str) -> tuple[Path, Path]:
    return durable_directories.temporary_path(directory, name, durable_directories.unique()), directory / name


def _write_safetensors(directory: Path, name: str, tensors: dict[str, Tensor]) -> str:
    from safetensors.torch import save_file

    temporary, target = _temporary(directory, f"{name}.safetensors")
    save_file(tensors, temporary)
    _commit(temporary, target)
    return target.name


def _read_safetensors(path: Path, shapes: dict[str, Any]) -> dict[str, Tensor]:
    from safetensors.torch import load_file

    return dict(load_file(path))


def _array(name: str, tensor: Tensor) -> np.ndarray:
    try:
        return tensor.numpy()
    except TypeError as error:
        raise ConfigError(
            explain(
                f"numpy has no {str(tensor.dtype).removeprefix('torch.')}",
                where=f"output {name!r}: {tree.describe(tensor)}",
                instead="format='safetensors', or return x.float()",
            )
        ) from error


def _write_npy(directory: Path, name: str, tensors: dict[str, Tensor]) -> str:
    arrays = {key: _array(key, tensor) for key, tensor in tensors.items()}
    temporary, target = _temporary(directory, name)
    temporary.mkdir()
    for key, array in arrays.items():
        np.save(temporary / f"{key}.npy", array, allow_pickle=False)
    _commit(temporary, target)
    return target.name


def _read_npy(path: Path, shapes: dict[str, Any]) -> dict[str, Tensor]:
    return {name: torch.from_numpy(np.load(path / f"{name}.npy", allow_pickle=False)) for name in shapes}


def _write_parquet(directory: Path, name: str, tensors: dict[str, Tensor]) -> str:
    import pyarrow
    import pyarrow.parquet

    columns = {}
    for key, tensor in tensors.items():
        flat = pyarrow.array(_array(key, tensor).reshape(-1))
        # A tensor of several dims is a column of lists; the rank's JSON file has the shape.
        columns[key] = flat if tensor.ndim == 1 else pyarrow.FixedSizeListArray.from_arrays(flat, tensor[0].numel())
    temporary, target = _temporary(directory, f"{name}.parquet")
    pyarrow.parquet.write_table(pyarrow.table(columns), temporary)
    _commit(temporary, target)
    return target.name


def _read_parquet(path: Path, shapes: dict[str, Any]) -> dict[str, Tensor]:
    import pyarrow.parquet

    table, found = pyarrow.parquet.read_table(path), {}
    for name, (dtype, *shape) in shapes.items():
        column = table.column(name).combine_chunks()
        flat = column.flatten() if shape else column
        array = flat.to_numpy(zero_copy_only=False)
        found[name] = torch.from_numpy(array.copy()).to(getattr(torch, dtype)).reshape(len(table), *shape)
    return found


_WRITE = {"safetensors": _write_safetensors, "npy": _write_npy, "parquet": _write_parquet}
_READ = {"safetensors": _read_safetensors, "npy": _read_npy, "parquet": _read_parquet}
