"""A process that has imported everything once and forks children that run a script or a function.

Importing torch, JAX and Orbax costs seconds, a fork milliseconds, so hundreds of runs can be started and killed. The
server never trains and never starts a thread. `faults` talks to it; every child is a process of its own, which waits
for
its threads, runs its exit functions and says how it ended by its exit code.
"""

from __future__ import annotations

import atexit
import gc
import importlib.util
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_START = "import sys; from purestep.testing import zygote; zygote.serve(int(sys.argv[1]), int(sys.argv[2]))"
_PRELOAD = (
    "purestep.trainer purestep.callbacks purestep.data purestep.loggers purestep.snapshot purestep.optim.optimizers "
    "purestep.testing.shims purestep.testing.resume orbax.checkpoint torch._dynamo"
).split()


class Child:
    """A forked process: a pid, and its exit code once it has ended (negative: the signal that killed it)."""

    def __init__(self, zygote: Zygote, pid: int) -> None:
        self._zygote, self.pid = zygote, pid

    def wait(self, timeout: float = 120.0) -> int:
        """Return the exit code.

        Raises:
            TimeoutError: the process did not end in time; it has been killed.
        """
        return self._zygote._exit_of(self.pid, timeout)

    def ended(self, within: float) -> bool:
        """Tell whether the process ends within so many seconds."""
        return self._zygote._ended(self.pid, time.monotonic() + within)

    def signal(self, number: int) -> None:
        """Send a signal, unless the process has ended."""
        if not self.ended(0.0):
            os.kill(self.pid, number)


class Zygote:
    """The client: starts the server with the first child, ends it with `close`."""

    def __init__(self) -> None:
        self._process: subprocess.Popen[bytes] | None = None
        self._exits: dict[int, int] = {}
        self._pids: list[int] = []
        self._buffer = b""

    def start(
        self,
        file: Path,
        function: str | None,
        argv: Sequence[str],
        *,
        directory: Path,
        env: Mapping[str, str],
        shims: Sequence[Mapping[str, Any]] = (),
        stdout: str = "",
        verify: str = "",
    ) -> Child:
        """Fork a child.

        Args:
            file: Python file of the script or function.
            function: its name, called with a Path made of the first argument; None runs the file as a script.
            argv: arguments.
            directory: where the child's `stdout`, `stderr` and `report` go.
            env: environment variables to add.
            shims: what to inject, see `shims.install`.
            stdout: another place for its standard output: a path, or "closed".
            verify: a run directory whose newest snapshot the child reads and reports the digest of, if it ends well.
        """
        request = {
            "file": str(file),
            "function": function,
            "argv": list(argv),
            "directory": str(directory),
            "env": dict(env),
            "shims": [dict(shim) for shim in shims],
            "stdout": stdout,
            "verify": verify,
        }
        if self._process is None:
            self._open()
        os.write(self._requests, json.dumps(request).encode() + b"\n")
        while not self._pids:
            self._read(time.monotonic() + 120.0)
        return Child(self, self._pids.pop())

    def _open(self) -> None:
        there, self._requests = os.pipe()
        self._replies, back = os.pipe()
        root = str(Path(__file__).resolve().parents[2])
        env = os.environ | {"PYTHONPATH": os.pathsep.join([root, *filter(None, [os.environ.get("PYTHONPATH")])])}
        command = [sys.executable, "-c", _START, str(there), str(back)]
        self._process = subprocess.Popen(command, pass_fds=(there, back), env=env, stdin=subprocess.DEVNULL)
        os.close(there)
        os.close(back)

    def _read(self, deadline: float) -> bool:
        ready, _, _ = select.select([self._replies], [], [], max(0.0, deadline - time.monotonic()))
        if not ready:
            return False
        piece = os.read(self._replies, 65536)
        if not piece:
            raise RuntimeError("the process that forks the runs has ended; its error is on stderr")
        self._buffer += piece
        *lines, self._buffer = self._buffer.split(b"\n")
        for line in lines:
            kind, pid, *code = json.loads(line)
            if kind == "started":
                self._pids.append(pid)
            else:
                self._exits[pid] = code[0]
        return True

    def _ended(self, pid: int, deadline: float) -> bool:
        while pid not in self._exits:
            if not self._read(deadline):
                return False
        return True

    def _exit_of(self, pid: int, timeout: float) -> int:
        if not self._ended(pid, time.monotonic() + timeout):
            os.kill(pid, signal.SIGKILL)
            self._ended(pid, time.monotonic() + 30.0)
            raise TimeoutError(f"process {pid} did not end within {timeout:g} seconds")
        return self._exits[pid]

    def close(self) -> None:
        """End the server."""
        process, self._process = self._process, None
        if process is not None:
            os.close(self._requests)
            process.wait(30)
            os.close(self._replies)

    def __enter__(self) -> Zygote:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


# --- the server -------------------------------------------------------------------------------------------------------


def serve(requests: int, replies: int) -> None:
    """Fork a child for each request until the pipe of requests is closed."""
    for name in _PRELOAD:
        importlib.import_module(name)
    gc.collect()
    gc.freeze()  # a collection in a child would copy every page that it looks at
    wake, note = os.pipe()
    os.set_blocking(note, False)
    os.set_blocking(wake, False)
    old = signal.signal(signal.SIGCHLD, lambda number, frame: None)
    previous = signal.set_wakeup_fd(note)
    buffer = b""
    while True:
        ready, _, _ = select.select([requests, wake], [], [], 1.0)
        if wake in ready:
            os.read(wake, 4096)
        _reap(replies)
        if requests not in ready:
            continue
        piece = os.read(requests, 65536)
        if not piece:
            return
        buffer += piece
        *lines, buffer = buffer.split(b"\n")
        for request in map(json.loads, lines):
            if request["function"] is not None:
                _loaded(request["file"])
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(previous)
                signal.signal(signal.SIGCHLD, old)
                for descriptor in (requests, replies, wake, note):
                    os.close(descriptor)
                _run(request)
            os.write(replies, json.dumps(["started", pid]).encode() + b"\n")


def _reap(replies: int) -> None:
    while True:
        try:
            pid, status = os.waitpid(-1, os.WNOHANG)
        except ChildProcessError:
            return
        if pid == 0:
            return
        os.write(replies, json.dumps(["ended", pid, os.waitstatus_to_exitcode(status)]).encode() + b"\n")


def _loaded(file: str) -> Any:
    """Import a file once, under its own name, so that its classes and functions can be pickled."""
    name = Path(file).stem
    if name not in sys.modules:
        sys.path.insert(0, str(Path(file).parent))
        spec = importlib.util.spec_from_file_location(name, file)
        module = sys.modules[name] = importlib.util.module_from_spec(spec)  # type: ignore[arg-type]
        spec.loader.exec_module(module)  # type: ignore[union-attr]
    return sys.modules[name]


def _run(request: Mapping[str, Any]) -> None:
    """Be the child: redirect, inject, run, and leave."""
    from purestep.testing import shims

    directory = Path(request["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    os.environ.update(request["env"])
    _redirect(request["stdout"] or str(directory / "stdout"), 1)
    _redirect(str(directory / "stderr"), 2)
    injector = shims.install(request["shims"], report=directory / "report")
    sys.argv = [request["file"], *request["argv"]]
    try:
        code = _called(request)
        if request["verify"] and not code:
            injector.note("digest", shims.digest_of(Path(request["verify"]), injector.template))
    except KeyboardInterrupt:
        traceback.print_exc()
        code = -signal.SIGINT
    except BaseException:
        traceback.print_exc()
        code = 1
    _leave(code)


def _called(request: Mapping[str, Any]) -> int:
    try:
        if request["function"] is None:
            runpy.run_path(request["file"], run_name="__main__")
            return 0
        result = getattr(_loaded(request["file"]), request["function"])(Path(request["argv"][0]))
        return getattr(result, "exit_code", result if isinstance(result, int) else 0)
    except SystemExit as ended:
        return ended.code if isinstance(ended.code, int) else int(ended.code is not None)


def _leave(code: int) -> None:
    """End as the interpreter does: threads, exit functions, flush, code. Taking all modules apart first, in every
    child, would take longer than the runs."""
    threading._shutdown()  # type: ignore[attr-defined]
    atexit._run_exitfuncs()
    try:
        if sys.stdout is not None:
            sys.stdout.flush()
    except (OSError, ValueError):
        code = code or 120
    if code < 0:
        signal.signal(-code, signal.SIG_DFL)
        os.kill(os.getpid(), -code)
    os._exit(code)


def _redirect(place: str, descriptor: int) -> None:
    if place == "closed":
        os.close(descriptor)
        return
    opened = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(opened, descriptor)
    os.close(opened)
