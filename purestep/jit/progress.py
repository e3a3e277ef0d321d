"""The line on a terminal that shows the progress of a compilation."""

from __future__ import annotations

import contextlib
import sys
import time
from collections.abc import Callable, Iterator


@contextlib.contextmanager
def progress(name: str) -> Iterator[Callable[[str], None]]:
    """Show a line on stderr during a compilation, if stderr is a terminal, and wipe it at the end.

    Examples:
        >>> with progress("train_step") as note:
        ...     note("tracing")
    """
    stream = sys.stderr
    shown = stream is not None and stream.isatty()

    def note(text: str) -> None:
        if shown:
            print(f"\r\x1b[2Kjit {name}: {text} ...", end="", file=stream, flush=True)

    start = time.monotonic()
    done = False
    try:
        yield note
        done = True
    finally:
        if shown:
            print("\r\x1b[2K", end="", file=stream, flush=True)
            if done and (seconds := time.monotonic() - start) >= 1.0:
                print(f"jit {name}: ready after {seconds:.1f} s", file=stream, flush=True)
