"""The microbatches of a rank that holds all parameters: gradients are summed in buckets, which leave one by one.

Buckets are filled as the backward pass makes gradients, the last layers first. Those of the last microbatch are on
their way to the other ranks while the backward pass goes on; metrics and buffers leave before it.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor

from purestep import _torch, tree
from purestep.distributed import machines
from purestep.grad import stop_gradient
from purestep.metrics import Metric
from purestep.microbatch import Accumulation, Context, Gradients, Partial, Tensors, Weight, merge
from purestep.parallel.assignment import Shares
from purestep.parallel.compressed import sum_into
from purestep.parallel.part_sums import PartSum, RowsOf
from purestep.parallel.small_exchange import exchange_small
from purestep.parallel.sync_batchnorm import synced
from purestep.parallel.tree_reduce import Flat, Summing, WholeSum, add, flat_like, packed
from purestep.precision.cast_params import Uncast
from purestep.sharding.spec import Spec
from purestep.sharding.step_account import BUCKETS
from purestep.state import TrainState
from purestep.treesum import TreeSum


class Sum(Protocol):
    """The sum over ranks of a bucket, under way."""

    def advance(self) -> None:
        """Wait for what has arrived, and launch what follows from it; nothing where nothing does."""

    def result(self) -> Tensor:
        """Return the sum once it is here."""


class Buckets:
    """The sums of one batch on one rank.

    Args:
        shares: who computes what.
        sums: what is added and divided.
        specs: by name, where the parameters are updated of whose gradients each rank gets its part only: ZeRO 1.
    """

    def __init__(self, shares: Shares, sums: Accumulation, specs: Mapping[str, Spec] | None = None) -> None:
        self.shares, self.sums, self.specs = shares, sums, specs or {}
        self.fast, self.sent = shares.plan.reduction == "fast", shares.plan.sent_dtype
        self.exchanges = 2 if machines.grid(shares.group) is None else 3  # of a sum in the tree: machines add one
        self.small: TreeSum[Partial] = TreeSum(merge)
        self.trees: list[TreeSum[Tensor]] = []
        self.leaving: list[Sum] = []
        self.arrived: list[Tensor] = []
        self.layout: Flat
        self.changes: Flat
        self.structure: Any = None

    def expect(self, params: Any) -> list[Tensor]:
        """Prepare for gradients like these tensors, and return them in the order in which they are made."""
        leaves, self.structure = tree.flatten(params)
        names = tree.leaves({name: name for name in params})[::-1] if self.specs else []  # in the order of the tree
        apart = frozenset(i for i, name in enumerate(names) if name in self.specs)
        self.layout = flat_like(leaves[::-1], BUCKETS, apart)
        self.rows = RowsOf(self.shares.plan, names, self.layout, self.specs)
        return leaves[::-1]

    def exchange(self, index: int, *, counts: bool, last: bool) -> BucketExchange:
        """Return the exchange of one microbatch."""
        return BucketExchange(self, index, counts=counts, last=last)

    def begin_small(self, pattern: Partial) -> None:
        """Launch the exchange of metrics and weights."""
        shares = self.shares
        self.waiting = exchange_small(self.small.nodes, shares.owners, shares.group, pattern, self.sums)

    def begin(self, k: int, like: Tensor) -> None:
        """Launch the reduction of a flat tensor over the ranks, and end an earlier one: few are under way."""
        if len(self.leaving) >= self.exchanges:
            self.arrived.append(self.leaving.pop(0).result())
        # Sums in a tree take several exchanges: the next ones of buckets before are launched before this one's first.
        for before in self.leaving:
            before.advance()
        # The sums over this rank's microbatches are handed over, so that they are freed as soon as they are sent.
        trees, self.trees[k] = self.trees[k], TreeSum(add)
        self.leaving.append(self._sum(k - len(self.changes.groups), trees, like))

    def _sum(self, bucket: int, trees: TreeSum[Tensor], like: Tensor) -> Sum:
        shares = self.shares
        rows = self.rows.of(bucket) if bucket >= 0 else None
        if rows is not None:
            return PartSum(trees, shares, rows, like, fast=self.fast, sent=self.sent)
        if self.fast:
            # What the forward pass adds to buffers, which comes first, is not compressed.
            flat = trees.result() if trees.nodes else torch.zeros_like(like)
            return WholeSum(sum_into(flat, shares.group, self.sent if bucket >= 0 else None))
        return WholeSum(Summing(trees.nodes, shares.owners, shares.group, like))

    def result(self) -> Gradients:
        """Wait for the others, and return the mean over all microbatches: whole gradients, or this rank's parts."""
        total = self.waiting()
        for _ in range(1, self.exchanges):
            for before in self.leaving:
                before.advance()
        flats = self.arrived + [x.result() for x in self.leaving]
        self.arrived, self.leaving = [], []
        flats = self.sums.divided(flats, total.weight, owned=True)
        count = len(self.changes.groups)
        grads = self.rows.unpack(flats[count:])[::-1]
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
    dispatches = False

    @property
    def repeatable(self) -> bool:
        """Gradients leave in the backward pass; batch norm and experts over ranks wait in the forward pass."""
        return not (self.shares.plan.sync_batchnorm or self.shares.plan.expert_axis)

    def check(self, state: TrainState) -> None:
        pass  # `total` chose buckets because no parameter is split

    def tracked(self, cast: Uncast, params: Tensors) -> Tensors:
        self._expect(params, cast.reduced)
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
        self._expect(part.grads, lambda grads: grads)
        self._begin(part.weight, part.buffers, part.metrics)
        self._fill_missing(part.grads)
        return part

    # --- what happens to it ---

    def _fill_missing(self, grads: Any) -> None:
        for i, grad in enumerate(tree.leaves(grads)[::-1]):
            if self.grads[i] is None:
                self._fill(i, grad)

    def _expect(self, params: Any, reduced: Callable[[Any], Any]) -> None:
        """Prepare for gradients of these parameters, the last ones first."""
        self.reduced = reduced
        self.grads: list[Tensor | None] = [None] * len(self.buckets.expect(params))
        self.missing = [len(group) for group in self.buckets.layout.groups]

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
            self._leave(k, self._add(k, flat))

    def _arrived(self, i: int, grad: Tensor) -> Tensor:
        # What happens here is no operation of the model: no mode of it has to look.
        with _torch.no_torch_function(), torch.no_grad():
            self._fill(i, grad)
            # The bucket has it, and autograd would hold it until the backward pass ends: it gets one without memory.
            return grad.new_empty(()).expand(grad.shape)

    def _fill(self, i: int, grad: Tensor) -> None:
        self.grads[i] = grad
        self.missing[self.buckets.layout.home[i]] -= 1
        self._send()

    def _send(self) -> None:
        """Add the buckets that are full, in their order, and let them leave if this is the last microbatch."""
        layout, first = self.buckets.layout, len(self.buckets.changes.groups)
        while self.next < len(layout.groups) and not self.missing[self.next]:
            group = layout.groups[self.next]
            flat = packed(self.reduced([self.grads[i] for i in group]))
            # The bucket holds a copy: without this their memory would stay until the backward pass ends.
            for i in group:
                self.grads[i] = _GONE
            like = self._add(first + self.next, flat)
            del flat
            self._leave(first + self.next, like)
            self.next += 1

    def _add(self, k: int, flat: Tensor) -> Tensor:
        """Add a flat tensor to the sum of its bucket; return one like it without memory."""
        if self.counts:
            sums = self.buckets.sums
            self.buckets.trees[k].add(sums.weighed([flat], self.weight, self.index)[0], self.index)
        return flat.new_empty(()).expand(flat.shape)

    def _leave(self, k: int, like: Tensor) -> None:
        if self.last:
            self.buckets.begin(k, like)


_GONE = torch.empty(0)
