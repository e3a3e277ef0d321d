"""Ends a process by a signal while it trains."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any


def send_when_logged(process: Any, log: Path, rows: int, number: int) -> tuple[str, str]:
    """Send a signal once a run has logged more than so many rows; return what the process printed on stdout and stderr.

    Args:
        process: from `zygote.popen`.
        log: the `metrics.csv` of the run.
        rows: lines of the log, with its head.
        number: of the signal.
    """
    end = time.monotonic() + 120
    while not (log.exists() and log.read_text().count("\n") > rows):
        assert process.poll() is None
        assert time.monotonic() < end
        time.sleep(0.05)
    process.send_signal(number)
    with process:
        out, errors = process.communicate(timeout=60)
    return out, errors
