"""A loss scale that refuses every update: seen in the metrics of steps, told with the gradient that is not finite.

Once in a streak the gradients of the last batch are computed again, outside of any update. Nothing happens in a step.
"""

from __future__ import annotations

import warnings

import torch
from torch import Tensor

from purestep.distributed import control
from purestep.errors import explain
from purestep.metrics import Series
from purestep.microbatch import Gradients
from purestep.sharding.placement import is_split
from purestep.state import TrainState
from purestep.step_protocol import StepFn, facts_of

_MANY = 20  # a scale of 2**16 has fallen to 1 after 16 of them


class SkippedUpdatesWarning(UserWarning):
    """No update has been accepted for many steps in a row."""


class Skipped:
    """Counts the updates that were refused in a row, over the chunks of a run.

    Args:
        first: whether this process warns; every rank counts, and computes gradients with the others.
    """

    def __init__(self, *, first: bool) -> None:
        self._first, self._row, self._told = first, 0, False

    def look(self, step: StepFn, state: object, batch: object, steps: Series) -> None:
        """Look at the steps of a chunk, and warn, once in a streak, when nothing has been accepted for long.

        Args:
            step: the step of the run.
            state: after the chunk.
            batch: the last one of the chunk.
            steps: metrics of the chunk.
        """
        column = steps.columns.get("skipped")
        if column is None or not isinstance(state, TrainState) or state.loss_scale is None:
            return
        refused = column["value"]
        accepted = next((i for i, n in enumerate(reversed(refused)) if not n), None)
        if accepted is None:
            self._row += len(refused)
        else:
            self._row, self._told = accepted, False
        gradients = facts_of(step).gradients
        if self._row < _MANY or self._told or gradients is None:
            return
        self._told = True
        problem = not_finite(gradients(state, batch), state)
        if problem is not None and self._first:
            warnings.warn(
                explain(
                    f"the last {self._row} updates were skipped: gradients are not finite",
                    where=f"{problem}; loss scale {float(state.loss_scale.value):g}",
                    why="the loss scale falls with each of them, and no update is made until all gradients are finite; "
                    "gradients that stay infinite or NaN at a small scale do not come from the scale",
                    instead="policy='bf16-mixed', whose range is that of float32\nor, to find the operation: "
                    "policy='32' under torch.autograd.detect_anomaly() on this batch",
                ),
                SkippedUpdatesWarning,
                stacklevel=2,
            )


def not_finite(gradients: Gradients, state: TrainState) -> str | None:
    """Return which gradient of a batch is the first that is not finite, in words; None if all are finite.

    Where parameters are split it is collective: every rank calls it, and all return the same.
    """
    found = [_bad(gradients.grads[name]) for name in state.params]
    if any(map(is_split, state.params.values())):
        everywhere = control.gather(found, what="the gradients that are not finite")
        found = [next(filter(None, own), "") for own in zip(*everywhere, strict=True)]
    loss = gradients.metrics["loss"].compute()
    for name, bad in zip(state.params, found, strict=True):
        if bad:
            return f"grads[{name!r}] has {bad}" + ("" if torch.isfinite(loss) else f", the loss is {float(loss)}")
    return None


def _bad(grad: Tensor) -> str:
    if torch.isfinite(grad).all():
        return ""
    return "NaN" if torch.isnan(grad).any() else "infinities"
