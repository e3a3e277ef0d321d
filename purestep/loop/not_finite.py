"""A loss that is no longer a number: told once a run, where no callback watches the loss. Nothing happens in a step."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence

from purestep.errors import explain
from purestep.loop.events import Callback
from purestep.loop.roles import Watcher
from purestep.metrics import Series

_LOSS = "loss"


class NotFiniteWarning(UserWarning):
    """The loss of a training is NaN or infinite, and the run goes on."""


class FiniteLoss:
    """Looks at the losses of the chunks of a run, which are read to the host anyway.

    Args:
        callbacks: of the run. If one of them watches the loss, it says what there is to say.
        speaks: whether this process warns.
    """

    def __init__(self, callbacks: Sequence[Callback], *, speaks: bool) -> None:
        watched = any(f"train/{_LOSS}" in c.watches() for c in callbacks if isinstance(c, Watcher))
        self._done = watched or not speaks

    def look(self, steps: Series, before: int) -> None:
        """Look at a chunk, and warn of the first loss of the run that is not finite.

        Args:
            steps: metrics of the chunk.
            before: number of batches of the run before the chunk.
        """
        if self._done or _LOSS not in steps.kinds or _plainly_finite(steps):
            return
        skipped = steps.columns.get("skipped", {}).get("value")  # a loss scale has refused these updates
        for index in range(len(steps)):
            value = float(steps.metric(_LOSS, index).compute())
            if not (math.isfinite(value) or (skipped is not None and skipped[index])):
                self._done = True
                _warn(value, before + index + 1)
                return


def _plainly_finite(steps: Series) -> bool:
    """Whether the numbers of all losses are finite, by their sum; one that overflows is looked at one by one."""
    columns = steps.columns[_LOSS].values()
    return all(isinstance(column[0], float | int) and math.isfinite(sum(column)) for column in columns if len(column))


def _warn(value: float, batch: int) -> None:
    warnings.warn(
        explain(
            f"the loss is {value} at batch {batch}",
            where=f"batch {batch} of the run, counted from 1",
            why="the run goes on, because no callback watches the loss; parameters that have become NaN stay NaN",
            instead="callbacks=[ps.callbacks.terminate_on_nan()] ends the run there\n"
            "or: tx = ps.optim.apply_if_finite(tx) skips such updates",
        ),
        NotFiniteWarning,
        stacklevel=2,
    )
