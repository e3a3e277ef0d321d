"""Shims that the fault harness installs in a process before its run: triggers, and the faults that they start.

A trigger waits for the `at`-th event of a kind: an operation on the run directory ("os": before and after each;
"phase": before or after one of a name, see `phases`), a batch ("batch"), a row of the log ("log"), reactions of
callbacks ("react"), an evaluated batch ("evaluate"); or it fires at the beginning ("start"). With `later` in place of
`at` it counts from the last fault. Shims patch only the processes of the harness, never a user's run.
"""

from __future__ import annotations

import builtins
import contextlib
import errno
import functools
import io
import json
import os
import resource
import signal
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from purestep.testing import kernel, phases
from purestep.testing.powercut import Recorder

Shim = Mapping[str, Any]
# Operations that change a directory tree or make it durable: each call is a moment at which a process may die.
_OPERATIONS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")


class Injector:
    """Counts the events of this process, and starts the shims that are due."""

    def __init__(self, shims: Sequence[Shim], report: Path) -> None:
        self.shims = shims
        self._one_at_a_time = threading.RLock()
        # Opened at the start, because the disk may refuse later.
        self.report = os.open(report, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
        self.counts: Counter[Any] = Counter()
        self.undo: list[Callable[[], None]] = []
        self.struck: int | None = None  # the number of batches at the last fault
        self.template: Any = None
        self.under = next((s["run_dir"] for s in shims if "run_dir" in s), "")
        self.recorders = [Recorder(Path(s["shadow"]), Path(self.under)) for s in shims if s["do"] == "record"]
        self.tracing = any(s["do"] == "trace" for s in shims)
        self.counting = any(s["do"] == "count" for s in shims)

    def note(self, kind: str, value: object) -> None:
        """Append a fact to the report before a fault is injected; the file size limit does not apply to the report."""
        with self._one_at_a_time:
            limits = resource.getrlimit(resource.RLIMIT_FSIZE)
            resource.setrlimit(resource.RLIMIT_FSIZE, (limits[1], limits[1]))
            os.write(self.report, json.dumps([kind, value]).encode() + b"\n")
            resource.setrlimit(resource.RLIMIT_FSIZE, limits)

    def tick(self, on: str, *names: str) -> None:
        """Count one more event, and start the shims that are due at this count."""
        keys: list[Any] = [(on, name) for name in names] or [on]
        for key in keys:
            self.counts[key] += 1
            for shim in self.shims:
                wanted = (shim["on"], shim["phase"]) if "phase" in shim else shim.get("on")
                at = self.struck + shim["later"] if "later" in shim and self.struck is not None else shim.get("at")
                if wanted == key and at == self.counts[key]:
                    self.set_off(shim)

    def set_off(self, shim: Shim) -> None:
        """Report a shim and the number of batches so far, then start its fault."""
        kind = _TOLD.get(shim["do"], "injected")
        with self._one_at_a_time:  # a fault starts before it is healed
            self.note(kind, shim["do"])
            self.note(f"{kind} after", self.counts["batch"])
            _ACTIONS[shim["do"]](self, shim)
            if kind == "injected":
                self.struck = self.counts["batch"]

    # --- operations of the operating system ---------------------------------------------------------------------------

    def operation(self, name: str, path: str, call: Callable[[], Any], target: str = "") -> Any:
        """Run an operation, with a moment before it and one after it, at which a process may die."""
        if not self.under or not (path + os.sep).startswith(self.under + os.sep):
            return call()
        phase = phases.fine(name, path[len(self.under) :])
        if self.tracing:
            self.note("os", phase)
        self._moment("before", phase)
        for recorder in self.recorders:
            recorder.note(name, path, target)
        result = call()
        self._moment("after", phase)
        return result

    def _moment(self, side: str, phase: str) -> None:
        self.tick("os")
        self.tick(side, phase, f"stage {phases.coarse(phase)}")


def _path(target: Any, dir_fd: int | None) -> str:
    with contextlib.suppress(OSError, TypeError, ValueError):
        if isinstance(target, int):
            return os.readlink(f"/proc/self/fd/{target}")
        text = os.fsdecode(target)
        if dir_fd is not None and not os.path.isabs(text):
            return os.path.join(os.readlink(f"/proc/self/fd/{dir_fd}"), text)
        return os.path.abspath(text)
    return ""


_real_open = open


def install(shims: Sequence[Shim], *, report: Path) -> Injector:
    """Patch this process.

    Args:
        shims: each has `do` (the fault), and most have `on` and `at` (the event, counted from 1); `run_dir` limits
            operations to paths under it.
        report: file to which facts are appended, a JSON list on each line.

    Returns:
        The injector of this process.
    """
    injector = Injector(shims, report)
    _watch_start(injector)
    if not shims:
        return injector
    for name in _OPERATIONS:
        setattr(os, name, _wrapped(injector, name))
    builtins.open = io.open = _opening(injector)
    _count_batches(injector)
    _count_calls(injector)
    for shim in shims:
        if shim.get("on") == "start":
            injector.set_off(shim)
    return injector


def _wrapped(injector: Injector, name: str) -> Callable[..., Any]:
    call = getattr(os, name)

    @functools.wraps(call)
    def operation(*args: Any, **kwargs: Any) -> Any:
        path = _path(args[0], kwargs.get("dir_fd")) if args else ""
        target = _path(args[1], None) if name in ("rename", "replace") else ""
        return injector.operation(name, path, lambda: call(*args, **kwargs), target)

    return operation


def _opening(injector: Injector) -> Callable[..., Any]:
    @functools.wraps(_real_open)
    def opened(file: Any, mode: str = "r", *args: Any, **kwargs: Any) -> Any:
        if set(mode) & set("wax+"):
            return injector.operation("open", _path(file, None), lambda: _real_open(file, mode, *args, **kwargs))
        return _real_open(file, mode, *args, **kwargs)

    return opened


def _watch_start(injector: Injector) -> None:
    """Report the snapshot from which a run resumes, and each snapshot that cannot be written."""
    from purestep.loop import resume
    from purestep.loop.saving import Saving

    begin, opened = resume.begin, Saving.open

    def opening(self: Saving, stack: contextlib.ExitStack) -> None:
        injector.note("on_save_error", self.on_save_error)
        opened(self, stack)

    Saving.open = opening  # type: ignore[method-assign]

    def watched(*args: Any, **kwargs: Any) -> Any:
        loop, at = begin(*args, **kwargs)
        injector.template = loop.train
        injector.note("resumed", at)
        return loop, at

    resume.begin = watched


def _count_batches(injector: Injector) -> None:
    from purestep.loop.input import Feed

    take = Feed.take

    def counted(self: Feed, *args: Any, **kwargs: Any) -> Iterator[Any]:
        for batch in take(self, *args, **kwargs):
            injector.tick("batch")
            yield batch
        if injector.counting:
            injector.note("batches", injector.counts["batch"])

    Feed.take = counted  # type: ignore[method-assign]


def _count_calls(injector: Injector) -> None:
    from purestep.loggers.base import Sink
    from purestep.loop.machine import Machine
    from purestep.step import Eval

    log, ask, evaluate = Sink.log, Machine._ask, Eval.__call__

    def evaluated(self: Eval, *args: Any, **kwargs: Any) -> Any:
        injector.tick("evaluate")
        return evaluate(self, *args, **kwargs)

    def logged(self: Sink, *args: Any, **kwargs: Any) -> None:
        injector.tick("log")
        log(self, *args, **kwargs)

    def asked(self: Machine, *args: Any, **kwargs: Any) -> Any:
        injector.tick("react")
        return ask(self, *args, **kwargs)

    Sink.log = logged  # type: ignore[method-assign]
    Eval.__call__ = evaluated  # type: ignore[method-assign]
    Machine._ask = asked  # type: ignore[method-assign]


# --- what is set off --------------------------------------------------------------------------------------------------


def _kill(injector: Injector, shim: Shim) -> None:
    """Kill this process at once, or shortly afterwards: then also within code outside of Python."""

    def die() -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    if "delay" in shim:
        threading.Timer(shim["delay"], die).start()
    else:
        die()


def _signals(injector: Injector, shim: Shim) -> None:
    for name in shim["signals"]:
        os.kill(os.getpid(), signal.Signals[name])


def _heal(injector: Injector, shim: Shim) -> None:
    while injector.undo:
        injector.undo.pop()()


def _refuse(injector: Injector, shim: Shim) -> None:
    kernel.refuse(getattr(errno, shim["errno"]), [1, 2, injector.report])


def _limit_files(injector: Injector, shim: Shim) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (shim["limit"], limits[1]))
    injector.undo.append(lambda: resource.setrlimit(resource.RLIMIT_FSIZE, limits))


def _fill_disk(injector: Injector, shim: Shim) -> None:
    """Fill the free space of the disk, as another program would."""
    ballast = Path(shim["ballast"])
    descriptor, size = os.open(ballast, os.O_WRONLY | os.O_CREAT), 0
    with contextlib.suppress(OSError):
        while room := (lambda found: found.f_bavail * found.f_frsize)(os.statvfs(ballast)):
            os.posix_fallocate(descriptor, size, room)
            size += room
    os.close(descriptor)
    injector.undo.append(ballast.unlink)


def _take_permission(injector: Injector, shim: Shim) -> None:
    """Remove the write permission of directories until the fault is healed."""
    for place in [path for path, _, _ in os.walk(shim["place"])]:
        with contextlib.suppress(FileNotFoundError):
            os.chmod(place, 0o555)
    injector.undo.append(lambda: give_permission(Path(shim["place"])))


def give_permission(place: Path) -> None:
    """Make a tree of directories writable again."""
    for path, _, _ in os.walk(place):
        with contextlib.suppress(FileNotFoundError):  # the run may delete partly written files meanwhile
            os.chmod(path, 0o755)


def _raise(injector: Injector, shim: Shim) -> None:
    raise RuntimeError(f"injected into {shim['on']}")


def _turn_clock_back(injector: Injector, shim: Shim) -> None:
    """Let the wall clock run backwards from now on, an hour a second; the monotonic clock is unchanged."""
    wall, since = time.time, time.monotonic()

    def backwards() -> float:
        return wall() - 3600.0 * (time.monotonic() - since) - 86400.0

    time.time = backwards
    time.time_ns = lambda: int(backwards() * 1e9)


def _kill_worker(injector: Injector, shim: Shim) -> None:
    import multiprocessing

    for worker in multiprocessing.active_children()[:1]:
        os.kill(worker.pid or 0, signal.SIGKILL)


def _stop_here(injector: Injector, shim: Shim) -> None:
    """Wait in the middle of a run until a file appears."""
    while not os.path.exists(shim["until"]):
        time.sleep(0.002)


_TOLD = {"heal": "healed", "wait": "waiting", "obey": "prepared"}
_ACTIONS: dict[str, Callable[[Injector, Shim], None]] = {
    "kill": _kill,
    "signals": _signals,
    "heal": _heal,
    "refuse": _refuse,
    "limit": _limit_files,
    "fill": _fill_disk,
    "forbid": _take_permission,
    "obey": lambda injector, shim: kernel.obey_permissions(),
    "raise": _raise,
    "clock": _turn_clock_back,
    "kill_worker": _kill_worker,
    "wait": _stop_here,
}
