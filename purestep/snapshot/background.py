"""One save in the background at a time: its thread, its failure, and what happens when the process ends.

It owns the promises that an exiting interpreter first finishes the save in flight, and that a failure is told once.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

from purestep.errors import SaveFailed

_in_flight: set[threading.Thread] = set()
_hooked: list[bool] = []


@dataclass
class _Job:
    thread: threading.Thread
    failure: SaveFailed | None = None


class Background:
    """Runs one function at a time in a thread, which is not a daemon: an exiting process waits for it."""

    def __init__(self) -> None:
        self._job: _Job | None = None
        self._failure: SaveFailed | None = None

    def start(self, name: str, work: Callable[[], SaveFailed | None]) -> None:
        """Run `work` in a thread, after what runs there now. It returns its failure rather than raise it."""
        self.settle()

        def run() -> None:
            try:
                job.failure = work()
            finally:
                _in_flight.discard(job.thread)

        job = _Job(threading.Thread(target=run, name=name))
        _finish_before_exit(job.thread)
        self._job = job
        job.thread.start()

    def settle(self) -> None:
        """Wait for what runs, and keep its failure for `raise_failure`. An interrupted wait can be taken up again."""
        if self._job is not None:
            self._job.thread.join()
            self._failure = self._job.failure or self._failure
            self._job = None

    def take_failure(self) -> SaveFailed | None:
        """Return the failure of what has ended, once."""
        if self._job is not None and not self._job.thread.is_alive():
            self.settle()
        failure, self._failure = self._failure, None
        return failure

    def raise_failure(self) -> None:
        """Raise the failure of what has ended, once."""
        if (failure := self.take_failure()) is not None:
            raise failure


def _finish_before_exit(thread: threading.Thread) -> None:
    """Let an exiting interpreter wait for this thread before it closes the thread pools that the write needs.

    Without the hook (it is private to CPython) the interpreter still waits; a write that then finds its pools closed
    fails like any other, and leaves nothing behind.
    """
    _in_flight.add(thread)
    register = getattr(threading, "_register_atexit", None)
    if not _hooked and register is not None:
        import concurrent.futures.thread  # noqa: F401  it registers such a hook too, and the last one registered runs first

        with contextlib.suppress(RuntimeError):
            register(_drain)
        _hooked.append(True)


def _drain() -> None:
    for thread in list(_in_flight):
        if thread.ident is not None:
            thread.join()
