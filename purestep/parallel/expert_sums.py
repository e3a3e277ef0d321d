"""The gradients of experts in one round of microbatches, of which a rank has one for the microbatch of each rank.

They are weighed and added as soon as a module of experts is done, so that those of one module are held at a time.
"""

from __future__ import annotations

import collections
from collections.abc import Callable, Iterable, Mapping, Sequence

import torch
from torch import Tensor

from purestep.parallel.tree_reduce import Flat, add, flat_like
from purestep.treesum import Node, TreeSum, forest

Grads = dict[str, Tensor]


class ExpertSums:
    """The sums of one round.

    Args:
        names: of the trained parameters of experts, in order.
        owners: the microbatches of each rank of the axis, as nodes of the tree; none where its microbatch is empty.
        fast: whether they may be added in any order.
        reduced: returns gradients in the dtype in which they are summed.
        weighed: multiplies gradients by what a microbatch weighs: `(gradients, rank, index)`.
    """

    def __init__(
        self,
        names: Sequence[str],
        owners: Sequence[Sequence[Node]],
        fast: bool,
        reduced: Callable[[list[Tensor]], Iterable[Tensor]],
        weighed: Callable[[list[Tensor], int, int], list[Tensor]],
    ) -> None:
        self.names, self.owners, self.fast = list(names), owners, fast
        self._reduced, self._weighed = reduced, weighed
        self._calls: collections.Counter[str] = collections.Counter()
        self._forward = True
        self._taken: dict[str, list[Grads]] = {}
        self._sums: dict[str, TreeSum[Tensor]] = {}

    def called(self, module: str) -> None:
        """Note that a module of experts was called: so many gradients of it are to come."""
        # A recomputation, which the backward pass asks for, has no gradients of its own.
        self._calls[module] += self._forward

    def forward_done(self) -> None:
        """Note that no further calls will have gradients."""
        self._forward = False

    def take(self, module: str, by_rank: Sequence[Grads]) -> None:
        """Take the gradients of a call of a module, for the microbatch of each rank."""
        mine = [{name: grad for name, grad in grads.items() if name in self.names} for grads in by_rank]
        before = self._taken.pop(module, None)
        if before is not None:
            mine = [{n: old[n] + new[n] for n in new} for old, new in zip(before, mine, strict=True)]
        self._taken[module] = mine
        self._calls[module] -= 1
        if not self._calls[module]:
            self._add(module)

    def _add(self, module: str) -> None:
        for rank, (own, grads) in enumerate(zip(self.owners, self._taken.pop(module), strict=True)):
            for node in own:
                weighed = self._weighed(list(self._reduced(list(grads.values()))), rank, node[1])
                for name, grad in zip(grads, weighed, strict=True):
                    self._sums.setdefault(name, TreeSum(add)).put(node, grad)

    def result(self, like: Mapping[str, Tensor]) -> tuple[Flat, list[dict[Node, Tensor]]]:
        """Return the sums as flat tensors of one dtype each, and how they are packed: of each the parts of the tree.

        Args:
            like: parameters by name; the gradient of experts that no token was sent to is zeros.
        """
        for module in list(self._taken):  # of calls that the loss does not depend on nothing has come
            self._add(module)
        keys = forest(sorted(index for own in self.owners for _, index in own))
        zeros = list(self._reduced([torch.zeros_like(like[name]) for name in self.names]))
        flat = flat_like(zeros)
        nodes = {name: dict.fromkeys(keys, zero) for name, zero in zip(self.names, zeros, strict=True)}
        nodes |= {name: total.nodes for name, total in self._sums.items()}
        if self.fast:
            keys = [(0, 0)]
            nodes = {n: {(0, 0): sum(nodes[n].values(), zero)} for n, zero in zip(self.names, zeros, strict=True)}
        found: list[dict[Node, Tensor]] = [{} for _ in flat.groups]
        for key in keys:
            for group, packed in zip(found, flat.pack([nodes[name][key] for name in self.names]), strict=True):
                group[key] = packed
        return flat, found
