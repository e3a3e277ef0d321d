"""A function called in a forked process, which has everything that this one has, and ends when it returns.

Not a thread: a trace changes settings of the process, such as the use of oneDNN, that steps in other threads would see.
"""

from __future__ import annotations

import contextlib
import ctypes
import logging
import os
import signal
import sys
import time
import warnings
import weakref
from collections.abc import Callable

log = logging.getLogger("purestep.jit")
# Seconds to wait for a process that does not end; then this process does the work itself.
_PATIENCE = 600.0


def can_fork() -> bool:
    """Tell whether this platform forks processes that have threads: Linux does, macOS' libraries refuse."""
    return sys.platform == "linux" and hasattr(os, "fork")


class Elsewhere:
    """A process that calls a function once. It dies with this object, and when this process ends.

    Args:
        work: what it calls. What it raises, prints and logs is dropped: whoever waits does the work again, and finds it
            done or meets the same error.
    """

    def __init__(self, work: Callable[[], object]) -> None:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # Python warns of forks of processes with threads
            self.pid = os.fork()
        if self.pid == 0:
            _work(work)
        self._end = weakref.finalize(self, _kill, self.pid, os.getpid())

    def ended(self) -> bool:
        """Tell whether the function has returned, or the process has ended otherwise."""
        if self._end.alive and _ended(self.pid):
            self._end.detach()
        return not self._end.alive

    def wait(self) -> None:
        """Wait until the function has returned."""
        end = time.monotonic() + _PATIENCE
        while not self.ended():
            if time.monotonic() > end:
                log.warning("the process that compiles took more than %.0f s; compiling here", _PATIENCE)
                self._end()
                return
            time.sleep(0.01)


def _work(work: Callable[[], object]) -> None:
    """Call the function and end the process, without what the parent has registered for its end."""
    status = 1
    try:
        _die_with_parent()
        os.setsid()  # an interrupt from the terminal is for the parent
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, signal.SIG_DFL)
        silent = os.open(os.devnull, os.O_RDWR)
        for stream in (0, 1, 2):
            os.dup2(silent, stream)
        logging.disable()
        work()
        status = 0
    finally:
        os._exit(status)


def _die_with_parent() -> None:
    """Have Linux kill this process when the thread that forked it ends: it has copies of the parent's sockets."""
    kill_me = 1  # PR_SET_PDEATHSIG
    with contextlib.suppress(OSError, AttributeError):
        ctypes.CDLL(None).prctl(kill_me, signal.SIGKILL)


def _ended(pid: int) -> bool:
    try:
        return os.waitpid(pid, os.WNOHANG)[0] == pid
    except ChildProcessError:  # other code of this process has waited for all children
        return True


def _kill(pid: int, parent: int) -> None:
    if os.getpid() != parent:  # a child of the parent, which has this object too
        return
    for kill in (os.killpg, os.kill):  # its own children too; before it has a group, itself alone
        with contextlib.suppress(ProcessLookupError, PermissionError):
            kill(pid, signal.SIGKILL)
    with contextlib.suppress(ChildProcessError):
        os.waitpid(pid, 0)
