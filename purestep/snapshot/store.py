"""One directory of snapshots with one writer: asynchronous saves, durable commits, verified restores, policies.

It is the only importer of Orbax, which writes and reads the arrays; commit, manifest, checksums, listing and deletion
are ours. The loop calls it; it knows nothing of training.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import json
import logging
import operator
import os
import sys
import threading
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from purestep.errors import SaveFailed, SnapshotError, explain
from purestep.snapshot import disk, keep, reader, writer
from purestep.snapshot.background import Background
from purestep.snapshot.codec import JSON, encode
from purestep.snapshot.index import Index, listed
from purestep.snapshot.manifest import Manifest, environment, read_manifest
from purestep.snapshot.reader import Restored
from purestep.snapshot.staging import Staging

_LATEST = keep.latest(1)
_EMPTY: Mapping[str, Any] = {}


class Store:
    """A directory of snapshots, written by one process.

    `save` copies the tree and returns; a thread writes it. A snapshot is in the list from the moment it is durable, and
    only then does the preservation policy delete older ones, so at worst one more than asked is on disk. The newest one
    is always preserved. A process that exits without `close` finishes the save in flight first; one that is killed
    leaves a temporary directory, which the first save of the next writer removes.

    Args:
        root: the directory; the first save makes it.
        keep: which snapshots to preserve, see `latest`, `best`, `every_steps`, `all_`.
        verify: whether `restore` checks the checksum of every leaf.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as root, Store(root, keep=keep.latest(2)) as store:
        ...     for step in (10, 20, 30):
        ...         store.save(step, {"w": torch.full((2,), float(step)), "n": step}, metrics={"loss": 1 / step})
        ...     store.wait()
        ...     store.steps(), store.best("loss"), store.restore().value
        ([20, 30], 30, {'w': tensor([30., 30.]), 'n': 30})
    """

    def __init__(self, root: str | Path, *, keep: keep.Keep = _LATEST, verify: bool = True) -> None:
        self.root = Path(root).absolute()
        self.keep = keep
        self.verify = verify
        self._index = Index(self.root)
        self._staging = Staging()
        self._background = Background()
        self._durable: list[int] = []
        self._cleaned = False
        self._closed = False

    def __repr__(self) -> str:
        return f"Store({str(self.root)!r}, keep={self.keep!r}, verify={self.verify})"

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(
        self, step: int, value: Any, *, metrics: Mapping[str, float] = _EMPTY, info: Mapping[str, JSON] = _EMPTY
    ) -> None:
        """Copy a tree and begin to write it in the background.

        Waits for the save before it, so that there is never more than one copy. The value may be changed on return.

        Args:
            step: a whole number above every step that is stored.
            value: a pytree of tensors, numpy arrays, numbers, strings and bytes.
            metrics: numbers that `best` ranks by.
            info: anything JSON, given back by `restore`.

        Raises:
            SaveFailed: the *previous* save failed; this one has been started all the same.
            SnapshotError: `step` is not above the latest, `info` is no JSON, or the store is closed.
            TreeError: a leaf cannot be stored.
        """
        number = _checked_step(step)
        if self._closed:
            raise SnapshotError(explain("the store is closed", where=str(self.root), instead="make a new Store"))
        self._background.settle()  # the buffers are free again, and the list is complete
        self._refuse_past(number)
        encoded = encode(value)
        request = writer.Request(
            step=number,
            encoded=encoded,
            metrics=_checked_metrics(metrics),
            info=_frozen_json(info),
            environment=environment(),
            keep=self.keep,
            copies=self._staging.copy([content for content in encoded.values if content is not None]),
        )
        previous = self._background.take_failure()
        self._background.start(f"purestep-save-{number}", lambda: self._write(request))
        if previous is not None:  # raised only now: a save that reports another one is not skipped
            raise previous

    def _write(self, request: writer.Request) -> SaveFailed | None:
        try:
            writer.write(self.root, request, _write_arrays, clean=not self._cleaned)
        except BaseException as error:
            self._cleaned = False
            return self._save_failed(request.step, error)
        self._cleaned = True
        self._durable.append(request.step)
        with contextlib.suppress(OSError):  # what cannot be deleted now is tried again after the next save
            writer.preserve(self._index, self.keep)
        return None

    def _save_failed(self, step: int, error: BaseException) -> SaveFailed:
        steps = self.steps()
        failure = SaveFailed(
            explain(
                f"the save of step {step} failed",
                where=str(self.root / str(step)),
                why=f"{type(error).__name__}: {str(error)[:500]}",
                instead="free space or mend the directory, and save again; "
                + (f"snapshots on disk, untouched: {listed(steps)}" if steps else "there is no earlier snapshot"),
            )
        )
        failure.__cause__ = error
        return failure

    def _refuse_past(self, step: int) -> None:
        latest = self.latest()
        if latest is not None and step <= latest:
            raise SnapshotError(
                explain(
                    f"step {step} is not after the latest snapshot, of step {latest}",
                    where=str(self.root),
                    why="snapshots are in the order of their steps, or the latest would not be the newest",
                    instead=f"store.delete_after({step - 1}) first, to go back on purpose; or use another directory",
                )
            )

    def wait(self) -> None:
        """Wait until the save in flight is durable and the policy has been applied.

        Raises:
            SaveFailed: it did not become durable; nothing of it is left on disk.
        """
        self._background.settle()
        self._background.raise_failure()

    def poll(self) -> list[int]:
        """Return the steps that became durable since the last poll, without waiting.

        Raises:
            SaveFailed: a save failed; raised once for each failure.
        """
        self._background.raise_failure()
        count = len(self._durable)
        steps, self._durable[:count] = self._durable[:count], []
        return steps

    def close(self) -> None:
        """Wait for the save in flight, and give back the memory of the copies.

        Raises:
            SaveFailed: the save did not become durable.
        """
        self._background.settle()
        self._closed = True
        self._staging.clear()
        self._background.raise_failure()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        try:
            self.close()
        except SaveFailed as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    # --- what is stored -----------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the steps of the snapshots on disk, in order. A save in flight is not among them."""
        return self._index.steps()

    def latest(self) -> int | None:
        """Return the step of the newest snapshot, None when there is none."""
        return max(self.steps(), default=None)

    def best(self, metric: str, mode: keep.Mode = "min") -> int | None:
        """Return the step with the best value of a metric; None when no snapshot has it. NaN is never best."""
        return next(iter(keep.ranking(self._index.records(), metric, mode)), None)

    def delete_after(self, step: int) -> None:
        """Delete every snapshot after a step, newest first: going back in time on purpose."""
        self._background.settle()
        for entry in reversed(self._index.entries()):
            if entry.step > step:
                disk.remove(entry.path)

    def read_manifest(self, step: int) -> Manifest:
        """Return all that the snapshot of a step says about itself, without reading arrays.

        Raises:
            CorruptSnapshot: a file of it is missing or is not what was written.
            SnapshotError: there is no snapshot of that step.
        """
        reader.find(self._index, step)
        return read_manifest(self.root / str(step))

    def restore(self, like: Any = ..., *, step: int | None = None, fallback: bool = True) -> Restored:
        """Read a snapshot back, verified.

        Args:
            like: a template: a pytree of the stored structure whose tensors give shape, dtype and device (fake and meta
                tensors mean the CPU) and whose nodes give classes and static fields. `...` anywhere in it, or as all of
                it, takes what is stored. Values of Python leaves come from the snapshot.
            step: which one; the newest by default.
            fallback: whether an older snapshot is used, with a warning, when the newest cannot be read. A step that is
                asked for by number is never replaced by another.

        Raises:
            TemplateMismatch: the snapshot is intact and not of that structure; it never falls back.
            CorruptSnapshot: bytes are missing or changed; the message names the leaf, and the earlier snapshots.
            SnapshotError: there is no snapshot.
        """
        self._background.settle()
        return reader.restore(self._index, like, _read_arrays, step=step, fallback=fallback, verify=self.verify)


def _checked_step(step: int) -> int:
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0 or isinstance(step, bool):
        raise SnapshotError(explain("the step of a snapshot is a whole number from 0 up", where=f"step = {step!r}"))
    return number


def _checked_metrics(metrics: Mapping[str, float]) -> Mapping[str, float]:
    try:
        return {_text(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        what, instead = "metrics of a snapshot are numbers under names", 'metrics={"val/loss": 0.5}'
        raise SnapshotError(
            explain(what, where=f"metrics = {metrics!r:.200}", why=str(error), instead=instead)
        ) from error


def _text(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"the name {name!r} is not a string")
    return name


def _frozen_json(info: Mapping[str, JSON]) -> Mapping[str, JSON]:
    try:
        return json.loads(json.dumps(dict(info)))
    except (TypeError, ValueError) as error:
        what, instead = "info cannot be written as JSON", "put tensors and arrays into the tree that is saved"
        raise SnapshotError(
            explain(what, where=f"info = {str(info)[:200]}", why=str(error), instead=instead)
        ) from error


# --- Orbax ------------------------------------------------------------------------------------------------------------

_quiet_lock = threading.Lock()
_quiet_depth = 0


def _load_orbax() -> Any:
    """Import Orbax, with JAX on the CPU: a GPU backend would reserve the memory that the training needs."""
    with _quiet_lock:
        chosen = "jax" in sys.modules or "JAX_PLATFORMS" in os.environ
        if not chosen:
            os.environ["JAX_PLATFORMS"] = "cpu"
        try:
            import orbax.checkpoint as ocp
        finally:
            if not chosen:
                del os.environ["JAX_PLATFORMS"]  # JAX has read it; child processes are none of our business
    return ocp


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Give Orbax, and keep its log off the user's stderr: what matters in it is raised as an exception as well."""
    global _quiet_depth
    before = list(logging.root.handlers)
    ocp = _load_orbax()  # before the logger is touched, because absl makes it of a class of its own
    with _quiet_lock:
        _quiet_depth += 1
        logging.getLogger("absl").addFilter(_keep_quiet)
    try:
        yield ocp
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
        if not before:  # absl calls logging.basicConfig() on its own; a handler that the user adds looks otherwise
            for handler in [h for h in logging.root.handlers if _is_basic(h)]:
                logging.root.removeHandler(handler)


def _keep_quiet(record: logging.LogRecord) -> bool:
    return not (_quiet_depth and f"{os.sep}orbax{os.sep}" in record.pathname)


def _is_basic(handler: logging.Handler) -> bool:
    template = getattr(handler.formatter, "_fmt", None)
    return type(handler) is logging.StreamHandler and template == logging.BASIC_FORMAT


@functools.cache
def _quiescent_handler(ocp: Any) -> Any:
    """Give a handler of numpy arrays that, when one fails, ends the others before it says so.

    Orbax's own raises at the first failure and leaves the rest running: they go on to write into a directory that is
    being removed, and complain on stderr that nobody listens to them any more.
    """

    class Handler(ocp.type_handlers.NumpyHandler):
        async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
            each, args = super()._background_serialize, args or [ocp.SaveArgs()] * len(infos)
            await _all_of(each([v], [i], [a]) for v, i, a in zip(values, infos, args, strict=True))

        async def deserialize(self, infos: Any, args: Any = None) -> list[np.ndarray]:
            each, args = super().deserialize, args or [ocp.RestoreArgs()] * len(infos)
            found = await _all_of(each([i], [a]) for i, a in zip(infos, args, strict=True))
            return [array for arrays in found for array in arrays]

    return Handler(deepcopy_host_arrays=False)  # the arrays are our own copies


async def _all_of(work: Iterable[Awaitable[Any]]) -> list[Any]:
    done = await asyncio.gather(*work, return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return done


@contextlib.contextmanager
def _checkpointer() -> Iterator[tuple[Any, Any]]:
    """Give Orbax and a checkpointer of flat numpy arrays."""
    with _quiet() as ocp:
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, _quiescent_handler(ocp)))
        # Neither compression nor OCDBT: weights do not compress, and large arrays as plain files are written faster.
        pytrees = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=False, use_compression=False, type_handler_registry=registry
        )
        with ocp.Checkpointer(pytrees) as checkpointer:
            yield ocp, checkpointer


def _write_arrays(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    with _checkpointer() as (ocp, checkpointer):
        checkpointer.save(directory, args=ocp.args.PyTreeSave(dict(arrays)))


def _read_arrays(directory: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    with _checkpointer() as (ocp, checkpointer):
        item = {name: np.empty(0, np.uint8) for name in names}
        restore = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True)
        return checkpointer.restore(directory, args=args)
