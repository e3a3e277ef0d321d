"""The microbatches of a rank that holds all parameters: gradients are summed in buckets, which leave one by one.

Buckets are filled as the backward pass makes gradients, the last layers first. Those of the last microbatch are on
their way to the other ranks while the backward pass goes on; metrics and buffers leave before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor

from purestep import _torch, tree
from purestep.distributed import collectives
from purestep.grad import stop_gradient
from purestep.metrics import Metric
from purestep.microbatch import Accumulation, Context, Gradients, Partial, Tensors, Weight, merge
from purestep.parallel.assignment import Shares
from purestep.parallel.compressed import sum_into
from purestep.parallel.small_exchange import exchange_small
from purestep.parallel.sync_batchnorm import synced
from purestep.parallel.tree_reduce import Flat, Summing, add, flat_like, packed, whole_sum
from purestep.precision.cast_params import Uncast
from purestep.state import TrainState
from purestep.treesum import TreeSum

_LIMITS = 1 << 20, 25 << 20  # bytes of the first bucket, which is to leave early, and of the others


class Buckets:
    """The sums of one batch on one rank.

    Args:
        shares: who computes what.
        sums: what is added and divided.
    """

    def __init__(self, shares: Shares, sums: Accumulation) -> None:
        self.shares, self.sums = shares, sums
        self.fast, self.sent = shares.plan.reduction == "fast", shares.plan.sent_dtype
        self.small: TreeSum[Partial] = TreeSum(merge)
        self.trees: list[TreeSum[Tensor]] = []
        self.leaving: list[collectives.Pending | Summing] = []
        self.layout: Flat
        self.changes: Flat
        self.structure: Any = None

    def exchange(self, index: int, *, counts: bool, last: bool) -> BucketExchange:
        """Return the exchange of one microbatch."""
        return BucketExchange(self, index, counts=counts, last=last)

    def begin_small(self, pattern: Partial) -> None:
        """Launch the exchange of metrics and weights."""
        shares = self.shares
        self.waiting = exchange_small(self.small.nodes, shares.owners, shares.group, pattern, self.sums)

    def begin(self, k: int, like: Tensor) -> collectives.Pending | Summing:
        """Launch the reduction of a flat tensor over the ranks."""
        shares, trees = self.shares, self.trees[k]
        if self.fast:
            # What the forward pass adds to buffers, which comes first, is not compressed.
            dtype = self.sent if k >= len(self.changes.groups) else None
            return sum_into(trees.result() if trees.nodes else torch.zeros_like(like), shares.group, dtype)
        return Summing(trees.nodes, shares.owners, shares.group, like)

    def result(self) -> Gradients:
        """Wait for the others, and return the mean over all microbatches."""
        total = self.waiting()
        flats = self.sums.divided(
            [whole_sum(x) if isinstance(x, Summing) else x.wait() for x in self.leaving], total.weight, owned=True
        )
        count = len(self.changes.groups)
        grads = self.layout.unpack(flats[count:])[::-1]
        return self.sums.finish(tree.unflatten(self.structure, grads), self.changes.unpack(flats[:count]), total)


class BucketExchange:
    """The exchange of one microbatch: its gradients fill the buckets.

    Args:
        buckets: of the batch.
        index: of the microbatch.
        counts: whether it is one; a rank without any runs another one, to know what the others send.
        last: whether the sums leave now.
    """

    def __init__(self, buckets: Buckets, index: int, *, counts: bool, last: bool) -> None:
        self.buckets, self.index, self.counts, self.last = buckets, index, counts, last
        self.shares = buckets.shares
        self.next = 0

    # --- what a step calls, see `MicrobatchExchange` ---

    collects = False
    gathers = ()

    @property
    def repeatable(self) -> bool:
        """Gradients leave in the backward pass; what waits in the forward pass is batch norm over ranks."""
        return not self.shares.plan.sync_batchnorm

    def check(self, state: TrainState) -> None:
        pass  # `total` chose buckets because no parameter is split

    def tracked(self, cast: Uncast, params: Tensors) -> Tensors:
        leaves, self.buckets.structure = tree.flatten(params)
        self._expect(leaves[::-1], cast.reduced)
        return params

    def bound(
        self, tracked: Tensors, buffers: Tensors, around: Context | None
    ) -> tuple[Tensors, Tensors, Context | None]:
        # The hooks of leaves run inside the backward pass, so full buckets leave while it computes the next gradients.
        for i, leaf in enumerate(reversed(tree.leaves(tracked))):
            leaf.register_hook(functools.partial(self._arrived, i))
        return tracked, buffers, synced(self.shares, self.counts, self.factor, around)

    def plain(self, new: dict[str, Tensor], old: Tensors) -> dict[str, Tensor]:
        return new

    def forward_done(self, weight: Weight, buffers: Tensors, metrics: Mapping[str, Metric]) -> None:
        with _torch.no_torch_function(), torch.no_grad():
            self._begin(*stop_gradient((weight, dict(buffers), dict(metrics))))

    def backward_done(self, cast: Uncast, grads: Any) -> Any:
        # Parameters that the loss does not depend on have no hook that runs; their gradients are zeros.
        self._fill_missing(grads)
        return grads

    def factor(self) -> float | Tensor:
        """Return what the gradient is multiplied by later; known once the forward pass is done."""
        return self.buckets.sums.factor(self.weight, self.index)

    def gathered(self, view: TrainState) -> TrainState:
        return view

    def taken(self, part: Gradients, view: TrainState) -> Gradients:
        leaves, self.buckets.structure = tree.flatten(part.grads)
        self._expect(leaves[::-1], lambda grads: grads)
        self._begin(part.weight, part.buffers, part.metrics)
        self._fill_missing(part.grads)
        return part

    # --- what happens to it ---

    def _fill_missing(self, grads: Any) -> None:
        for i, grad in enumerate(tree.leaves(grads)[::-1]):
            if self.grads[i] is None:
                self._fill(i, grad)

    def _expect(self, like: list[Tensor], reduced: Callable[[Any], Any]) -> None:
        """Prepare for gradients like these tensors, the last parameters first."""
        self.reduced = reduced
        self.buckets.layout = layout = flat_like(like, _LIMITS)
        self.grads: list[Tensor | None] = [None] * len(like)
        self.missing = [len(group) for group in layout.groups]

    def _begin(self, weight: Weight, buffers: Tensors, metrics: Mapping[str, Metric]) -> None:
        buckets = self.buckets
        self.weight = weight
        rest, moved = buckets.sums.besides(weight, buffers, metrics)
        buckets.changes = flat_like(moved)
        flats = buckets.changes.pack(moved)
        if not buckets.trees:
            buckets.trees = [TreeSum(add) for _ in (*flats, *buckets.layout.groups)]
        if self.counts:
            buckets.small.add(rest, self.index)
        if self.last:
            buckets.begin_small(rest)
        for k, flat in enumerate(flats):
            self._add(k, flat)

    def _arrived(self, i: int, grad: Tensor) -> None:
        # What happens here is no operation of the model: no mode of it has to look.
        with _torch.no_torch_function(), torch.no_grad():
            self._fill(i, grad)

    def _fill(self, i: int, grad: Tensor) -> None:
        self.grads[i] = grad
        self.missing[self.buckets.layout.home[i]] -= 1
        self._send()

    def _send(self) -> None:
        """Add the buckets that are full, in their order, and let them leave if this is the last microbatch."""
        layout, first = self.buckets.layout, len(self.buckets.changes.groups)
        while self.next < len(layout.groups) and not self.missing[self.next]:
            group = layout.groups[self.next]
            self._add(first + self.next, packed(self.reduced([self.grads[i] for i in group])))
            # The bucket holds a copy: without this their memory would stay until the backward pass ends.
            for i in group:
                self.grads[i] = _GONE
            self.next += 1

    def _add(self, k: int, flat: Tensor) -> None:
        buckets = self.buckets
        if self.counts:
            (weighed,) = buckets.sums.weighed([flat], self.weight, self.index)
            buckets.trees[k].add(weighed, self.index)
        if self.last:
            # Sums in a tree take two exchanges: the second one of earlier buckets is launched before this one's first.
            for before in buckets.leaving:
                if isinstance(before, Summing):
                    before.advance()
            buckets.leaving.append(buckets.begin(k, flat))


_GONE = torch.empty(0)
