"""Microbatches: how a batch is sliced into them, and how their gradients are added up in one fixed binary tree.

Owns `split_batch`; `Gradients`, what one microbatch contributes; `Accumulation`, which holds at most log2(V) + 1 sums
at a time; and `MicrobatchExchange`, what a step tells the ranks of a plan while it computes one microbatch.
"""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from purestep import transforms, tree
from purestep.errors import StepError, explain
from purestep.metrics import Metric, sample_count
from purestep.metrics import merge as merge_metrics
from purestep.optim.kernels import foreach as fx
from purestep.precision.cast_params import Uncast
from purestep.sharding import placement
from purestep.sharding.local_batches import microbatch_sizes, piece
from purestep.state import TrainState
from purestep.tree import pytree
from purestep.treesum import TreeSum

T = TypeVar("T")
Tensors = Mapping[str, Tensor]
# What the loss of a microbatch is a mean over: its samples, or the weight that the loss function returned.
Weight = int | Tensor
Context = Callable[[], contextlib.AbstractContextManager[Any]]


def split_batch(batch: T, count: int) -> list[tuple[T, int]]:
    """Slice a batch into microbatches along dim 0 of its tensors.

    Args:
        batch: pytree of tensors with the same size of dim 0. Leaves without dims go into every microbatch.
        count: number of microbatches, at least 1. Empty ones (of a batch with fewer samples) are left out.

    Returns:
        `(microbatch, samples)` pairs.

    Raises:
        StepError: leaves differ in their number of samples.

    Examples:
        >>> [(b["x"].tolist(), n) for b, n in split_batch({"x": torch.arange(5)}, 2)]
        [([0, 1, 2], 3), ([3, 4], 2)]
    """
    samples = sample_count(batch)
    if count == 1:
        return [(batch, samples)]
    uneven = [
        f"{path}: {tree.describe(leaf)}"
        for path, leaf in zip(tree.paths(batch, "batch"), tree.leaves(batch), strict=True)
        if getattr(leaf, "ndim", 0) and leaf.shape[0] != samples
    ]
    if uneven:
        raise StepError(
            explain(
                f"the leaves of a batch differ in their number of samples, so it cannot be cut into {count} parts",
                where=f"{', '.join(uneven)}; the first leaf has {samples}",
                instead="give every tensor of the batch the samples as dim 0, or make shared values 0-d",
            )
        )
    out, start = [], 0
    for size in microbatch_sizes(samples, count):
        if size:
            out.append((piece(batch, start, start + size), size))
            start += size
    return out


# --- what one microbatch contributes ----------------------------------------------------------------------------------


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
    weight: Weight
    buffers: dict[str, Tensor]
    metrics: dict[str, Metric]


@dataclasses.dataclass(frozen=True)
class Prepared:
    """One microbatch before anything of it is computed.

    Attributes:
        loss_of: returns the scaled loss of some tensors, and what is known beside it: weight, buffers, metrics.
        tracked: the tensors that are differentiated.
        cast: the cast of the policy.
    """

    loss_of: Callable[[Any], tuple[Tensor, Any]]
    tracked: Any
    cast: Uncast


class MicrobatchExchange(Protocol):
    """What a step tells while it computes one microbatch, and asks for, in the order of the methods.

    Ranks of a plan gather parameters and sum gradients in it (`parallel.ddp`, `parallel.fsdp`); `NoExchange`
    is that of a process that no other one waits for. A compiled piece holds all of a microbatch, so what runs it calls
    `gathered` before and `taken` after, and nothing else.

    Attributes:
        collects: whether gradients are taken as the backward pass makes them, so that none may be left at its end.
        gathers: names of parameters whose parts it copies to the card itself, where a plan offloads them.
        dispatches: whether `bound` also sends tokens to their experts, where a plan splits those.
        repeatable: whether the forward pass may run a second time, because no other rank waits in it.
    """

    @property
    def collects(self) -> bool: ...

    @property
    def gathers(self) -> Collection[str]: ...

    @property
    def dispatches(self) -> bool: ...

    @property
    def repeatable(self) -> bool: ...

    def check(self, state: TrainState) -> None:
        """Refuse a state that the microbatch cannot be computed from."""

    def tracked(self, cast: Uncast, params: Tensors) -> Tensors:
        """Return what is differentiated, of the parameters as the model computes with them."""

    def bound(
        self, tracked: Tensors, buffers: Tensors, around: Context | None
    ) -> tuple[Tensors, Tensors, Context | None]:
        """Return the params and buffers that the model is bound to, and what makes the context that it runs in."""

    def plain(self, new: dict[str, Tensor], old: Tensors) -> dict[str, Tensor]:
        """Return the buffers after the forward pass as the state holds them."""

    def forward_done(self, weight: Weight, buffers: Tensors, metrics: Mapping[str, Metric]) -> None:
        """Take what is known before the backward pass."""

    def backward_done(self, cast: Uncast, grads: Any) -> Any:
        """Take the gradients that are left at the end of the backward pass; return them as they are summed."""

    def gathered(self, view: TrainState) -> TrainState:
        """Return the state as a compiled piece takes it."""

    def taken(self, part: Gradients, view: TrainState) -> Gradients:
        """Take what a compiled piece returned."""


@contextlib.contextmanager
def both(outer: Context, inner: Context | None) -> Iterator[None]:
    """Enter two contexts, of which the inner one may be missing."""
    with outer(), inner() if inner is not None else contextlib.nullcontext():
        yield


class NoExchange:
    """The exchange of a microbatch that no other rank waits for: everything is passed on as it is."""

    collects = False
    gathers = ()
    dispatches = False
    repeatable = True

    def check(self, state: TrainState) -> None:
        placement.check_plain(state)

    def tracked(self, cast: Uncast, params: Tensors) -> Tensors:
        return params

    def bound(
        self, tracked: Tensors, buffers: Tensors, around: Context | None
    ) -> tuple[Tensors, Tensors, Context | None]:
        return tracked, buffers, around

    def plain(self, new: dict[str, Tensor], old: Tensors) -> dict[str, Tensor]:
        return new

    def forward_done(self, weight: Weight, buffers: Tensors, metrics: Mapping[str, Metric]) -> None:
        pass

    def backward_done(self, cast: Uncast, grads: Any) -> Any:
        return cast.reduced(grads)

    def gathered(self, view: TrainState) -> TrainState:
        return view

    def taken(self, part: Gradients, view: TrainState) -> Gradients:
        return part


NO_EXCHANGE = NoExchange()

# --- and their sum ----------------------------------------------------------------------------------------------------


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
    weight: Weight
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
    from the same buffers, as on several devices. A buffer that no microbatch changed keeps its bits. Other buffers are
    taken from the first.

    Args:
        state: the state that the microbatches started from.
        sizes: samples of each microbatch of the whole batch; empty ones count for nothing.

    Attributes:
        told: what other ranks are told of the batch, to compare it with theirs: samples, and a number for its shapes.
        heard: by rank, what all of them told.

    Examples:
        >>> from purestep.sharding.local_batches import microbatch_sizes
        >>> Accumulation(None, microbatch_sizes(7, 3)).shares
        [0.42857142857142855, 0.2857142857142857, 0.2857142857142857]
    """

    def __init__(self, state: TrainState, sizes: Sequence[int]) -> None:
        self.state = state
        self.sizes = [size for size in sizes if size]
        self.samples = sum(self.sizes)
        self.told = (self.samples, 0)
        self.heard: dict[int, tuple[int, int]] = {}
        equal = len(set(self.sizes)) == 1
        self.shares = None if equal else [size / self.samples for size in self.sizes]
        self.alone = len(self.sizes) == 1
        self.sum: TreeSum[Partial] = TreeSum(merge)
        self._single: Gradients | None = None
        self._structure: Any = None
        self._names: list[str] | None = None

    def add(self, part: Gradients, index: int) -> None:
        """Add what the microbatch of a number contributes."""
        if self.alone:
            self._single = counted(part)
            return
        self.sum.add(self.lift(part, index), index)

    def lift(self, part: Gradients, index: int) -> Partial:
        """Return the contribution of one microbatch as a sum of one."""
        grads, self._structure = tree.flatten(part.grads)
        rest, moved = self.besides(part.weight, part.buffers, part.metrics)
        return rest.replaced(self.weighed([*grads, *moved], part.weight, index))

    def besides(
        self, weight: Weight, buffers: Mapping[str, Tensor], metrics: Mapping[str, Metric]
    ) -> tuple[Partial, list[Tensor]]:
        """Return what a microbatch contributes besides gradients: a sum without a vector, and what buffers changed by.

        All of it is known before the backward pass.
        """
        old = self.state.buffers
        if self._names is None:
            self._names = [name for name, tensor in old.items() if averaged(tensor, buffers[name])]
        chosen = set(self._names)
        # A buffer that the forward pass left alone is not passed on: it may be this rank's shard of a frozen parameter.
        kept = {name: new for name, new in buffers.items() if name not in chosen and new is not old[name]}
        moved = [buffers[name] for name in self._names]
        if not self.alone:
            moved = [_change(old[name], new) for name, new in zip(self._names, moved, strict=True)]
        return Partial([], weight, kept, metrics), moved

    def factor(self, weight: Weight, index: int) -> float | Tensor:
        """Return what the gradient of a microbatch is multiplied by, a number or a 0-d tensor."""
        if self.alone or (isinstance(weight, int) and self.shares is None):
            return 1.0
        return weight if self.shares is None or not isinstance(weight, int) else self.shares[index]

    def weighed(self, vector: list[Tensor], weight: Weight, index: int) -> list[Tensor]:
        """Multiply what a microbatch contributes by what it weighs."""
        if self.alone:
            return _counted(vector, weight)
        return _weighed(vector, weight, None if self.shares is None else self.shares[index])

    def divided(self, vector: list[Tensor], weight: Weight, *, owned: bool = False) -> list[Tensor]:
        """Divide the sum over all microbatches by its weight; `owned` tensors may be overwritten."""
        if self.alone:
            return vector
        if isinstance(weight, Tensor):
            # A batch of weight 0 (all padding) has the gradient 0, however many microbatches it has.
            return scaled(vector, torch.where(weight > 0, 1.0 / weight, 0))
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


def counted(part: Gradients) -> Gradients:
    """Return what a whole batch contributes; one of weight 0, all padding, may have a NaN mean, and has gradient 0."""
    if isinstance(part.weight, int):
        return part
    grads, structure = tree.flatten(part.grads)
    return dataclasses.replace(part, grads=tree.unflatten(structure, _counted(grads, part.weight)))


def _counted(vector: list[Tensor], weight: Weight) -> list[Tensor]:
    return vector if isinstance(weight, int) else fx.select(weight > 0, vector, None)


def averaged(old: Tensor, new: Tensor) -> bool:
    """Tell whether a buffer is averaged over microbatches: a floating one that the forward pass may have changed."""
    return new is not old and (old.is_floating_point() or old.is_complex())


def _change(old: Tensor, new: Tensor) -> Tensor:
    with transforms.unrecorded():
        return torch.where(new == old, torch.zeros_like(old), new - old)  # equal infinities differ by 0


def moved(old: Tensor, change: Tensor) -> Tensor:
    """Return a buffer after a change; one that did not change keeps its bits."""
    with transforms.unrecorded():
        return torch.where(change == 0, old, old + change)


def _weighed(vector: list[Tensor], weight: Weight, share: float | None) -> list[Tensor]:
    if isinstance(weight, int):
        return vector if share is None else scaled(vector, share)
    # A microbatch of weight 0 (all padding) may have a NaN mean; it must not count.
    factors = {dtype: weight.to(dtype) for dtype in dict.fromkeys(x.dtype for x in vector)}
    return fx.select(weight > 0, [x * factors[x.dtype] for x in vector], None)


def scaled(vector: list[Tensor], factor: float | Tensor, *, owned: bool = False) -> list[Tensor]:
    """Multiply tensors by a number or a 0-d tensor, keeping their dtypes; `owned` ones may be overwritten."""
    if isinstance(factor, Tensor):
        return [x * factor.to(x.dtype) for x in vector]
    return vector if factor == 1.0 else fx.mul(vector, factor, reuse=owned)


def accumulate(state: TrainState, samples: int, count: int) -> Accumulation:
    """Return the accumulation of a batch of some samples that is sliced into a number of microbatches."""
    return Accumulation(state, microbatch_sizes(samples, count))
