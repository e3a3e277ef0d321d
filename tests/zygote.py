"""Processes of their own for tests, in 30 ms instead of 2 s each: a zygote imports torch once and forks them.

Use the fixture `zygote` (of the session, see `conftest.py`) wherever a test needs another process but not another
interpreter:

    done = zygote.run("import sys, purestep; print(sys.argv)", "an argument")   # or the Path of a script
    assert (done.returncode, done.stdout, done.stderr) == (0, "['-c', 'an argument']\\n", "")

    with zygote.popen(SCRIPT, str(tmp_path), preload="orbax.checkpoint") as child:   # as subprocess.Popen
        child.stdout.readline()
        child.kill()

A child is what `python -W error -c SCRIPT` or `python -W error script.py` would be: its own `__main__`, `sys.argv`,
`sys.path`, environment, working directory, standard streams and signal handlers; it ends as an interpreter ends, with
tracebacks, threads waited for, `atexit` and exit codes (negative for signals). It can be killed, start workers, ...

What it is not: a fresh import. `torch`, `numpy` and `purestep` are loaded, and read the environment (OMP_NUM_THREADS)
when the zygote began; and modules are not taken apart at the end. So tests of what gets imported, of the exit of the
real command, and of scripts that a user starts keep `subprocess`. `preload=` names modules, separated by blanks, to
import once more than that; each such list has a zygote of its own. A zygote that has threads refuses to fork.
"""

from __future__ import annotations

import atexit
import builtins
import contextlib
import gc
import importlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
import types
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PRELOAD = "numpy numpy.random torch purestep purestep.data purestep.loop purestep.callbacks"

# --- the side of the tests --------------------------------------------------------------------------------------------


class Zygotes:
    """The zygotes of a session, one a list of preloaded modules, each started when first used."""

    def __init__(self) -> None:
        self._running: dict[str, _Link] = {}

    def run(self, code: str | Path, *arguments: str, timeout: float = 120, **options: Any) -> Any:
        """Run to the end; give a `subprocess.CompletedProcess` with the text of both streams.

        Args:
            code: a script's text, or the path of one.
            arguments: what follows in `sys.argv`.
            timeout: in seconds; then the child is killed and `subprocess.TimeoutExpired` raised.
            options: as of `popen`.
        """
        with self.popen(code, *arguments, **options) as child:
            out, errors = child.communicate(timeout)
        return subprocess.CompletedProcess([str(code), *arguments], child.returncode, out, errors)

    def popen(
        self,
        code: str | Path,
        *arguments: str,
        env: dict[str, str] | None = None,
        cwd: str | Path | None = None,
        preload: str = "",
        start_new_session: bool = False,
        stdin: int | None = None,
        stdout: int | None = subprocess.PIPE,
        stderr: int | None = subprocess.PIPE,
    ) -> Child:
        """Start a child. Streams are `subprocess.PIPE`, a file descriptor, or None for the null device."""
        link = self._running.get(preload)
        if link is None:
            link = self._running[preload] = _Link(preload)
        order = {
            "code": str(code),
            "is_path": isinstance(code, Path),
            "arguments": [str(a) for a in arguments],
            "env": {"PYTHONPATH": str(ROOT), **(dict(os.environ) if env is None else env)},
            "cwd": str(cwd or os.getcwd()),
            "session": start_new_session,
        }
        return Child(link, order, (stdin, stdout, stderr))

    def close(self) -> None:
        """End the zygotes and every child that is left."""
        for link in self._running.values():
            link.close()
        self._running.clear()


class Child:
    """A forked process, with what tests use of `subprocess.Popen`; its streams are text."""

    def __init__(self, link: _Link, order: dict[str, Any], streams: tuple[int | None, ...]) -> None:
        theirs, files, ours = [], [], []
        for number, stream in enumerate(streams):
            read = write = -1
            if stream == subprocess.PIPE:
                read, write = os.pipe()
            elif stream is None:
                read = write = os.open(os.devnull, os.O_RDWR)
            theirs.append(stream if read < 0 else write if number else read)
            if stream == subprocess.PIPE:
                ours.append(write if number else read)
                files.append(os.fdopen(read, encoding="utf-8") if number else os.fdopen(write, "w", encoding="utf-8"))
            else:
                ours += [read] if read >= 0 else []
                files.append(None)
        self.stdin, self.stdout, self.stderr = files
        self.returncode: int | None = None
        self._link = link
        try:
            self.pid = link.start(order, theirs)
        except RuntimeError:
            for file in filter(None, files):
                file.close()
            raise
        finally:
            for descriptor in ours:
                os.close(descriptor)

    def poll(self) -> int | None:
        """The exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._link.ended(self.pid, 0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for its end; give the exit code."""
        if self.returncode is None:
            self.returncode = self._link.ended(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"child {self.pid} of the zygote", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read both streams to their end and wait; kill it when that takes longer."""
        if self.stdin is not None:
            self.stdin.close()
        texts = {1: "", 2: ""}

        def read(number: int, file: Any) -> None:
            texts[number] = file.read()

        files = {1: self.stdout, 2: self.stderr}
        threads = [threading.Thread(target=read, args=item, daemon=True) for item in files.items() if item[1]]
        for thread in threads:
            thread.start()
        try:
            self.wait(timeout)
        except subprocess.TimeoutExpired:
            self.kill()
            self.wait()
            raise
        finally:
            for thread in threads:
                thread.join(10)  # a grandchild may hold the pipe for longer
        return texts[1], texts[2]

    def send_signal(self, number: int) -> None:
        """Send a signal, unless it is known to have ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> Child:
        return self

    def __exit__(self, *_: object) -> None:
        self.kill()
        self.wait()
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):
                    file.close()


class _Link:
    """The socket to a running zygote."""

    def __init__(self, preload: str) -> None:
        self._ours, theirs = socket.socketpair()
        command = [sys.executable, "-W", "error", __file__, str(theirs.fileno()), *PRELOAD.split(), *preload.split()]
        path = os.pathsep.join([str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
        self._process = subprocess.Popen(
            command,
            env={"OMP_NUM_THREADS": "1"} | os.environ | {"PYTHONPATH": path},
            pass_fds=[theirs.fileno()],
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        theirs.close()
        self._buffer = b""
        self._codes: dict[int, int] = {}
        self._lock = threading.RLock()

    def start(self, order: dict[str, Any], streams: list[int | None]) -> int:
        with self._lock:
            payload = json.dumps(order).encode()
            socket.send_fds(self._ours, [len(payload).to_bytes(8, "big")], streams)
            self._ours.sendall(payload)
            while True:
                reply = self._receive(120)
                if reply is None:
                    raise RuntimeError("the zygote did not answer; its own words are on stderr")
                if "refused" in reply:
                    raise RuntimeError(reply["refused"])
                if "started" in reply:
                    return reply["started"]
                self._codes[reply["ended"]] = reply["code"]

    def ended(self, pid: int, timeout: float | None) -> int | None:
        end = None if timeout is None else time.monotonic() + timeout
        while True:
            with self._lock:
                if pid in self._codes:
                    return self._codes.pop(pid)
                reply = self._receive(0 if end is None else max(0.0, min(0.05, end - time.monotonic())))
                if reply is not None:
                    self._codes[reply["ended"]] = reply["code"]
                    continue
            if end is not None and time.monotonic() >= end:
                return None
            if end is None:
                time.sleep(0.005)

    def _receive(self, timeout: float) -> dict[str, Any] | None:
        while b"\n" not in self._buffer:
            if not select.select([self._ours], [], [], timeout)[0]:
                return None
            data = self._ours.recv(65536)
            if not data:
                raise RuntimeError(f"the zygote ended with code {self._process.wait()}; its own words are on stderr")
            self._buffer += data
        line, _, self._buffer = self._buffer.partition(b"\n")
        return json.loads(line)

    def close(self) -> None:
        self._ours.close()  # which the zygote takes for the end
        self._process.wait(30)


# --- the side of the zygote -------------------------------------------------------------------------------------------


def serve(link: socket.socket) -> dict[str, Any]:
    """Fork a child an order, until the link closes. Returns in the children only: with the order."""
    wake, alarm = socket.socketpair()
    wake.setblocking(False)
    alarm.setblocking(False)
    signal.set_wakeup_fd(alarm.fileno(), warn_on_full_buffer=False)
    signal.signal(signal.SIGCHLD, lambda *_: None)
    children: set[int] = set()
    while True:
        ready = select.select([link, wake], [], [])[0]
        if wake in ready:
            wake.recv(4096)
            for pid in list(children):
                done, status = os.waitpid(pid, os.WNOHANG)
                if done:
                    children.discard(pid)
                    _tell(link, ended=pid, code=os.waitstatus_to_exitcode(status))
        if link not in ready:
            continue
        order, streams = _order(link)
        if order is None:
            for pid in children:
                os.kill(pid, signal.SIGKILL)
                os.waitpid(pid, 0)
            os._exit(0)
        if _threads() > 1:
            _tell(link, refused=f"the zygote has {_threads()} threads, and a fork would lose all but one of them")
        else:
            pid = os.fork()
            if pid == 0:
                signal.set_wakeup_fd(-1)
                for end in (link, wake, alarm):
                    end.close()
                _settle(order, streams)
                return order
            children.add(pid)
            _tell(link, started=pid)
        for descriptor in streams:
            os.close(descriptor)


def _tell(link: socket.socket, **message: Any) -> None:
    with contextlib.suppress(BrokenPipeError):
        link.sendall(json.dumps(message).encode() + b"\n")


def _order(link: socket.socket) -> tuple[Any, list[int]]:
    head, streams, _, _ = socket.recv_fds(link, 8, 3)
    left = int.from_bytes(head, "big")
    payload = b""
    while len(payload) < left:
        payload += link.recv(left - len(payload))
    return (json.loads(payload) if head else None), streams


def _threads() -> int:
    tasks = "/proc/self/task"
    return len(os.listdir(tasks)) if os.path.isdir(tasks) else threading.active_count()


def _settle(order: dict[str, Any], streams: list[int]) -> None:
    """Make this process look like an interpreter that was just started."""
    if order["session"]:
        os.setsid()
    for number, descriptor in enumerate(streams):
        os.dup2(descriptor, number)
        os.set_inheritable(number, True)
    for descriptor in streams:
        if descriptor > 2:
            os.close(descriptor)
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    signal.signal(signal.SIGINT, signal.default_int_handler)
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    sys.stdin = sys.__stdin__ = os.fdopen(0, closefd=False)
    sys.stdout = sys.__stdout__ = os.fdopen(1, "w", closefd=False)
    sys.stderr = sys.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    if order["env"].get("PYTHONUNBUFFERED"):
        sys.stdout.reconfigure(write_through=True)
    sys.modules["numpy"].random.seed()
    sys.argv = [order["code"] if order["is_path"] else "-c", *order["arguments"]]
    sys.path.insert(0, str(Path(order["code"]).parent) if order["is_path"] else "")


def main_module(order: dict[str, Any]) -> tuple[types.CodeType, dict[str, Any]]:
    """The compiled script of an order, and the namespace of the `__main__` that it is to run in."""
    path = order["code"] if order["is_path"] else "<string>"
    source = Path(path).read_text() if order["is_path"] else order["code"]
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins)
    if order["is_path"]:
        main.__file__ = path
    sys.modules["__main__"] = main
    return compile(source, path, "exec"), main.__dict__


class _Ending:
    """The last thing that an interpreter does, without half a second of taking torch's modules apart."""

    def __init__(self) -> None:
        self.here = os.getpid()
        self.code: int | None = 0

    def run(self, code: types.CodeType, namespace: dict[str, Any]) -> None:
        self.here = os.getpid()
        try:
            exec(code, namespace)
        except SystemExit as end:
            self.code = 0 if end.code is None else end.code & 0xFF if isinstance(end.code, int) else 1
            raise
        except KeyboardInterrupt:
            self.code = None
            raise
        except BaseException:
            self.code = 1
            raise

    def __call__(self) -> None:
        """Called by `atexit` after everything else that is registered there, and after threads were waited for."""
        if os.getpid() != self.here:
            return  # a process that the child forked
        for stream in (sys.stdout, sys.stderr):
            try:
                if stream is not None and not stream.closed:
                    stream.flush()
            except OSError as error:
                os.write(2, f"Exception ignored: {error!r}\n".encode())
                self.code = 120
        if self.code is None:
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            os.kill(os.getpid(), signal.SIGINT)
        os._exit(self.code or 0)


if __name__ == "__main__":
    atexit.register(ending := _Ending())  # the first to be registered is the last to be called
    kept = sys.modules["__main__"]  # whose functions are on the stack
    sys.path.pop(0)  # the directory of the tests, which no script would have there
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor, modules = int(sys.argv[1]), sys.argv[2:]
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # collections in the children need not look at what they share
    ending.run(*main_module(serve(socket.socket(fileno=descriptor))))
