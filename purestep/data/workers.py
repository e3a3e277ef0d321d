"""Worker processes: one torch `DataLoader` over a stream of requests, kept alive from epoch to epoch.

Owns starting, reusing and ending workers, and the errors that say why they died. `loading` computes the batch of a
request, so the result does not depend on the number of workers. `Batches` calls `PoolCache.serve`.

A pool is one `DataLoader` with persistent workers whose sampler is a stream of requests. When shuffled, the stream
continues into the next epoch, so workers prefetch across the boundary; when the next request is for another position,
the stream of the same workers restarts there. A pool serves one iterator at a time and returns to its cache when that
ends; each `Batches` has one cache, which holds one idle pool at most, until it is closed or collected.
"""

from __future__ import annotations

import atexit
import contextlib
import dataclasses
import multiprocessing
import multiprocessing.forkserver
import os
import pickle
import signal
import sys
import threading
import warnings
import weakref
from collections.abc import Callable, Iterator
from multiprocessing.context import BaseContext
from typing import Any, Literal, TypeVar

import torch

from purestep.data import _torch, sending
from purestep.data.loading import Loaded, Loader
from purestep.data.sampler import BatchOrder, Request
from purestep.errors import DataError, explain

T = TypeVar("T")
_GUARD = 'if __name__ == "__main__":\n    main()'


@dataclasses.dataclass(frozen=True)
class PoolOptions:
    """How a pool loads its batches, which does not change them.

    Attributes:
        workers: number of processes, 1 or more.
        prefetch: batches that each worker loads ahead.
        start: how the processes start.
        pin: whether batches are put into page-locked memory.
    """

    workers: int
    prefetch: int = 2
    start: Literal["forkserver", "spawn"] = "forkserver"
    pin: bool = False


class _RequestedBatches:
    """The data set of the workers: indexing it with a request loads that batch."""

    def __init__(self, loader: Loader) -> None:
        self.loader = loader

    def __getitem__(self, request: Request) -> Any:
        return self.loader.load(request)


class _DefinedHere(_RequestedBatches):
    """The same for a loader that workers cannot import: its definitions are sent with it."""

    def __reduce__(self) -> tuple[Callable[[bytes], _RequestedBatches], tuple[bytes]]:
        return _defined_there, (sending.packed(self.loader),)

    def __getitem__(self, request: Request) -> Any:
        loaded = self.loader.load(request)
        return loaded if sending.is_plain(loaded.batch) else sending.Returned(loaded)


def _defined_there(content: bytes) -> _RequestedBatches:
    return _DefinedHere(sending.unpacked(content))


class _RequestStream:
    """The sampler of the workers: the requests from position `start` on."""

    def __init__(self, order: BatchOrder) -> None:
        self.order = order
        self.start = (0, 0)

    def __iter__(self) -> Iterator[Request]:
        epoch, batch = self.start
        yield from self.order.requests(epoch, batch)
        # Training, which shuffles, reads epoch after epoch, so workers load ahead into the next one. An evaluation
        # reads one epoch at a time, perhaps minutes apart: batches loaded ahead would only hold memory.
        while self.order.shuffle and self.order.length():
            epoch += 1
            yield from self.order.requests(epoch)


class Pool:
    """Worker processes for one order and loader.

    Args:
        order: which samples make up which batch.
        loader: loads a batch of samples; it is sent to the workers once.
        options: how many workers, how they start, and how far ahead they load.
    """

    def __init__(self, order: BatchOrder, loader: Loader, options: PoolOptions) -> None:
        from torch.utils.data import DataLoader

        _refuse_in_bootstrap()
        self.sent = sending.Sent.of(loader)
        self.order = order
        self._stream = _RequestStream(order)
        with _more_workers_than_cpus():
            self._loader: Any = DataLoader(
                (_DefinedHere if self.sent.by_value else _RequestedBatches)(loader),  # type: ignore[arg-type]
                sampler=self._stream,
                batch_size=None,  # each request is a batch already
                collate_fn=_unchanged,  # type: ignore[arg-type]
                num_workers=options.workers,
                worker_init_fn=_initialize_worker,
                persistent_workers=True,
                prefetch_factor=options.prefetch,
                pin_memory=options.pin,
                multiprocessing_context=_context(options.start),
                # The loader draws a base seed when it starts: from this generator, not from the global one.
                generator=torch.Generator(),
            )
        self._iterator: Any = None
        self._position: tuple[int, int] | None = None
        self._has_loaded = False

    def epoch(self, epoch: int, batch: int) -> Iterator[Loaded]:
        """Yield the batches of an epoch from number `batch` on.

        Raises:
            DataError: the workers could not be started, or died.
        """
        numbers = self.order.numbers(batch)
        if not numbers:
            return
        if self._iterator is None or self._position != (epoch, batch):
            # `iter` of a loader with persistent workers keeps the processes, drops what they have loaded ahead, and
            # reads the sampler anew: from this position.
            self._stream.start = (epoch, batch)
            self._position = None
            with _more_workers_than_cpus():
                self._iterator = self._guarded(lambda: iter(self._loader))
        for number in numbers:
            loaded = self._guarded(lambda: next(self._iterator))
            self._has_loaded = True
            # Set before the yield: the caller may never ask for another batch, and the next epoch still begins here.
            self._position = self._after(epoch, number)
            yield loaded

    def _after(self, epoch: int, number: int) -> tuple[int, int] | None:
        """The position of the stream after a batch; None when the stream has ended."""
        if number + 1 < self.order.length():
            return epoch, number + 1
        return (epoch + 1, 0) if self.order.shuffle else None

    @property
    def alive(self) -> bool:
        """Whether the pool can serve another epoch."""
        return self._loader is not None

    @property
    def pids(self) -> list[int]:
        """Process ids of the workers; empty before the first batch and after `close`."""
        return [worker.pid for worker in _torch.worker_processes(self._iterator) if worker.pid is not None]

    def close(self) -> None:
        """End the workers. It may be called again."""
        iterator, self._iterator, self._loader, self._position = self._iterator, None, None, None
        # torch's iterator ends its workers when it is collected, which a reference in a traceback may delay.
        if iterator is not None:
            _torch.shut_down(iterator)

    def _guarded(self, call: Callable[[], T]) -> T:
        try:
            return call()
        except (RuntimeError, OSError, EOFError, pickle.PickleError, AttributeError, TypeError) as error:
            # An error inside of a worker arrives with its traceback, under this prefix of torch's. Any other error is
            # that of a queue whose process has gone, and says nothing of the reason.
            self.close()
            if str(error).startswith("Caught "):
                raise
            raise _died(error, self._has_loaded) from error
        except BaseException:
            # An interrupt in the middle of a queue read leaves the loader in a state that cannot be relied on.
            self.close()
            raise


class PoolCache:
    """Keeps the pool of one `Batches` alive between two epochs. Collecting the cache ends the workers in it."""

    def __init__(self) -> None:
        self._idle: Pool | None = None
        _CACHES.add(self)

    def serve(
        self, order: BatchOrder, loader: Loader, epoch: int, batch: int, options: Callable[[], PoolOptions]
    ) -> Iterator[Loaded]:
        """Yield loaded batches from the idle pool, or from a new one, which is the idle pool afterwards.

        Args:
            order, loader: as for `Pool`; always the same for one cache.
            epoch, batch: position of the first batch.
            options: returns those of a new `Pool`; called only when one is made, since it counts the CPUs.
        """
        if not order.numbers(batch):
            return
        # A pool serves one iterator at a time: while this one reads, a second iterator finds no idle pool and makes
        # its own. Of two that end, the first returns to the cache.
        pool, self._idle = self._idle, None
        if pool is not None and not pool.sent.is_current(loader):
            pool.close()
            pool = None
        if pool is None:
            pool = Pool(order, loader, options())
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


_CACHES: weakref.WeakSet[PoolCache] = weakref.WeakSet()


@atexit.register
def _close_all() -> None:
    # Runs before torch's own exit handler, after which torch's iterators no longer end their workers.
    for cache in list(_CACHES):
        cache.close()


@contextlib.contextmanager
def _more_workers_than_cpus() -> Iterator[None]:
    """More workers than CPUs is the user's choice, and right where they wait for a disk: torch need not warn of it."""
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="This DataLoader will create", category=UserWarning)
        yield


def _initialize_worker(worker: int) -> None:
    """Make a worker process end when the main process ends it or dies, and at no other time."""
    # Ctrl-C reaches the whole process group; the main process decides when to stop, and needs batches until then.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # torch's watchdog watches the parent, which here is the fork server; that lives as long as its workers do. So this
    # thread watches the main process.
    threading.Thread(target=_end_with_main, name="purestep-watch", daemon=True).start()


def _end_with_main() -> None:
    main = multiprocessing.parent_process()
    if main is not None:
        main.join()
        os._exit(1)


def _unchanged(loaded: Loaded) -> Loaded:
    return loaded


# --- starting, and the errors of a start ----------------------------------------------------------------------------


def _context(start: str) -> BaseContext:
    context = multiprocessing.get_context(start)
    if start == "forkserver":
        # Imported once in the fork server, torch costs a worker no import. A preload list that the user has set stays.
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


def _died(error: BaseException, has_loaded: bool) -> DataError:
    if has_loaded:
        what = "a worker process ended in the middle of an epoch"
        why = "it was killed (often by the kernel, for memory) or crashed in native code"
        instead = "fewer workers, a smaller `prefetch`, or num_workers=0 to see the error in this process"
    else:
        what = "the worker processes ended before they loaded a batch"
        why = (
            "their own traceback is on stderr; often the main script runs its training when it is imported, or the "
            "data set is defined in a module that a worker cannot import"
        )
        instead = f"{_GUARD}\nor num_workers=0 to see the error in this process"
    return DataError(explain(what, where=f"{type(error).__name__} {error}".strip(), why=why, instead=instead))
