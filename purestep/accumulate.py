"""What microbatches contribute to an update, and its sum: a stream of values added up in one fixed binary tree.

Owns `Gradients`, what one microbatch contributes, and `Accumulation`, which holds at most log2(V) + 1 sums at a time.
Steps call it, compiled or not; a plan puts an exchange between ranks into the same tree.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep import transforms, tree
from purestep.errors import StepError, explain
from purestep.grad import microbatch_sizes
from purestep.metrics import Metric
from purestep.metrics import merge as merge_metrics
from purestep.optim import foreach as fx
from purestep.tree import pytree
from purestep.treesum import TreeSum


@pytree
class Gradients:
    """What one microbatch contributes to an update, or all of them together.

    Attributes:
        grads: gradients of the mean loss of the microbatch, of the structure of the params.
        weight: what the loss is a mean over: samples (int), or the weight the loss function returned.
        buffers: buffers after the forward pass.
        metrics: metrics of the microbatch.
    """

    grads: Any
    weight: Any
    buffers: dict[str, Tensor]
    metrics: dict[str, Metric]


@dataclasses.dataclass
class Partial:
    """The sum of what some microbatches contribute, before it is divided by their weight.

    Attributes:
        vector: gradients and changes of buffers as a flat list, multiplied by what they weigh.
        weight: int, number of samples, or a 0-d tensor.
        kept: buffers that are not averaged, of the first microbatch.
        metrics: merged metrics.
        owned: whether the tensors of `vector` were made by a sum, so that the next one may reuse their memory.
    """

    vector: list[Tensor]
    weight: Any
    kept: dict[str, Tensor]
    metrics: Mapping[str, Metric]
    owned: bool = False

    def replaced(self, vector: list[Tensor]) -> Partial:
        """Return the same with another vector."""
        return dataclasses.replace(self, vector=vector)


def merge(a: Partial, b: Partial) -> Partial:
    """Add two sums; `a` is of the earlier microbatches, and is consumed."""
    if isinstance(a.weight, int) != isinstance(b.weight, int):
        raise StepError(
            explain(
                "the loss function returned ps.weighted for some microbatches of a batch only",
                why="a mean over the batch needs the same kind of weight from all of them",
                instead="return ps.weighted(loss, weight) for every batch, or for none",
            )
        )
    vector = fx.add(a.vector, b.vector, reuse=a.owned)
    return Partial(vector, a.weight + b.weight, a.kept, merge_metrics(a.metrics, b.metrics), owned=True)


class Accumulation:
    """Add up the contributions of the microbatches of one batch.

    Gradients are averaged by weight, and so is what the forward pass added to floating buffers: each microbatch starts
    from the same buffers, as on several devices. A buffer that nobody changed keeps its bits. Other buffers are taken
    from the first.

    Args:
        state: the state that the microbatches started from.
        sizes: samples of each microbatch of the whole batch; empty ones count for nothing.

    Attributes:
        told: what other ranks are told of the batch, to compare it with theirs: samples, and a number for its shapes.
        heard: by rank, what all of them told.

    Example:
        >>> from purestep.grad import microbatch_sizes
        >>> Accumulation(None, microbatch_sizes(7, 3)).shares
        [0.42857142857142855, 0.2857142857142857, 0.2857142857142857]
    """

    def __init__(self, state: Any, sizes: Sequence[int]) -> None:
        self.state = state
        self.sizes = [size for size in sizes if size]
        self.samples = sum(self.sizes)
        self.told = (self.samples, 0)
        self.heard: dict[int, tuple[int, int]] = {}
        equal = len(set(self.sizes)) == 1
        self.shares = None if equal else [size / self.samples for size in self.sizes]
        self.alone = len(self.sizes) == 1
        self.sum = TreeSum(merge)
        self._single: Gradients | None = None
        self._structure: Any = None
        self._names: list[str] | None = None

    def add(self, part: Gradients, index: int) -> None:
        """Add what the microbatch of a number contributes."""
        if self.alone:
            self._single = part
            return
        self.sum.add(self.lift(part, index), index)

    def lift(self, part: Gradients, index: int) -> Partial:
        """Return the contribution of one microbatch as a sum of one."""
        grads, self._structure = tree.flatten(part.grads)
        rest, moved = self.besides(part.weight, part.buffers, part.metrics)
        return rest.replaced(self.weighed([*grads, *moved], part.weight, index))

    def besides(
        self, weight: Any, buffers: Mapping[str, Tensor], metrics: Mapping[str, Metric]
    ) -> tuple[Partial, list[Tensor]]:
        """Return what a microbatch contributes besides gradients: a sum without a vector, and what buffers changed by.

        All of it is known before the backward pass.
        """
        old = self.state.buffers
        if self._names is None:
            self._names = [name for name, tensor in old.items() if averaged(tensor, buffers[name])]
        chosen = set(self._names)
        # What nobody touched is not passed on: a frozen parameter may be this rank's part of one.
        kept = {name: new for name, new in buffers.items() if name not in chosen and new is not old[name]}
        moved = [buffers[name] for name in self._names]
        if not self.alone:
            moved = [_change(old[name], new) for name, new in zip(self._names, moved, strict=True)]
        return Partial([], weight, kept, metrics), moved

    def factor(self, weight: Any, index: int) -> Any:
        """Return what the gradient of a microbatch is multiplied by, a number or a 0-d tensor."""
        if self.alone or (isinstance(weight, int) and self.shares is None):
            return 1.0
        return weight if self.shares is None or not isinstance(weight, int) else self.shares[index]

    def weighed(self, vector: list[Tensor], weight: Any, index: int) -> list[Tensor]:
        """Multiply what a microbatch contributes by what it weighs."""
        if self.alone:
            return vector
        return _weighed(vector, weight, None if self.shares is None else self.shares[index])

    def divided(self, vector: list[Tensor], weight: Any, *, owned: bool = False) -> list[Tensor]:
        """Divide the sum over all microbatches by its weight; `owned` tensors may be overwritten."""
        if self.alone:
            return vector
        if isinstance(weight, Tensor):
            return scaled(vector, 1.0 / weight)
        return vector if self.shares is not None else scaled(vector, 1.0 / len(self.sizes), owned=owned)

    def result(self) -> Gradients:
        """Return the mean over the whole batch."""
        return self._single if self._single is not None else self.mean(self.sum.result())

    def mean(self, total: Partial) -> Gradients:
        """Divide the sum over all microbatches by its weight."""
        vector = self.divided(total.vector, total.weight, owned=total.owned)
        count = len(vector) - len(self._names or ())
        return self.finish(tree.unflatten(self._structure, vector[:count]), vector[count:], total)

    def finish(self, grads: Any, changes: Sequence[Tensor], total: Partial) -> Gradients:
        """Return the mean over the whole batch, from that of the gradients and of what buffers changed by."""
        old = self.state.buffers
        changed = dict(zip(self._names or (), changes, strict=True))
        if not self.alone:
            changed = {name: moved(old[name], x) for name, x in changed.items()}
        buffers = {name: changed[name] if name in changed else total.kept.get(name, x) for name, x in old.items()}
        return Gradients(grads, total.weight, buffers, dict(total.metrics))


def averaged(old: Tensor, new: Tensor) -> bool:
    """Tell whether a buffer is averaged over microbatches: it has numbers with digits, and somebody may have moved."""
    return new is not old and (old.is_floating_point() or old.is_complex())


def _change(old: Tensor, new: Tensor) -> Tensor:
    with transforms.unrecorded():
        return torch.where(new == old, torch.zeros_like(old), new - old)  # equal infinities differ by 0


def moved(old: Tensor, change: Tensor) -> Tensor:
    """Return a buffer after a change; one that did not change keeps its bits."""
    with transforms.unrecorded():
        return torch.where(change == 0, old, old + change)


def _weighed(vector: list[Tensor], weight: Any, share: float | None) -> list[Tensor]:
    if isinstance(weight, int):
        return vector if share is None else scaled(vector, share)
    # A microbatch of weight 0 (all padding) may have a NaN mean; it must not count.
    return [torch.where(weight > 0, x * weight.to(x.dtype), 0) for x in vector]


def scaled(vector: list[Tensor], factor: Any, *, owned: bool = False) -> list[Tensor]:
    """Multiply tensors by a number or a 0-d tensor, keeping their dtypes; `owned` ones may be overwritten."""
    if isinstance(factor, Tensor):
        return [x * factor.to(x.dtype) for x in vector]
    return vector if factor == 1.0 else fx.mul(vector, factor, reuse=owned)


def accumulate(state: Any, samples: int, parts: int) -> Accumulation:
    """Return the accumulation of a batch of some samples that is cut into so many microbatches."""
    return Accumulation(state, microbatch_sizes(samples, parts))
