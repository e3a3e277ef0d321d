"""What the fault harness installs in a child before its run: triggers, and what they set off.

A trigger counts operations of the operating system under the run directory ("os"; "save" those on snapshots), batches
("batch"), rows of the log ("log"), reactions of callbacks ("react"), or is there from the beginning ("start"). All
of it is patched in one process that ends soon; nothing here is used by a run of a user's.
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
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from purestep.testing.powercut import Recorder

Shim = Mapping[str, Any]
# What changes a directory tree, and what makes it durable: each call is a moment at which a process may die.
_OPERATIONS = ("mkdir", "rename", "replace", "unlink", "rmdir", "fsync")


class Injector:
    """Counts what happens in this process, and sets off the shims that are due."""

    def __init__(self, shims: Sequence[Shim], report: Path) -> None:
        self.shims, self.report = shims, report
        self.counts = {"os": 0, "save": 0, "batch": 0, "log": 0, "react": 0, "start": 0}
        self.failing: set[int] = set()
        self.template: Any = None
        self.under = next((s["run_dir"] for s in shims if "run_dir" in s), "")
        self.recorders = [Recorder(Path(s["shadow"]), Path(self.under)) for s in shims if s["do"] == "record"]
        self.tracing = any(s["do"] == "trace" for s in shims)
        self.counting = any(s["do"] == "count" for s in shims)

    def note(self, kind: str, value: Any) -> None:
        """Append a fact to the report, which survives whatever comes next."""
        with _real_open(self.report, "a") as file:
            file.write(json.dumps([kind, value]) + "\n")

    def tick(self, on: str) -> None:
        """Count one more of something, and set off what is due at this count."""
        self.counts[on] += 1
        for shim in self.shims:
            if shim.get("on") == on and shim.get("at") == self.counts[on]:
                self.note("injected", shim["do"])
                _ACTIONS[shim["do"]](self, shim)

    # --- operations of the operating system ---------------------------------------------------------------------------

    def operation(self, name: str, path: str, call: Callable[[], Any], target: str = "") -> Any:
        """Do an operation, or fail as the disk would. It is counted twice: a process may die before and after it."""
        if not self.under or not (path + os.sep).startswith(self.under + os.sep):
            return call()
        if self.tracing:
            self.note("os", f"{name} {path[len(self.under) :]}")
        in_snapshots = path[len(self.under) :].startswith("/snapshots")
        self._moment(in_snapshots)
        for number in self.failing:
            # A full disk still lets go of what is there; one that is read-only changes nothing at all.
            if number == errno.EROFS or name not in ("unlink", "rmdir"):
                raise OSError(number, os.strerror(number), path)
        for recorder in self.recorders:
            recorder.note(name, path, target)
        result = call()
        self._moment(in_snapshots)
        return result

    def _moment(self, in_snapshots: bool) -> None:
        self.tick("os")
        if in_snapshots:
            self.tick("save")


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
        shims: each says `do` (what), and for most `on` and `at` (when, counted from 1); `run_dir` limits operations to
            those under it.
        report: file that facts are appended to, a JSON list a line.

    Returns:
        What counts in this process.
    """
    injector = Injector(shims, report)
    _watch_resume(injector)
    if not shims:
        return injector
    for name in _OPERATIONS:
        setattr(os, name, _wrapped(injector, name))
    builtins.open = io.open = _opening(injector)
    _count_batches(injector)
    _count_calls(injector)
    for shim in shims:
        if shim.get("on") == "start":
            injector.note("injected", shim["do"])
            _ACTIONS[shim["do"]](injector, shim)
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


def _watch_resume(injector: Injector) -> None:
    """Report which snapshot a run begins with."""
    from purestep.loop import resume

    begin = resume.begin

    def watched(*args: Any, **kwargs: Any) -> Any:
        loop, at = begin(*args, **kwargs)
        injector.template = loop.train
        injector.note("resumed", at)
        return loop, at

    resume.begin = watched


def digest_of(run_dir: Path, train: Any) -> str:
    """Return the digest of the newest snapshot of a run: of all that must not depend on interruptions.

    Args:
        run_dir: the run directory.
        train: a train state of the structure that is stored.
    """
    from purestep import snapshot, tree
    from purestep.loop.events import LoopState
    from purestep.loop.resume import store_root
    from purestep.testing.resume import comparable

    like = LoopState(train, cursor=..., callbacks=..., status=..., elapsed=0.0)  # type: ignore[arg-type]
    restored = snapshot.Store(store_root(run_dir)).restore(like, fallback=False)
    return tree.digest(comparable(restored.value))


def _count_batches(injector: Injector) -> None:
    from purestep.loop.feed import Feed

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

    log, ask = Sink.log, Machine._ask

    def logged(self: Sink, *args: Any, **kwargs: Any) -> None:
        injector.tick("log")
        log(self, *args, **kwargs)

    def asked(self: Machine, *args: Any, **kwargs: Any) -> Any:
        injector.tick("react")
        return ask(self, *args, **kwargs)

    Sink.log = logged  # type: ignore[method-assign]
    Machine._ask = asked  # type: ignore[method-assign]


# --- what is set off --------------------------------------------------------------------------------------------------


def _kill(injector: Injector, shim: Shim) -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _signals(injector: Injector, shim: Shim) -> None:
    for name in shim["signals"]:
        os.kill(os.getpid(), signal.Signals[name])


def _fail(injector: Injector, shim: Shim) -> None:
    injector.failing.add(getattr(errno, shim["errno"]))


def _heal(injector: Injector, shim: Shim) -> None:
    injector.failing.clear()
    if "limit" in shim:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def _limit_files(injector: Injector, shim: Shim) -> None:
    resource.setrlimit(resource.RLIMIT_FSIZE, (shim["limit"], resource.RLIM_INFINITY))


def _raise(injector: Injector, shim: Shim) -> None:
    raise RuntimeError(f"injected into {shim['on']}")


def _turn_clock_back(injector: Injector, shim: Shim) -> None:
    """From here on the wall clock runs backwards, an hour a second; the monotonic clock cannot."""
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
    injector.note("waiting", os.getpid())
    while not os.path.exists(shim["until"]):
        time.sleep(0.002)


def _nothing(injector: Injector, shim: Shim) -> None:
    """Recording and tracing have no moment."""


_ACTIONS: dict[str, Callable[[Injector, Shim], None]] = {
    "kill": _kill,
    "signals": _signals,
    "fail": _fail,
    "heal": _heal,
    "limit": _limit_files,
    "raise": _raise,
    "clock": _turn_clock_back,
    "kill_worker": _kill_worker,
    "wait": _stop_here,
    "record": _nothing,
    "trace": _nothing,
    "count": _nothing,
}
