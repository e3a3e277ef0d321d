"""The zygote: a process that imports torch once, and forks a child for each order within milliseconds.

A child behaves as `python -c SCRIPT` or `python script.py`: its own `__main__`, `sys.argv`, `sys.path`, environment,
working directory, standard streams and signal handlers; it ends as an interpreter ends, with tracebacks, joined
threads, `atexit` and exit codes (negative for signals). Unlike a new interpreter, a child has torch, numpy and purestep
already imported, with the environment of the zygote, and it does not tear down modules at the end.
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
import sys
import threading
import types
from pathlib import Path
from typing import Any

_interrupts: Any = signal.default_int_handler  # the initial handler of SIGINT in this process


def main() -> None:
    """Run the zygote: `sys.argv` holds the descriptor of a socket, and the modules to import first."""
    atexit.register(ending := _Ending())  # the first registered function is called last
    sys.path.pop(0)  # the directory of the start, which a script would not have there
    global _interrupts
    _interrupts = signal.signal(signal.SIGINT, signal.SIG_IGN)
    descriptor, modules = int(sys.argv[1]), sys.argv[2:]
    for name in modules:
        importlib.import_module(name)
    gc.freeze()  # collections in the children need not look at what they share
    ending.run(*main_module(serve(socket.socket(fileno=descriptor))))


def serve(link: socket.socket) -> dict[str, Any]:
    """Fork a child for each order until the link closes. Returns in the children only, with the order."""
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


def _tell(link: socket.socket, **message: object) -> None:
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
    signal.signal(signal.SIGINT, _interrupts)  # a background job of a shell ignores SIGINT, as do its children
    os.chdir(order["cwd"])
    os.environ.clear()
    os.environ.update(order["env"])
    here: Any = sys  # the type stubs declare `sys.__stdout__` and so on final
    here.stdin = here.__stdin__ = os.fdopen(0, closefd=False)
    here.stdout = here.__stdout__ = os.fdopen(1, "w", closefd=False)
    here.stderr = here.__stderr__ = os.fdopen(2, "w", buffering=1, errors="backslashreplace", closefd=False)
    if order["env"].get("PYTHONUNBUFFERED"):
        here.stdout.reconfigure(write_through=True)
    sys.modules["numpy"].random.seed()
    sys.argv = [order["code"] if order["is_path"] else "-c", *order["arguments"]]
    sys.path.insert(0, str(Path(order["code"]).parent) if order["is_path"] else "")


def main_module(order: dict[str, Any]) -> tuple[types.CodeType, dict[str, Any]]:
    """Return the compiled script of an order, and the namespace of its `__main__`."""
    path = order["code"] if order["is_path"] else "<string>"
    source = Path(path).read_text() if order["is_path"] else order["code"]
    main = types.ModuleType("__main__")
    main.__dict__.update(__builtins__=builtins)
    if order["is_path"]:
        main.__file__ = path
    sys.modules["__main__"] = main
    return compile(source, path, "exec"), main.__dict__


class _Ending:
    """The end of an interpreter, without the half second in which torch's modules are torn down."""

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
        """Called by `atexit` after all other registered functions, and after threads have ended."""
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
