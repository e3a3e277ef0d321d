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
from purestep.accumulate import Accumulation, Gradients, Partial, merge
from purestep.grad import stop_gradient
from purestep.metrics import Metric
from purestep.parallel.batchnorm import synced
from purestep.parallel.shares import Shares
from purestep.parallel.small import exchange_small
from purestep.sharding import collectives
from purestep.sharding.reduce import Flat, Summing, add, flat_like, packed, whole_sum
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
        self.fast = shares.plan.reduction == "fast"
        self.small: TreeSum = TreeSum(merge)
        self.trees: list[TreeSum] = []
        self.leaving: list[Any] = []
        self.layout: Flat
        self.changes: Flat
        self.structure: Any = None

    def turn(self, index: int, *, counts: bool, last: bool) -> BucketTurn:
        """Return what a step tells about a microbatch."""
        return BucketTurn(self, index, counts=counts, last=last)

    def begin_small(self, pattern: Partial) -> None:
        """Send metrics and weights to the others."""
        shares = self.shares
        self.waiting = exchange_small(self.small.nodes, shares.owners, shares.group, pattern, self.sums)

    def begin(self, trees: TreeSum, like: Tensor) -> Any:
        """Begin to add up a flat tensor over the ranks."""
        shares = self.shares
        if self.fast:
            return collectives.sum_into(trees.result() if trees.nodes else torch.zeros_like(like), shares.group)
        return Summing(trees.nodes, shares.owners, shares.group, like)

    def result(self) -> Gradients:
        """Wait for the others, and return the mean over all microbatches."""
        total = self.waiting()
        flats = self.sums.divided(
            [x.wait() if self.fast else whole_sum(x) for x in self.leaving], total.weight, owned=True
        )
        count = len(self.changes.groups)
        grads = self.layout.unpack(flats[count:])[::-1]
        return self.sums.finish(tree.unflatten(self.structure, grads), self.changes.unpack(flats[:count]), total)


class BucketTurn:
    """One microbatch: what a step tells about it.

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

    # --- what a step calls ---

    def tracked(self, cast: Any, params: Any) -> Any:
        """Return what is differentiated."""
        leaves, self.buckets.structure = tree.flatten(params)
        self._expect(leaves[::-1], cast.reduced)
        return params

    def bound(self, params: Any, buffers: Mapping[str, Tensor], around: Any) -> Any:
        """Return what the model is bound to, and the context it runs in."""
        for i, leaf in enumerate(reversed(tree.leaves(params))):
            leaf.register_hook(functools.partial(self._arrived, i))
        return params, buffers, synced(self, around)

    def plain(self, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> Mapping[str, Tensor]:
        """Return the buffers after the forward pass as the state keeps them."""
        return new

    def forward_done(self, weight: Any, buffers: Mapping[str, Tensor], metrics: Mapping[str, Metric]) -> None:
        """Take what is known before the backward pass."""
        with _torch.no_torch_function(), torch.no_grad():
            self._begin(*stop_gradient((weight, dict(buffers), dict(metrics))))

    def backward_done(self, grads: Any) -> Any:
        """Take the gradients of parameters that no hook told of; return them all."""
        leaves = tree.leaves(grads)[::-1]
        for i, grad in enumerate(leaves):
            if self.grads[i] is None:
                self._fill(i, grad)
        return grads

    def factor(self) -> Any:
        """Return what the gradient is multiplied by later; known once the forward pass is done."""
        return self.buckets.sums.factor(self.weight, self.index)

    def gathered(self, view: Any) -> Any:
        """Return the state as a compiled piece takes it."""
        return view

    def taken(self, part: Gradients, view: Any) -> Gradients:
        """Take what a compiled piece returned."""
        leaves, self.buckets.structure = tree.flatten(part.grads)
        self._expect(leaves[::-1], lambda grads: grads)
        self._begin(part.weight, part.buffers, part.metrics)
        self.backward_done(part.grads)
        return part

    # --- what happens to it ---

    def _expect(self, like: list[Tensor], reduced: Callable[[Any], Any]) -> None:
        """Prepare for gradients like these tensors, the last parameters first."""
        self.reduced = reduced
        self.buckets.layout = layout = flat_like(like, _LIMITS)
        self.grads: list[Tensor | None] = [None] * len(like)
        self.missing = [len(group) for group in layout.groups]

    def _begin(self, weight: Any, buffers: Mapping[str, Tensor], metrics: Mapping[str, Metric]) -> None:
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
            for i in group:
                self.grads[i] = _GONE
            self.next += 1

    def _add(self, k: int, flat: Tensor) -> None:
        buckets = self.buckets
        if self.counts:
            (weighed,) = buckets.sums.weighed([flat], self.weight, self.index)
            buckets.trees[k].add(weighed, self.index)
        if self.last:
            for before in buckets.leaving if not buckets.fast else ():
                before.advance()
            buckets.leaving.append(buckets.begin(buckets.trees[k], flat))


_GONE = torch.empty(0)
