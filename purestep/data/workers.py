"""Worker processes: one torch `DataLoader` over a stream of requests, kept alive from epoch to epoch.

Owns starting, reusing and ending workers, and saying why they died. What is computed for a request is the business of
`samples`, so the result does not depend on how many workers there are. `Batches` calls `Shelf.serve`.

A pool is one `DataLoader` with persistent workers whose sampler is a stream of requests. When shuffled, the stream runs
on into the next epoch, so workers fetch ahead across the boundary; when the next request is for another place, the same
workers are pointed there. A pool serves one iterator at a time and is put back on its shelf when that ends; each
`Batches` has one shelf, which holds one idle pool at most, until it is closed or collected.
"""

from __future__ import annotations

import atexit
import contextlib
import io
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import threading
import types
import warnings
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.reduction import ForkingPickler
from typing import Any

import numpy as np
import torch

from purestep.data import _torch
from purestep.data.order import Plan, Request
from purestep.data.samples import Loaded, Loader
from purestep.errors import DataError, explain

_GUARD = 'if __name__ == "__main__":\n    main()'


class _Requested:
    """The data set the workers see: indexing it with a request gives the loaded batch."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getitem__(self, request: Request) -> Loaded:
        return self.loader.load(request)


class _Stream:
    """The sampler: requests from wherever it was last pointed at."""

    def __init__(self, plan: Plan) -> None:
        self.plan = plan
        self.start = (0, 0)

    def __iter__(self) -> Iterator[Request]:
        epoch, batch = self.start
        yield from self.plan.requests(epoch, batch)
        # Evaluations read one epoch at a time, in order; only training, which shuffles, is worth running on for.
        while self.plan.shuffle and self.plan.length():
            epoch += 1
            yield from self.plan.requests(epoch)


class Pool:
    """Worker processes for one plan and loader.

    Args:
        plan: which samples make up which batch.
        loader: what turns them into a batch; it is sent to the workers once.
        workers: number of processes, 1 or more.
        ahead: batches fetched ahead by each worker.
        start: "forkserver" or "spawn".
        pin: whether batches are put into page-locked memory.
    """

    def __init__(self, plan: Plan, loader: Loader, *, workers: int, ahead: int, start: str, pin: bool) -> None:
        from torch.utils.data import DataLoader

        _refuse_in_bootstrap()
        _check_picklable(loader)
        self.plan = plan
        self._stream = _Stream(plan)
        with _crowd_allowed():
            self._loader: Any = DataLoader(
                _Requested(loader),  # type: ignore[arg-type]
                sampler=self._stream,
                batch_size=None,
                collate_fn=_unchanged,  # type: ignore[arg-type]
                num_workers=workers,
                worker_init_fn=_settle,
                persistent_workers=True,
                prefetch_factor=ahead,
                pin_memory=pin,
                multiprocessing_context=_context(start),
                # The loader draws a base seed when it starts; from here, not from the global generator.
                generator=torch.Generator(),
            )
        self._iterator: Any = None
        self._position: tuple[int, int] | None = None
        self._proven = False

    def epoch(self, epoch: int, batch: int) -> Iterator[Loaded]:
        """Yield the batches of an epoch from number `batch` on.

        Raises:
            DataError: the workers could not be started, or died.
        """
        numbers = self.plan.numbers(batch)
        if not numbers:
            return
        if self._iterator is None or self._position != (epoch, batch):
            self._stream.start = (epoch, batch)
            self._position = None
            with _crowd_allowed():
                self._iterator = self._guarded(lambda: iter(self._loader))
        for number in numbers:
            loaded = self._guarded(lambda: next(self._iterator))
            self._proven = True
            self._position = self._after(epoch, number)
            yield loaded

    def _after(self, epoch: int, number: int) -> tuple[int, int] | None:
        """Where the stream goes on after a batch; None when it has ended."""
        if number + 1 < self.plan.length():
            return epoch, number + 1
        return (epoch + 1, 0) if self.plan.shuffle else None

    @property
    def alive(self) -> bool:
        """Whether the pool can serve another epoch."""
        return self._loader is not None

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers; empty before the first batch and after `close`."""
        return [w.pid for w in _torch.worker_processes(self._iterator) if w.pid is not None]

    def close(self) -> None:
        """End the workers. It may be called again."""
        iterator, self._iterator, self._loader, self._position = self._iterator, None, None, None
        if iterator is not None:
            _torch.shut_down(iterator)

    def _guarded(self, call: Callable[[], Any]) -> Any:
        try:
            return call()
        except (RuntimeError, OSError, EOFError, pickle.PickleError, AttributeError, TypeError) as error:
            started = self._proven
            if str(error).startswith("Caught "):  # raised in a worker that lives; torch brings its traceback along
                self.close()
                raise
            self.close()
            raise _died(error, started) from error
        except BaseException:
            # An interrupt in the middle of a queue read leaves the loader in a state that cannot be relied on.
            self.close()
            raise


class Shelf:
    """Where the pool of one `Batches` waits between two epochs. Dropping the shelf ends the workers on it."""

    def __init__(self) -> None:
        self._idle: Pool | None = None
        _SHELVES.add(self)

    def serve(
        self, plan: Plan, loader: Loader, epoch: int, batch: int, options: Callable[[], dict[str, Any]]
    ) -> Iterator[Loaded]:
        """Yield loaded batches from the idle pool, or from a new one, which is the idle pool afterwards.

        Args:
            plan, loader: as for `Pool`; always the same for one shelf.
            epoch, batch: where to begin.
            options: gives the keyword arguments of a new `Pool`.
        """
        if not plan.numbers(batch):
            return
        pool, self._idle = self._idle, None
        if pool is None:
            pool = Pool(plan, loader, **options())
        try:
            yield from pool.epoch(epoch, batch)
        finally:
            if pool.alive and self._idle is None:
                self._idle = pool
            else:
                pool.close()

    def close(self) -> None:
        """End the idle workers, if there are any."""
        pool, self._idle = self._idle, None
        if pool is not None:
            pool.close()


_SHELVES: weakref.WeakSet[Shelf] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    for shelf in list(_SHELVES):
        shelf.close()


@contextlib.contextmanager
def _crowd_allowed() -> Iterator[None]:
    """More workers than CPUs is the user's choice, and right where they wait for a disk: torch need not warn of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        yield


def _settle(worker: int) -> None:
    """Prepare a worker process: it stops when the main process wants it to, or is gone."""
    # Ctrl-C reaches the whole process group; the main process decides when to stop, and needs batches until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # Torch's own watch is for the death of the parent, which is the fork server; that lives as long as its workers do.
    threading.Thread(target=_end_with_main, name="purestep-watch", daemon=True).start()


def _end_with_main() -> None:
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        os._exit(1)


def _unchanged(loaded: Loaded) -> Loaded:
    return loaded


# --- starting, and what can go wrong with it ------------------------------------------------------------------------


def _context(start: str) -> Any:
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        # Imported once in the server, torch costs each worker nothing. A preload list of the user's own is left alone.
        server = multiprocessing.forkserver._forkserver
        if getattr(server, "_preload_modules", None) == ["__main__"]:
            context.set_forkserver_preload(["__main__", __name__])
    return context


def _refuse_in_bootstrap() -> None:
    if getattr(multiprocessing.current_process(), "_inheriting", False):
        raise DataError(
            explain(
                "the script starts its training again while a worker process imports it",
                where=str(getattr(sys.modules.get("__mp_main__"), "__file__", "__main__")),
                why="workers that are not forked import the main script, so what it runs must be guarded",
                instead=_GUARD,
            )
        )


class _Probe(ForkingPickler):
    """Pickles everything but the arrays, to see whether a worker could be sent it, and what of it is in `__main__`."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.in_main: list[str] = []

    def persistent_id(self, value: Any) -> str | None:
        if isinstance(value, (torch.Tensor, np.ndarray)):
            return "array"
        if isinstance(value, (type, types.FunctionType)) and value.__module__ == "__main__":
            self.in_main.append(value.__qualname__)
        return None


def _check_picklable(loader: Loader) -> None:
    probe, part = _Probe(), ""
    try:
        for part in ("dataset", "transform", "collate"):
            probe.dump(getattr(loader, part))
    except (pickle.PicklingError, AttributeError, TypeError) as error:
        value = getattr(loader, part)
        named = value if hasattr(value, "__qualname__") else type(value)
        raise DataError(
            explain(
                f"the {part} of a loader cannot be sent to worker processes",
                where=f"{part}: {named.__module__}.{named.__qualname__}",
                why=f"{type(error).__name__}: {error}",
                instead="functions and classes at the top level of a module, files opened in __getitem__; "
                "or num_workers=0",
            )
        ) from error
    except RuntimeError:
        # Locks, queues and shared values refuse to be pickled anywhere but in a process being started; there they work.
        return
    if probe.in_main and not hasattr(sys.modules.get("__main__"), "__file__"):
        raise DataError(
            explain(
                "worker processes cannot import what a notebook or an interactive session defines",
                where=f"__main__.{probe.in_main[0]}",
                why="a worker is a new process, and there is no file from which it could import it",
                instead="define it in a .py file and import it from there, or num_workers=0",
            )
        )


def _died(error: BaseException, started: bool) -> DataError:
    if started:
        what = "a worker process ended in the middle of an epoch"
        why = "it was killed (often by the kernel, for memory) or crashed in native code"
        instead = "fewer workers, a smaller `prefetch`, or num_workers=0 to see the error in this process"
    else:
        what = "the worker processes ended before they gave a batch"
        why = (
            "their own traceback is on stderr; often the main script runs its training when it is imported, or the "
            "data set is defined where they cannot import it"
        )
        instead = f"{_GUARD}\nor num_workers=0 to see the error in this process"
    return DataError(explain(what, where=f"{type(error).__name__} {error}".strip(), why=why, instead=instead))
