"""A Jupyter kernel and its client, as a front end uses them: cells are run, interrupted and looked at."""

from __future__ import annotations

import dataclasses
import os
import queue
import signal
import time
from pathlib import Path
from typing import Any

from jupyter_client import BlockingKernelClient
from jupyter_client.connect import write_connection_file

START = """
import sys, warnings
warnings.simplefilter("default")
from ipykernel.kernelapp import IPKernelApp
IPKernelApp.launch_instance(argv=["-f", sys.argv[1]])
"""


@dataclasses.dataclass
class Outputs:
    """What a cell has put out.

    Attributes:
        text: of its streams and its result.
        error: "Name: text" of the exception that ended it, "" without one.
        shown: each version of the output that it displayed, by MIME type.
        kinds: "display_data" or "update_display_data" of each.
    """

    text: str = ""
    error: str = ""
    shown: list[dict[str, str]] = dataclasses.field(default_factory=list)
    kinds: list[str] = dataclasses.field(default_factory=list)

    def add(self, kind: str, content: dict[str, Any]) -> None:
        if kind == "stream":
            self.text += content["text"]
        elif kind == "error":
            self.error = f"{content['ename']}: {content['evalue']}"
        elif kind == "execute_result":
            self.text += content["data"]["text/plain"]
        elif kind in ("display_data", "update_display_data"):
            self.shown.append(content["data"])
            self.kinds.append(kind)


class Kernel:
    """A kernel that is ready. `interrupt` does what the button of a notebook does.

    Args:
        zygote: forks its process, which has torch already.
        directory: for its connection file.
        cwd: working directory.
        env: environment, besides that of this process.
    """

    def __init__(self, zygote: Any, directory: Path, cwd: Path, env: dict[str, str] | None = None) -> None:
        file, _ = write_connection_file(str(directory / "kernel.json"), transport="ipc", ip=str(directory / "k"))
        environment = {**os.environ, "IPYTHONDIR": str(directory / "ipython"), **(env or {})}
        self.process = zygote.popen(
            START, file, cwd=cwd, env=environment, start_new_session=True, stdout=None, stderr=None
        )
        self._client = BlockingKernelClient(connection_file=file)
        self._client.load_connection_file()
        self._client.start_channels(hb=False)  # a kernel on a busy machine misses heartbeats, and counts as dead
        self._client.wait_for_ready(timeout=120)

    def start(self, code: str) -> str:
        """Start a cell and return its number; `until` and `finish` take its outputs."""
        return self._client.execute(code)

    def until(self, cell: str, text: str, timeout: float = 120) -> Outputs:
        """Wait until a cell has put out a text."""
        found = Outputs()
        end = time.monotonic() + timeout
        while text not in found.text + "".join(item["text/plain"] for item in found.shown):
            assert not self._take(cell, found, end), found
        return found

    def finish(self, cell: str, timeout: float = 120) -> Outputs:
        """Wait for the end of a cell."""
        found = Outputs()
        end = time.monotonic() + timeout
        while not self._take(cell, found, end):
            pass
        return found

    def _take(self, cell: str, found: Outputs, end: float) -> bool:
        try:
            message = self._client.get_iopub_msg(timeout=max(end - time.monotonic(), 0.1))
        except queue.Empty:
            raise TimeoutError(f"the cell has put out {found}") from None
        if message["parent_header"].get("msg_id") != cell:
            return False
        found.add(message["msg_type"], message["content"])
        return message["msg_type"] == "status" and message["content"]["execution_state"] == "idle"

    def run(self, code: str) -> Outputs:
        return self.finish(self.start(code))

    def interrupt(self) -> None:
        os.killpg(self.process.pid, signal.SIGINT)  # to the whole group, as jupyter_client does

    def close(self) -> None:
        self._client.stop_channels()
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
