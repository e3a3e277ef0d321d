"""Updates of a gradient transformation on simulated ranks: threads of one process that exchange through a barrier.

They execute the code of a real plan, so `check_transformation` needs neither processes nor a network.
"""

from __future__ import annotations

import dataclasses
import threading
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.optim.base import GradientTransformation
from purestep.sharding import ddp, exact_norm, full_tensors
from purestep.sharding.leaf_roles import follow

ROOTS = ("updates", "state", "params")  # of the pytrees of a result


@dataclasses.dataclass(frozen=True)
class Update:
    """The inputs of one update, and its results on full tensors."""

    number: int
    grads: Any
    state: Any
    params: Any
    extra: dict[str, Any]
    updates: Any
    following: Any

    def __str__(self) -> str:
        return f"update {self.number}"


class Shards:
    """The shards of the leaves of an update: consecutive rows for each rank; the last ranks may hold none."""

    def __init__(self, update: Update, size: int, dim: int) -> None:
        self.size, self.dim = size, dim
        self.shapes = {
            n: tuple(p.shape) for n, p in zip(tree.names(update.params), tree.leaves(update.params), strict=True)
        }
        # The parameter of each leaf of the optimizer state, which determines its placement under a real plan.
        roles = follow({"opt_state": update.state, "params": update.params})
        self.followed = [leaf.name is not None for leaf in roles if leaf.kind != "params"]

    def of(self, result: Sequence[Any], rank: int) -> tuple[Any, Any, Any]:
        """Return the shards of a rank of `(updates or gradients, state, params)`."""
        updates, state, params = result
        leaves, structure = tree.flatten(state)
        held = [self.cut(x, rank) if own else x for x, own in zip(leaves, self.followed, strict=True)]
        cut = lambda x: self.cut(x, rank)  # noqa: E731
        return tree.map(cut, updates), tree.unflatten(structure, held), tree.map(cut, params)

    def cut(self, leaf: Tensor, rank: int) -> Tensor:
        """Return a copy of the shard of a rank."""
        if leaf.dim() == 0 or self.size == 1:
            return leaf
        start, length = self.rows(tuple(leaf.shape), rank)
        return leaf.narrow(self.dim, start, length).clone(memory_format=torch.contiguous_format)

    def rows(self, shape: tuple[int, ...], rank: int) -> tuple[int, int]:
        """Return the start of the shard of a rank along the dimension, and its length."""
        count = shape[self.dim]
        most = -(-count // self.size)
        start = min(rank * most, count)
        return start, min(most, count - start)

    def shape(self, full: tuple[int, ...], rank: int) -> tuple[int, ...]:
        """Return the shape of the shard of a rank."""
        local = list(full)
        local[self.dim] = self.rows(full, rank)[1]
        return tuple(local)


class _Exchange:
    """An all-gather between simulated ranks, which are threads."""

    def __init__(self, size: int) -> None:
        self.sent: list[tuple[str, Any]] = [("", None)] * size
        self.barrier = threading.Barrier(size, timeout=120)

    def __call__(self, rank: int, what: str, value: object = None) -> list[Any]:
        self.sent[rank] = what, value
        self.barrier.wait()
        sent = list(self.sent)
        self.barrier.wait()
        if len({message for message, _ in sent}) > 1:
            raise RuntimeError(f"the ranks ask for different things: {', '.join(message for message, _ in sent)}")
        return [value for _, value in sent]


class _Rank(full_tensors.Whole):
    """The exchange of an update on one simulated rank with the others, as `Whole` is on real ranks."""

    def __init__(self, shards: Shards, rank: int, exchange: _Exchange, given: Sequence[Any]) -> None:
        super().__init__(ddp(), {})
        self.shards, self.rank, self.exchange = shards, rank, exchange
        self.__dict__["split"] = shards.size > 1
        own = [*([True] * len(tree.leaves(given[0]))), *shards.followed, *([True] * len(tree.leaves(given[2])))]
        self.held = {id(x) for x, yes in zip(tree.leaves(tuple(given)), own, strict=True) if yes and x.dim()}

    def reduce(self, values: Tensor, op: str) -> Tensor:
        stacked = torch.stack(self.exchange(self.rank, f"a {op}", values))
        return stacked.sum(0) if op == "sum" else stacked.amax(0) if op == "max" else stacked.amin(0)

    def squares(self, values: Sequence[Tensor], structure: Any) -> Tensor:
        counts, mine = [], []
        for name, value in zip(self.names(structure), values, strict=True):
            full = self.shards.shapes[name]
            counts.append(torch.Size(full).numel())
            mine.append(self._is_shard(name, value) or self.rank == 0)
        return exact_norm.squares(values, counts, mine, self.reduce)

    def count(self, name: str, value: Tensor) -> int:
        return torch.Size(self.shards.shapes[name]).numel()

    def full(self, named: Sequence[tuple[str, Any]]) -> list[Any]:
        return [
            torch.cat(self.exchange(self.rank, f"the full {name}", x), self.shards.dim)
            if self._is_shard(name, x)
            else x
            for name, x in named
        ]

    def parted(self, values: object, like: object) -> Any:
        leaves, structure = tree.flatten(values)
        old, known = tree.flatten(like)
        if structure != known:
            return values
        parts = [
            self.shards.cut(x, self.rank) if self._is_shard(name, y) else x
            for name, x, y in zip(self.names(known), leaves, old, strict=True)
        ]
        return tree.unflatten(structure, parts)

    def _is_shard(self, name: str, value: object) -> bool:
        if not self.split or not isinstance(value, Tensor):
            return False
        full = self.shards.shapes.get(name)
        return id(value) in self.held or bool(full and self.shards.shape(full, self.rank) == tuple(value.shape))


def on_ranks(tx: GradientTransformation, update: Update, size: int, dim: int) -> list[tuple[Any, Any, Any]]:
    """Return `(updates, state, params)` after an update for each simulated rank."""
    shards, exchange = Shards(update, size, dim), _Exchange(size)
    results: list[Any] = [None] * size
    failed: list[Exception] = []

    def run(rank: int) -> None:
        try:
            grads, state, params = shards.of((update.grads, update.state, update.params), rank)
            with full_tensors.updating(_Rank(shards, rank, exchange, (grads, state, params))):
                updates, following = tx.update(grads, state, params, **update.extra)
                results[rank] = updates, following, tx.apply(params, updates, following)
            exchange(rank, "nothing more")
        except threading.BrokenBarrierError:
            pass  # another rank failed, and its error is raised
        except Exception as error:
            failed.append(error)
            exchange.barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]
    return results
