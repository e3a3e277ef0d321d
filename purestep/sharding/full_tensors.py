"""What an update that is handed local parts can ask about the whole: norms, finiteness, whole tensors.

A step enters `updating` around its update; the transformations in it ask `current()`. Without a plan there is nothing
to ask, and nothing of this is used.
"""

from __future__ import annotations

import contextlib
import functools
import itertools
import threading
from collections.abc import Callable, Iterator, Sequence
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from purestep import _torch, tree
from purestep.distributed import collectives
from purestep.distributed._torch import foreach_norm
from purestep.errors import ConfigError, explain
from purestep.sharding import exact_norm, placement
from purestep.sharding.plan import Plan

T = TypeVar("T")
_local = threading.local()


class Whole:
    """The whole tensors behind the local parts of one state.

    Args:
        plan: of the step.
        params: the parameters at rest: DTensors where they are split.
        opt_state: the optimizer state at rest.
    """

    def __init__(self, plan: Plan, params: Any, opt_state: Any = None) -> None:
        self.plan = plan
        self._given = params, opt_state
        self._names: dict[Any, list[str]] = {}

    # Most updates ask for little of this, and those that are compiled for nothing.

    @functools.cached_property
    def params(self) -> dict[str, Tensor]:
        """The parameters at rest, by name."""
        params = self._given[0]
        return dict(zip(tree.names(params), tree.leaves(params), strict=True))

    @functools.cached_property
    def split(self) -> bool:
        """Whether ranks hold parts of parameters."""
        return any(placement.is_split(leaf) for leaf in tree.leaves(self._given[0]))

    @functools.cached_property
    def group(self) -> dist.ProcessGroup | None:
        """The ranks that hold one state together; None where this one holds it alone."""
        return self.plan.mesh.group(*self.plan.shard_axes, *self.plan.model_axes) if self.split else None

    @functools.cached_property
    def _mine(self) -> dict[str, bool]:
        shared = (*self.plan.shard_axes, *self.plan.model_axes)
        return {n: placement.is_owner(x, among=shared) for n, x in self.params.items() if placement.is_split(x)}

    @functools.cached_property
    def _rest(self) -> dict[int, Any]:
        return {id(_torch.local_tensor(x)): x for x in tree.leaves(self._given[1]) if placement.is_split(x)}

    def names(self, structure: tree.Structure) -> list[str]:
        """Return the dotted names of the leaves of a structure."""
        if structure not in self._names:
            self._names[structure] = tree.names(tree.unflatten(structure, range(structure.num_leaves)))
        return self._names[structure]

    def reduce(self, values: Tensor, op: str) -> Tensor:
        """Return the sum, maximum or minimum of a small tensor over the ranks that share a state."""
        return collectives.all_reduce(values, op, self.group)

    def squares(self, values: Sequence[Tensor], structure: tree.Structure) -> Tensor:
        """Return the sum of squares of each whole tensor, float64 [len(values)]."""
        counts, mine = [], []
        first = collectives.rank_in(self.group) == 0
        for name, value in zip(self.names(structure), values, strict=True):
            leaf = self._find(name, value)
            split = leaf is not None and placement.is_split(leaf)
            counts.append(leaf.numel() if leaf is not None and split else value.numel())
            mine.append(self._mine[name] if split else first)
        if self.plan.reduction == "fast":
            found = foreach_norm(list(values), 2, dtype=None)
            sums = torch.stack([x if own else torch.zeros_like(x) for x, own in zip(found, mine, strict=True)])
            return self.reduce(sums.to(exact_norm.wide(sums.device)).square(), "sum")
        return exact_norm.squares(values, counts, mine, self.reduce)

    def _find(self, name: str, value: Tensor) -> Tensor | None:
        leaf = self.params.get(name)
        if leaf is None and self.split:
            where = f"{name!r}: {tree.describe(value)}"
            instead = "names of the parameters, as tree.names(state.params) has them"
            raise ConfigError(
                explain("a norm was asked of a tensor that is no parameter", where=where, instead=instead)
            )
        return leaf

    def count(self, name: str, value: Tensor) -> int:
        """Return the number of elements of the full tensor behind a leaf of the updates."""
        return self.params.get(name, value).numel()

    def full(self, named: Sequence[tuple[str, Any]]) -> list[Any]:
        """Return leaves with full tensors in place of this rank's shards, gathered together; every rank calls it.

        Args:
            named: leaves of trees like that of the parameters or the optimizer state, and their names.
        """
        likes = [self._like(name, x) for name, x in named]
        split = [placement.rewrap(x, y) for (_, x), y in zip(named, likes, strict=True) if y is not None]
        found = iter(placement.fulls(split))
        return [x if y is None else next(found) for (_, x), y in zip(named, likes, strict=True)]

    def in_full(self, call: Callable[..., T], *values: Any) -> T:
        """Call a function of trees with full tensors in place of this rank's shards; every rank calls it."""
        flat = [tree.flatten(value) for value in values]
        named = [pair for leaves, s in flat for pair in zip(self.names(s), leaves, strict=True)]
        found = iter(self.full(named))
        full = [tree.unflatten(s, list(itertools.islice(found, s.num_leaves))) for _, s in flat]
        with updating(_Alone(self)):
            return call(*full)

    def spread(self, call: Callable[[Tensor], Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
        """Return `call(x)`, of the shape and dtype of x, of each of some full tensors that all ranks have.

        Where ranks hold one state together each computes some, and they exchange the results: the bits are those of one
        rank that computes all, because each call is of one tensor.
        """
        return list(map(call, xs))

    def _like(self, name: str, value: object) -> Tensor | None:
        at_rest = self._rest.get(id(value))
        if at_rest is None and isinstance(value, Tensor):
            at_rest = self.params.get(name)
            if at_rest is not None and not (
                placement.is_split(at_rest) and placement.part_of(at_rest).shape == value.shape
            ):
                at_rest = None
        return at_rest if at_rest is not None and placement.is_split(at_rest) else None

    def parted(self, values: T, like: object) -> T:
        """Return a tree of whole tensors with the local part of each whose counterpart in `like` was one."""
        leaves, structure = tree.flatten(values)
        old, known = tree.flatten(like)
        if structure != known:
            return values
        likes = [self._like(name, x) for name, x in zip(self.names(known), old, strict=True)]
        pairs = [(x, y) for x, y in zip(leaves, likes, strict=True) if y is not None]
        parts = iter(placement.parts_like([x for x, _ in pairs], [y for _, y in pairs]))
        return tree.unflatten(structure, [x if y is None else next(parts) for x, y in zip(leaves, likes, strict=True)])


def current() -> Whole | None:
    """Return what is behind the local parts of the update that is going on, or None where all tensors are whole."""
    return getattr(_local, "whole", None)


@contextlib.contextmanager
def updating(whole: Whole | None) -> Iterator[None]:
    """Let transformations ask about the whole for the duration of a `with` block."""
    before = current()
    _local.whole = whole
    try:
        yield
    finally:
        _local.whole = before


class _Alone(Whole):
    """Whole tensors on every rank: exact sums as before, and no rank to ask."""

    def __init__(self, outer: Whole) -> None:
        super().__init__(outer.plan, {})
        self._names, self._ranks = outer._names, outer.group

    def spread(self, call: Callable[[Tensor], Tensor], xs: Sequence[Tensor]) -> list[Tensor]:
        count, me = collectives.size_of(self._ranks), collectives.rank_in(self._ranks)
        if count == 1 or len(xs) < 2 or len({x.dtype for x in xs}) > 1:
            return list(map(call, xs))
        shares = _shares([x.numel() for x in xs], count)
        longest = max(sum(xs[i].numel() for i in share) for share in shares)
        mine = [call(xs[i]).reshape(-1) for i in shares[me]]
        filling = xs[0].new_empty(longest - sum(x.numel() for x in mine))
        rows = collectives.gather(torch.cat([*mine, filling]), self._ranks).wait()
        found = list(xs)
        for share, row in zip(shares, rows, strict=True):
            pieces = row[: sum(xs[i].numel() for i in share)].split([xs[i].numel() for i in share])
            for i, piece in zip(share, pieces, strict=True):
                found[i] = piece.view(xs[i].shape)
        return found


def _shares(sizes: Sequence[int], count: int) -> list[list[int]]:
    """Deal positions out so that the sums of their sizes are nearly equal: the largest first, to the least loaded."""
    shares: list[list[int]] = [[] for _ in range(count)]
    loads = [0] * count
    for i in sorted(range(len(sizes)), key=lambda i: -sizes[i]):
        least = loads.index(min(loads))
        shares[least].append(i)
        loads[least] += sizes[i]
    return shares
