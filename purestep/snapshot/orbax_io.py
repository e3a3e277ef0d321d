"""Flat numpy arrays in a directory, written by Orbax, and read by it if `zarr_files` cannot. The only importer of
Orbax.

Its log, its threads and its import stay hidden from the rest of the program: reading an intact snapshot (`zarr_files`)
does not even import it. It does not know leaves or snapshots.
"""

from __future__ import annotations

import asyncio
import contextlib
import functools
import logging
import os
import sys
import threading
from collections.abc import Awaitable, Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from purestep.snapshot.zarr_files import read_plain

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
                del os.environ["JAX_PLATFORMS"]  # JAX has read it; child processes must not inherit it
    return ocp


@contextlib.contextmanager
def _quiet() -> Iterator[Any]:
    """Yield Orbax, and keep its log off the user's stderr: its errors are raised as exceptions as well."""
    global _quiet_depth
    before = list(logging.root.handlers)
    ocp = _load_orbax()  # before `getLogger`, because absl creates its logger with a class of its own
    with _quiet_lock:
        _quiet_depth += 1
        logging.getLogger("absl").addFilter(_keep_quiet)
    try:
        yield ocp
    finally:
        with _quiet_lock:
            _quiet_depth -= 1
        if not before:  # absl calls logging.basicConfig(); remove that handler, but none that the user added meanwhile
            for handler in [h for h in logging.root.handlers if _is_basic(h)]:
                logging.root.removeHandler(handler)


def _keep_quiet(record: logging.LogRecord) -> bool:
    return not (_quiet_depth and f"{os.sep}orbax{os.sep}" in record.pathname)


def _is_basic(handler: logging.Handler) -> bool:
    template = getattr(handler.formatter, "_fmt", None)
    return type(handler) is logging.StreamHandler and template == logging.BASIC_FORMAT


@functools.cache
def _quiescent_handler(ocp: Any) -> Any:
    """Return a handler of numpy arrays that waits for all of them before it raises the error of one.

    Orbax's own handler raises at the first error and leaves the other writes running: they would go on to write into a
    directory that is being removed, and asyncio would print their errors to stderr, because no caller awaits them.
    """

    class Handler(ocp.type_handlers.NumpyHandler):
        async def _background_serialize(self, values: Any, infos: Any, args: Any = None) -> None:
            one, args = super()._background_serialize, args or [ocp.SaveArgs()] * len(infos)
            await _all_of(one([v], [i], [a]) for v, i, a in zip(values, infos, args, strict=True))

        async def deserialize(self, infos: Any, args: Any = None) -> list[np.ndarray]:
            one, args = super().deserialize, args or [ocp.RestoreArgs()] * len(infos)
            loaded = await _all_of(one([i], [a]) for i, a in zip(infos, args, strict=True))
            return [array for arrays in loaded for array in arrays]

    return Handler(deepcopy_host_arrays=False)  # the arrays are our own copies


async def _all_of(work: Iterable[Awaitable[Any]]) -> list[Any]:
    done = await asyncio.gather(*work, return_exceptions=True)
    for result in done:
        if isinstance(result, BaseException):
            raise result
    return done


@contextlib.contextmanager
def _checkpointer() -> Iterator[tuple[Any, Any]]:
    """Yield Orbax and a checkpointer of flat numpy arrays."""
    with _quiet() as ocp:
        registry = ocp.type_handlers.create_type_handler_registry((np.ndarray, _quiescent_handler(ocp)))
        # Neither compression nor OCDBT: weights do not compress, and large arrays as plain files are written faster.
        pytrees = ocp.PyTreeCheckpointHandler(
            use_ocdbt=False, use_zarr3=False, use_compression=False, type_handler_registry=registry
        )
        with ocp.Checkpointer(pytrees) as checkpointer:
            yield ocp, checkpointer


def write_arrays(directory: Path, arrays: Mapping[str, np.ndarray]) -> None:
    """Write flat arrays into a directory that does not exist yet."""
    with _checkpointer() as (ocp, checkpointer):
        checkpointer.save(directory, args=ocp.args.PyTreeSave(dict(arrays)))


def read_arrays(directory: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    """Read flat arrays by name: as uint8[nbytes], or as Orbax returns those that are not plain files.

    Raises:
        Exception: of Orbax or tensorstore, when an array is missing or incomplete.
    """
    arrays = read_plain(directory, names)
    rest = [name for name in names if name not in arrays]
    return arrays | _read_by_orbax(directory, rest) if rest else arrays


def _read_by_orbax(directory: Path, names: Sequence[str]) -> dict[str, np.ndarray]:
    with _checkpointer() as (ocp, checkpointer):
        item = {name: np.empty(0, np.uint8) for name in names}
        restore = {name: ocp.RestoreArgs(restore_type=np.ndarray) for name in names}
        args = ocp.args.PyTreeRestore(item=item, restore_args=restore, partial_restore=True)
        return checkpointer.restore(directory, args=args)
