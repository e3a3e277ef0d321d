"""What a run leaves behind."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purestep.loop.events import LoopState

_SIGNAL_CODES = {"SIGINT": 130, "SIGTERM": 143}


@dataclasses.dataclass(frozen=True)
class Result:
    """The end of a run.

    Attributes:
        state: the train state.
        metrics: the latest value of everything that was logged or evaluated.
        reason: why the run ended: `reached 5 epochs`, `early stopping: ...`, `SIGTERM`, ...
        run_dir: the run directory, None without one.
        loop: the whole run in one value.
        unsaved: whether its last snapshot was not durable when it ended: it failed, or the grace period was over.
    """

    state: Any
    metrics: Mapping[str, float]
    reason: str
    run_dir: Path | None
    loop: LoopState
    unsaved: bool = False

    @property
    def interrupted(self) -> bool:
        """Whether a signal ended the run before its end; running the same script again continues it."""
        return self.reason in _SIGNAL_CODES

    @property
    def exit_code(self) -> int:
        """What a script should exit with: 0, 128 + the number of the signal that ended the run, or 1 when it is
        not saved."""
        return _SIGNAL_CODES.get(self.reason, int(self.unsaved))

    def __repr__(self) -> str:
        shown = "".join(f", {name}={value:.4g}" for name, value in self.metrics.items())
        where = "" if self.run_dir is None else f", run_dir={str(self.run_dir)!r}"
        ended = f"{self.reason!r}, interrupted" if self.interrupted else repr(self.reason)
        return f"Result({ended}, batches={self.loop.cursor.batches}{shown}{where})"
