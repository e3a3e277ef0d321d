"""The instruments of a run: what surrounds its chunks of steps. Nothing that goes wrong in one of them ends a run.

`run` hands every chunk through `around`; on every rank, because each of them has steps to measure.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, Self

from purestep.loop.events import Callback, LoopState
from purestep.loop.roles import Instrument, StepContext


class Instruments:
    """The opened instruments of one process; one that raises is reported once and then left out.

    Args:
        run_dir: run directory, None without one.
        rank: of this process.
    """

    def __init__(self, run_dir: Path | None, rank: int) -> None:
        self._run_dir, self._rank = run_dir, rank
        self._open: dict[str, StepContext] = {}

    def open(self, callbacks: Sequence[Callback]) -> None:
        """Open those of the callbacks that are instruments; raises what they raise."""
        for callback in callbacks:
            if isinstance(callback, Instrument):
                self._open[callback.name] = callback.open_instrument(self._run_dir, self._rank)

    @contextlib.contextmanager
    def around(self, loop: LoopState, batches: Iterator[Any]) -> Iterator[Iterator[Any]]:
        """Surround a chunk of steps by every instrument; yields the batches to train on."""
        entered = []
        for name, instrument in list(self._open.items()):
            try:
                context = instrument.around(loop, batches)
                batches = context.__enter__()
                entered.append((name, context))
            except Exception as error:
                self._leave_out(name, error)
        try:
            yield batches
        finally:
            # An error of a step is not theirs to handle, so they are not told of it.
            for name, context in reversed(entered):
                try:
                    context.__exit__(None, None, None)
                except Exception as error:
                    self._leave_out(name, error)

    def _leave_out(self, name: str, error: Exception) -> None:
        instrument = self._open.pop(name, None)
        if instrument is not None:
            with contextlib.suppress(Exception):
                instrument.close()
        warnings.warn(
            f"{name} raised {type(error).__name__}: {error}\n  it is left out from here on; training goes on",
            stacklevel=4,
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None:
        for name, instrument in list(self._open.items()):
            try:
                instrument.close()
            except Exception as failure:
                self._leave_out(name, failure)
