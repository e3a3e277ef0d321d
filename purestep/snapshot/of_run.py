"""The snapshots of a run, by its directory: what users call without a `Store`."""

from __future__ import annotations

from pathlib import Path

from purestep import _cells
from purestep.arguments import Location, checked
from purestep.errors import SnapshotError
from purestep.snapshot.export import Only
from purestep.snapshot.export import consolidate as _consolidate
from purestep.snapshot.listing import root_of
from purestep.snapshot.manifest import Manifest
from purestep.snapshot.store import Store


@checked(SnapshotError)
def steps(run_dir: Location) -> list[int]:
    """Return the steps of the snapshots of a run, in order."""
    return Store(root_of(run_dir)).steps()


@checked(SnapshotError)
def manifest(run_dir: Location, step: int) -> Manifest:
    """Return all that a snapshot of a run says about itself, without reading arrays.

    Raises:
        CorruptSnapshot: a file of it is missing or is not what was written.
        SnapshotError: there is no snapshot of that step.
    """
    return Store(root_of(run_dir)).read_manifest(step)


@checked(SnapshotError, failed=True)
def consolidate(run_dir: Location, out: Location, *, step: int | None = None, only: Only = "params") -> Path:
    """Write a snapshot of any number of ranks to one file that other programs read.

    Names are dotted: those of the model's `state_dict` for "params" and "model", paths in the stored tree for "all". A
    tree with several train states prefixes each name with the path of its state. Everything is verified.

    Args:
        run_dir: the directory of a run, or of its snapshots.
        out: the file: `.safetensors` (needs `pip install "purestep[export]"`), `.pt` or `.pth` for `torch.load`.
        step: which snapshot; the newest by default.
        only: "params"; "model" for params and buffers; "all" for every leaf of the stored tree. Numbers and strings are
            values for `torch.load` (complex numbers, bytes and integers above 63 bits: text), and JSON under
            `value:<name>` in the metadata of safetensors.

    Returns:
        The path of the file, which is complete, or not there.

    Raises:
        ConfigError: `only` or the suffix of `out` is unknown.
        CorruptSnapshot: stored bytes are missing or changed.
        MissingExtra: safetensors is not installed.
        SnapshotError: there is no snapshot, or safetensors has no name for a dtype.
        TreeError: the snapshot holds no train state.

    Examples:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as run_dir:
        ...     with Store(run_dir) as store:
        ...         store.save(5, {"w": torch.arange(3), "name": "digits"})
        ...     torch.load(consolidate(run_dir, f"{run_dir}/all.pt", only="all"))
        {'w': tensor([0, 1, 2]), 'name': 'digits'}
    """
    return _consolidate(root_of(run_dir), _cells.located(out), step=step, only=only)
