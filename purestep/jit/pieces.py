"""A step of several microbatches, compiled in two pieces.

`grads` is compiled once and called for each microbatch, `update` (with the fixed tree sum of what they contribute)
once. One graph of all microbatches would take several times as long to compile, and whoever computes a microbatch
elsewhere runs the same piece, so it has the same bits.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from purestep import transforms
from purestep.grad import split_batch
from purestep.jit.call import Jit
from purestep.state import TrainState
from purestep.step import Gradients, Metrics, Step, merge_gradients


class JitStep:
    """A compiled step of several microbatches. Made by `jit`; call it as `step(state, batch)`.

    Attributes:
        donate: whether the state is consumed.
        backend: name of the backend.
        grads, update: the two pieces, compiled functions themselves.
    """

    def __init__(self, step: Step, donate: bool, backend: str, mode: str | None) -> None:
        self.__wrapped__ = step
        self.__name__ = type(step).__name__
        self.donate, self.backend, self.mode = donate, backend, mode

        def grads(state: TrainState, microbatch: Any, index: Tensor) -> Gradients:
            return step.grads(state, microbatch, index)

        def update(state: TrainState, parts: list[Gradients]) -> tuple[TrainState, Metrics]:
            whole = [part.replace(buffers={**state.buffers, **part.buffers}) for part in parts]  # type: ignore[attr-defined]
            return step.update(state, merge_gradients(state, whole))

        self.grads = Jit(grads, False, backend, (), mode)
        self.update = Jit(update, donate, backend, (), mode)
        self._index: list[Tensor] = []

    def __call__(self, state: TrainState, batch: Any) -> tuple[TrainState, Metrics]:
        """Return the state after one update, and the metrics of the batch."""
        if transforms.active() or torch._C._len_torch_dispatch_stack() > 0:
            return self.__wrapped__(state, batch)
        microbatches = split_batch(batch, self.__wrapped__.microbatches)
        indices = self._indices(len(microbatches), state.rng.device)
        parts = [
            _changed(state, self.grads(state, microbatch, index))
            for (microbatch, _), index in zip(microbatches, indices, strict=True)
        ]
        return self.update(state, parts)

    def _indices(self, count: int, device: torch.device) -> list[Tensor]:
        """Numbers of microbatches as tensors, so that one graph serves all of them."""
        if len(self._index) < count or self._index[0].device != device:
            self._index = list(torch.arange(count, device=device).unbind())
        return self._index[:count]

    @property
    def retraces(self) -> tuple[str, ...]:
        """Why each trace but the first was made, of either piece."""
        return self.grads.retraces + self.update.retraces

    def clear(self) -> None:
        """Forget everything that was compiled."""
        self.grads.clear()
        self.update.clear()

    def compile(self, state: TrainState, batch: Any) -> JitStep:
        """Compile for the signature of these arguments; the state is not consumed.

        The gradients of one microbatch are computed, because the second piece takes what the first returns.
        """
        self._pieces(state, batch)
        return self

    def graph(self, state: TrainState, batch: Any) -> str:
        """Return the graphs of both pieces as code."""
        return "\n".join(self._pieces(state, batch))

    def _pieces(self, state: TrainState, batch: Any) -> tuple[str, str]:
        microbatches = split_batch(batch, self.__wrapped__.microbatches)
        indices = self._indices(len(microbatches), state.rng.device)
        shapes: dict[int, Gradients] = {}
        for (microbatch, size), index in zip(microbatches, indices, strict=True):
            if size not in shapes:
                shapes[size] = _changed(state, self.grads(state, microbatch, index))
        parts = [shapes[size] for _, size in microbatches]
        first = self.grads.graph(state, microbatches[0][0], indices[0])
        return first, self.update.graph(state, parts)

    def __repr__(self) -> str:
        return f"jit({self.__wrapped__!r}, donate={self.donate!r}, backend={self.backend!r})"


def _changed(state: TrainState, part: Gradients) -> Gradients:
    """Leave out the buffers that the forward pass did not touch; frozen parameters may be most of a model."""
    kept = {name: t for name, t in part.buffers.items() if t is not state.buffers[name]}
    return part.replace(buffers=kept)  # type: ignore[attr-defined]
