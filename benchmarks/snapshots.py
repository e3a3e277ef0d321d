"""Saving and restoring 500 MB: how long training stands still, how long until it is durable, how long to read it back.

Beside `torch.save` with fsync, `torch.load`, and torch's distributed checkpoint, plain and asynchronous. One process,
all kinds in turns, on the file system of the temporary directory. Every kind reads back what it has just written, so
from the page cache. Deleting is measured apart, and the disk is idle when the next kind begins.
"""

from __future__ import annotations

import os
import shutil
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from benchmarks.training import Say, spread

LEAVES = 40


def run(settings: Any, say: Say) -> dict[str, Any]:
    """Measure every kind `settings.snapshot_rounds` times, after one that is thrown away."""
    import torch

    torch.set_num_threads(1)
    size = settings.snapshot_mb * 1_000_000 // (4 * LEAVES)
    tree = {f"leaf{i:02d}": torch.randn(size) for i in range(LEAVES)}
    kinds: dict[str, Callable[[Path, dict[str, Any]], dict[str, float]]] = {
        "torch": _torch,
        "purestep": _Purestep(),
        "dcp": _Distributed(asynchronous=False),
        "dcp-async": _Distributed(asynchronous=True),
    }
    kinds = {name: kinds[name] for name in settings.snapshot_kinds}
    times: dict[str, list[dict[str, float]]] = {name: [] for name in kinds}
    failed: dict[str, str] = {}
    with tempfile.TemporaryDirectory(prefix="purestep-bench-") as folder:
        for number in range(settings.snapshot_rounds + 1):
            order = list(kinds.items())
            for name, kind in order[number % len(order) :] + order[: number % len(order)]:
                if name in failed:
                    continue
                where = Path(folder, name, str(number))
                try:
                    found = kind(where, tree)
                except Exception as error:
                    failed[name] = f"{type(error).__name__}: {error}"
                    continue
                finally:
                    began = time.perf_counter()
                    shutil.rmtree(where, ignore_errors=True)
                    deleted = time.perf_counter() - began
                    os.sync()
                if number:
                    times[name].append(found | {"delete": deleted})
                tree["leaf00"] += 1.0
    say("snapshots: " + ", ".join(f"{n} {spread([t['total'] for t in ts])[0]:.2f} s" for n, ts in times.items() if ts))
    return {"mb": settings.snapshot_mb, "rounds": times, "failed": failed}


def ratio(results: dict[str, Any], kind: str, what: str) -> tuple[float, float, float]:
    """Return the ratio of a kind to torch.save and torch.load, by rounds."""
    other = "total" if what == "block" else what
    pairs = zip(results["rounds"][kind], results["rounds"]["torch"], strict=True)
    return spread([a[what] / b[other] for a, b in pairs])


def _torch(where: Path, tree: dict[str, Any]) -> dict[str, float]:
    import torch

    where.mkdir(parents=True)
    began = time.perf_counter()
    with open(where / "state.pt", "wb") as file:
        torch.save(tree, file)
        file.flush()
        os.fsync(file.fileno())
    saved = time.perf_counter()
    back = torch.load(where / "state.pt", weights_only=True)
    done = time.perf_counter()
    _compare(tree, back)
    return {"block": saved - began, "total": saved - began, "restore": done - saved}


class _Purestep:
    """One store for all rounds, as a run has it: its copy buffers are kept between saves."""

    def __init__(self) -> None:
        self.store: Any = None

    def __call__(self, where: Path, tree: dict[str, Any]) -> dict[str, float]:
        from purestep import snapshot

        if self.store is None:
            self.store = snapshot.Store(where.parent, keep=snapshot.all_())
        began = time.perf_counter()
        self.store.save(int(where.name), tree)
        blocked = time.perf_counter()
        self.store.wait()
        saved = time.perf_counter()
        back = self.store.restore().value
        done = time.perf_counter()
        _compare(tree, back)
        return {"block": blocked - began, "total": saved - began, "restore": done - saved}


class _Distributed:
    """`torch.distributed.checkpoint`, in one process; it does not fsync by default only its writer can be told to."""

    def __init__(self, *, asynchronous: bool) -> None:
        self.asynchronous = asynchronous

    def __call__(self, where: Path, tree: dict[str, Any]) -> dict[str, float]:
        import torch
        from torch.distributed import checkpoint as dcp

        with _quiet():
            began = time.perf_counter()
            if self.asynchronous:
                future = dcp.async_save(tree, storage_writer=dcp.FileSystemWriter(where, sync_files=True))
                blocked = time.perf_counter()
                future.result()
            else:
                dcp.save(tree, storage_writer=dcp.FileSystemWriter(where, sync_files=True))
                blocked = time.perf_counter()
            saved = time.perf_counter()
            back = {name: torch.empty_like(leaf) for name, leaf in tree.items()}
            dcp.load(back, storage_reader=dcp.FileSystemReader(where))
            done = time.perf_counter()
        _compare(tree, back)
        return {"block": blocked - began, "total": saved - began, "restore": done - saved}


def _quiet() -> Any:
    import warnings

    context = warnings.catch_warnings(action="ignore")
    return context


def _compare(tree: dict[str, Any], back: dict[str, Any]) -> None:
    import torch

    if not all(torch.equal(leaf, back[name]) for name, leaf in tree.items()):
        raise ValueError("what was read back is not what was saved")
