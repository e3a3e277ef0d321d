"""The few collectives that sharding is made of, on flat contiguous tensors.

Owns the calls to `torch.distributed` of a step. A group of None is this process alone: nothing is sent. Those that a
compiled step holds in its graph are functional (`all_reduce`); the others return at once and are waited for.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from purestep.distributed import _torch


@dataclasses.dataclass
class Pending:
    """A tensor that is on its way: `wait` returns it."""

    result: Tensor
    works: tuple[Any, ...] = ()
    sent: Any = None
    after: Callable[[Tensor], Tensor] | None = None

    def wait(self) -> Tensor:
        """Return the tensor once it is there."""
        for work in self.works:
            work.wait()
        if self.after is not None:
            self.result = self.after(self.result)
        self.works, self.sent, self.after = (), None, None
        return self.result


def size_of(group: dist.ProcessGroup | None) -> int:
    """Return the number of members of a group."""
    return 1 if group is None else dist.get_world_size(group)


def rank_in(group: dist.ProcessGroup | None) -> int:
    """Return this process's number in a group."""
    return 0 if group is None else dist.get_rank(group)


def gather(sent: Tensor, group: dist.ProcessGroup | None) -> Pending:
    """Return `[R, n]`: what each member of a group sent, `[n]` each."""
    if group is None:
        return Pending(sent.view(1, -1))
    received = sent.new_empty(size_of(group), sent.numel())
    # torch 2.13 calls it all_gather_single, and warns about the name that earlier ones know.
    call: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    return Pending(received, (call(received.view(-1), sent, group=group, async_op=True),), sent)


def numbers(number: int, group: dist.ProcessGroup | None, device: torch.device) -> list[int]:
    """Return the number of each member of a group, once all have sent theirs."""
    received: list[int] = gather(torch.tensor([number], device=device), group).wait().view(-1).tolist()
    return received


def exchange(sent: Tensor, group: dist.ProcessGroup | None, lengths: Sequence[int], own: int) -> Pending:
    """Return what the members of a group sent to this one, one after the other.

    Args:
        sent: what this one sends, `own` elements to each member.
        group: the group.
        lengths: elements that each member sends to this one.
        own: elements that this one sends to each.
    """
    if group is None:
        return Pending(sent)
    received = sent.new_empty(sum(lengths))
    splits = (
        {}
        if len({*lengths, own}) == 1
        else {"output_split_sizes": [*lengths], "input_split_sizes": [own] * len(lengths)}
    )
    work = dist.all_to_all_single(received, sent, group=group, async_op=True, **splits)
    return Pending(received, (work,), sent)


def swap(sent: Tensor, group: dist.ProcessGroup) -> Pending:
    """Return what the other member of a group of two sent."""
    other = dist.get_global_rank(group, 1 - rank_in(group))
    received = torch.empty_like(sent)
    requests = [dist.P2POp(dist.isend, sent, other, group), dist.P2POp(dist.irecv, received, other, group)]
    return Pending(received, tuple(dist.batch_isend_irecv(requests)), sent)


def sum_into(values: Tensor, group: dist.ProcessGroup | None) -> Pending:
    """Add up a tensor over a group in whatever order is fastest; it is overwritten."""
    if group is None:
        return Pending(values)
    if size_of(group) == 2 and _by_gloo(values, group):
        # Two swap and add: gloo's ring sends as much, and takes longer.
        pending = swap(values, group)
        pending.after = values.add_
        return pending
    return Pending(values, (dist.all_reduce(values, group=group, async_op=True),))


def scatter_sum(rows: Tensor, group: dist.ProcessGroup | None) -> Pending:
    """Return this member's row of the sum of `[R, n]` over a group, in whatever order is fastest."""
    if group is None:
        return Pending(rows.view(-1))
    count, n = rows.shape
    if _by_gloo(rows, group):
        # gloo's reduce-scatter takes two to three times as long as sending each member its row.
        pending = exchange(rows.view(-1), group, [n] * count, n)
        pending.after = lambda received: received.view(count, n).sum(0)
        return pending
    received = rows.new_empty(n)
    call: Any = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
    return Pending(received, (call(received, rows.view(-1), group=group, async_op=True),), rows)


def _by_gloo(values: Tensor, group: dist.ProcessGroup) -> bool:
    return values.device.type == "cpu" and "gloo" in str(dist.get_backend(group))


def all_reduce(values: Tensor, op: str, group: dist.ProcessGroup | None) -> Tensor:
    """Return the "sum", "max" or "min" of a small tensor over a group; it may stand in a compiled graph."""
    if group is None:
        return values
    return _torch.all_reduce(values, op, group.group_name)
