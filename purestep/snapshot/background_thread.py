"""One save in the background at a time: its thread, its result, and the exit of the process.

It owns the promise that an exiting interpreter first finishes the save in flight.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from dataclasses import dataclass

_in_flight: set[threading.Thread] = set()
_hooked: list[bool] = []


@dataclass
class Job:
    """One run of a function in a thread: `failure` is the error it raised, once `ended`."""

    thread: threading.Thread
    failure: BaseException | None = None

    @property
    def ended(self) -> bool:
        return not self.thread.is_alive()


class Background:
    """Runs one function at a time in a thread, which is not a daemon: an exiting process waits for it."""

    def __init__(self) -> None:
        self.job: Job | None = None

    def start(self, name: str, work: Callable[[], None]) -> None:
        """Run `work` in a thread, after the one before has ended."""
        self.join()

        def run() -> None:
            try:
                work()
            except BaseException as error:
                job.failure = error
            finally:
                _in_flight.discard(job.thread)

        job = Job(threading.Thread(target=run, name=name))
        _finish_before_exit(job.thread)
        self.job = job
        job.thread.start()

    def busy(self, timeout: float) -> bool:
        """Tell whether the thread still runs, after waiting for it `timeout` seconds at most."""
        if self.job is not None:
            self.job.thread.join(min(max(0.0, timeout), threading.TIMEOUT_MAX))
        return self.job is not None and self.job.thread.is_alive()

    def join(self) -> None:
        """Wait for the thread. A wait that was interrupted can be repeated."""
        if self.job is not None:
            self.job.thread.join()


def _finish_before_exit(thread: threading.Thread) -> None:
    """Make an exiting interpreter wait for this thread before it closes the thread pools that the write uses.

    Without the hook (it is private to CPython) the interpreter still waits; a write that then finds its pools closed
    fails like any other, and leaves no files.
    """
    _in_flight.add(thread)
    register = getattr(threading, "_register_atexit", None)
    if not _hooked and register is not None:
        # Imported for its hook, which closes the pools; the hook registered last runs first, so ours comes after.
        import concurrent.futures.thread  # noqa: F401

        with contextlib.suppress(RuntimeError):
            register(_drain)
        _hooked.append(True)


def _drain() -> None:
    for thread in list(_in_flight):
        if thread.ident is not None:
            thread.join()
