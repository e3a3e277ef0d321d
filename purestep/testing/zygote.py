"""A process that has imported everything once and forks children that run a script or a function.

Importing torch, JAX and Orbax costs seconds, a fork milliseconds, so hundreds of runs can be started and killed. The
server never trains and never starts a thread. `faults` talks to it; every child is an ordinary process that ends through
the interpreter, with an exit code.
"""

from __future__ import annotations

import importlib.util
import json
import os
import runpy
import select
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

_START = "import sys; from purestep.testing import zygote; zygote.serve(int(sys.argv[1]), int(sys.argv[2]))"
_PRELOAD = (
    "purestep.trainer purestep.callbacks purestep.data purestep.loggers purestep.snapshot purestep.optim.optimizers "
    "purestep.testing.shims purestep.testing.resume orbax.checkpoint torch._subclasses.fake_tensor"
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
    """Fork a child for each request until the pipe of requests is closed. A child returns from here like a script."""
    for name in _PRELOAD:
        importlib.import_module(name)
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
                return
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
    """Be the child: redirect, inject, run, and leave by SystemExit."""
    from purestep.testing import shims

    directory = Path(request["directory"])
    directory.mkdir(parents=True, exist_ok=True)
    os.environ.update(request["env"])
    _redirect(request["stdout"] or str(directory / "stdout"), 1)
    _redirect(str(directory / "stderr"), 2)
    injector = shims.install(request["shims"], report=directory / "report")
    sys.argv = [request["file"], *request["argv"]]
    code: Any = 0
    try:
        if request["function"] is None:
            runpy.run_path(request["file"], run_name="__main__")
        else:
            result = getattr(_loaded(request["file"]), request["function"])(Path(request["argv"][0]))
            code = getattr(result, "exit_code", result if isinstance(result, int) else 0)
    except SystemExit as ended:
        code = ended.code
    if request["verify"] and not code:
        injector.note("digest", shims.digest_of(Path(request["verify"]), injector.template))
    sys.exit(code)


def _redirect(place: str, descriptor: int) -> None:
    if place == "closed":
        os.close(descriptor)
        return
    opened = os.open(place, os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o644)
    os.dup2(opened, descriptor)
    os.close(opened)
