"""An interpreter that has imported numpy and torch and nothing else: what purestep loads is seen in forks of it.

A test of imports needs an interpreter of its own, and 2 s of 2.2 s go into torch. The fixture `bare` shares one.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
SERVER = """
import json, os, signal, sys
import numpy, torch
for line in sys.stdin:
    order = json.loads(line)
    if not os.fork():
        break
    print(os.waitstatus_to_exitcode(os.wait()[1]), flush=True)
else:
    os._exit(0)
for number, path in enumerate([os.devnull, order["stdout"], order["stderr"]]):
    os.dup2(os.open(path, os.O_RDWR | os.O_CREAT), number)
signal.alarm(120)  # it does not hang
os.environ.clear(), os.environ.update(order["env"])
sys.argv = ["-c", *order["arguments"]]
exec(compile(order["code"], "<code>", "exec"), {"__name__": "__main__"})
"""


class Interpreter:
    """Runs code in forks of one interpreter, started when it is first used."""

    def __init__(self) -> None:
        self._server: subprocess.Popen[str] | None = None

    def run(
        self, code: str, *arguments: str, env: dict[str, str] | None = None, stdout: str | None = None
    ) -> subprocess.CompletedProcess[str]:
        """Run code to its end, as `python -c` would.

        Args:
            code: a script's text. In its `sys.modules` are numpy, torch, and what these import.
            arguments: what follows in `sys.argv`.
            env: environment; that of this process by default.
            stdout: path of a file or terminal to write to; what is written is returned by default.
        """
        if self._server is None:
            environment = os.environ | {"PYTHONPATH": str(ROOT)}
            command = [sys.executable, "-c", SERVER]
            self._server = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, env=environment, text=True
            )
        with tempfile.TemporaryDirectory() as directory:
            out, errors = Path(directory, "out"), Path(directory, "errors")
            out.touch()
            order: dict[str, Any] = {"code": code, "arguments": arguments, "stdout": stdout or str(out)}
            order |= {"stderr": str(errors), "env": dict(os.environ if env is None else env)}
            self._server.stdin.write(json.dumps(order) + "\n")
            self._server.stdin.flush()
            answer = self._server.stdout.readline()
            return subprocess.CompletedProcess([code, *arguments], int(answer), out.read_text(), errors.read_text())

    def close(self) -> None:
        """End the interpreter."""
        if self._server is not None:
            self._server.communicate()
