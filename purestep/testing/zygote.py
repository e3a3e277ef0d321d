"""Separate processes that start in 30 ms instead of 2 s: a zygote imports torch once and forks them.

    zygotes = Zygotes()
    done = zygotes.run("import sys, purestep; print(sys.argv)", "an argument")   # or the Path of a script
    with zygotes.popen(script, str(directory), preload="orbax.checkpoint") as child:   # as subprocess.Popen
        child.stdout.readline()
        child.kill()

This file is the client; `forks` is the zygote, and describes its children. The fault harness runs a training hundreds
of times through it, and tests start processes that do not need a fresh interpreter.
"""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import IO, Any, Self

_ROOT = Path(__file__).resolve().parents[2]
_PRELOAD = "numpy numpy.random torch purestep purestep.data purestep.loop purestep.callbacks"
_START = "from purestep.testing import forks; forks.main()"


class Zygotes:
    """The zygotes of a session, one for each list of preloaded modules, started on first use.

    Args:
        options: options of the interpreter, which its children inherit.
    """

    def __init__(self, options: Sequence[str] = ()) -> None:
        self._options = tuple(options)
        self._running: dict[str, _Link] = {}

    def run(
        self, code: str | Path, *arguments: str, timeout: float = 120, **options: Any
    ) -> subprocess.CompletedProcess[str]:
        """Run to the end, and return the text of both streams.

        Args:
            code: the text of a script, or its path.
            arguments: the rest of `sys.argv`.
            timeout: seconds after which the child is killed and `subprocess.TimeoutExpired` raised.
            options: as for `popen`.
        """
        with self.popen(code, *arguments, **options) as child:
            out, errors = child.communicate(timeout)
        return subprocess.CompletedProcess([str(code), *arguments], child.wait(), out, errors)

    def popen(
        self,
        code: str | Path,
        *arguments: str,
        env: Mapping[str, str] | None = None,
        cwd: str | Path | None = None,
        preload: str = "",
        start_new_session: bool = False,
        stdin: int | None = None,
        stdout: int | None = subprocess.PIPE,
        stderr: int | None = subprocess.PIPE,
    ) -> Child:
        """Start a child.

        Args:
            code: the text of a script, or its path.
            arguments: the rest of `sys.argv`.
            env: environment; that of this process by default.
            cwd: working directory; that of this process by default.
            preload: modules to import once, separated by blanks, before anything is forked. They must start no thread.
            start_new_session: make it the leader of a session.
            stdin, stdout, stderr: `subprocess.PIPE`, a file descriptor, or None for the null device.

        Raises:
            RuntimeError: the zygote cannot fork.
        """
        link = self._running.get(preload)
        if link is None:
            link = self._running[preload] = _Link(preload, self._options)
        order = {
            "code": str(code),
            "is_path": isinstance(code, Path),
            "arguments": [str(a) for a in arguments],
            "env": {"PYTHONPATH": str(_ROOT), **(os.environ if env is None else env)},
            "cwd": str(cwd or os.getcwd()),
            "session": start_new_session,
        }
        return Child(link, order, (stdin, stdout, stderr))

    def close(self) -> None:
        """End the zygotes and all remaining children."""
        for link in self._running.values():
            link.close()
        self._running.clear()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


class Child:
    """A forked process, with a part of the interface of `subprocess.Popen`; its streams are text.

    Attributes:
        pid: id of the process.
        returncode: exit code once the end of the process is known, negative for a signal; else None.
        stdin, stdout, stderr: files of the streams that are pipes; else None.
    """

    # Typed Any, because the caller knows which streams are pipes.
    stdin: Any
    stdout: Any
    stderr: Any

    def __init__(self, link: _Link, order: dict[str, Any], streams: tuple[int | None, ...]) -> None:
        theirs: list[int] = []
        ours: list[int] = []
        files: list[IO[str] | None] = []
        for number, stream in enumerate(streams):
            file = None
            if stream == subprocess.PIPE:
                read, write = os.pipe()
                file = os.fdopen(read, encoding="utf-8") if number else os.fdopen(write, "w", encoding="utf-8")
                stream = write if number else read
                ours.append(stream)
            elif stream is None:
                stream = os.open(os.devnull, os.O_RDWR)
                ours.append(stream)
            theirs.append(stream)
            files.append(file)
        self.stdin, self.stdout, self.stderr = files
        self.returncode: int | None = None
        self._link = link
        try:
            self.pid = link.start(order, theirs)
        except RuntimeError:
            for opened in filter(None, files):
                opened.close()
            raise
        finally:
            for descriptor in ours:
                os.close(descriptor)

    def poll(self) -> int | None:
        """Return the exit code, negative for a signal; None while it runs."""
        if self.returncode is None:
            self.returncode = self._link.ended(self.pid, 0)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        """Wait for the end of the process; return the exit code.

        Raises:
            subprocess.TimeoutExpired: the process has not ended after `timeout` seconds.
        """
        if self.returncode is None:
            self.returncode = self._link.ended(self.pid, timeout)
        if self.returncode is None:
            raise subprocess.TimeoutExpired(f"child {self.pid} of the zygote", timeout or 0)
        return self.returncode

    def communicate(self, timeout: float | None = None) -> tuple[str, str]:
        """Read both streams to their end and wait; kill the process after `timeout` seconds."""
        if self.stdin is not None:
            self.stdin.close()
        texts = {1: "", 2: ""}

        def read(number: int, file: IO[str]) -> None:
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
        """Send a signal, unless the process is known to have ended."""
        if self.poll() is None:
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self) -> None:
        """Send SIGKILL."""
        self.send_signal(signal.SIGKILL)

    def terminate(self) -> None:
        """Send SIGTERM."""
        self.send_signal(signal.SIGTERM)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        self.kill()
        self.wait()
        for file in (self.stdin, self.stdout, self.stderr):
            if file is not None:
                with contextlib.suppress(BrokenPipeError):
                    file.close()


class _Link:
    """The socket to a running zygote."""

    def __init__(self, preload: str, options: Sequence[str]) -> None:
        self._ours, theirs = socket.socketpair()
        number = str(theirs.fileno())
        command = [sys.executable, *options, "-c", _START, number, *_PRELOAD.split(), *preload.split()]
        path = os.pathsep.join([str(_ROOT), *filter(None, [os.environ.get("PYTHONPATH")])])
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

    def start(self, order: dict[str, Any], streams: list[int]) -> int:
        """Request a child; return its pid."""
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
                    return int(reply["started"])
                self._codes[reply["ended"]] = reply["code"]

    def ended(self, pid: int, timeout: float | None) -> int | None:
        """Return the exit code of a child; None if it has not ended within `timeout` seconds."""
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
        reply: dict[str, Any] = json.loads(line)
        return reply

    def close(self) -> None:
        """End the zygote and its children."""
        self._ours.close()  # which the zygote takes for the end
        self._process.wait(30)
