"""The ranks that compute each microbatch together, and what they exchange, forward and backward.

A tensor that is split has `parts` of equal size, and each rank of a team computes with a run of them. A sum over parts
is added in one binary tree, so its bits depend on the number of parts, and not on the number of ranks. Each exchange is
an autograd function of plain tensors: what is gathered forward is cut backward, and what is used by all parts forward
gets the sum of their gradients.
"""

from __future__ import annotations

import dataclasses
import functools
import weakref
from collections.abc import Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from purestep._torch import writes
from purestep.distributed import collectives
from purestep.parallel import _torch
from purestep.treesum import TreeSum

Blocks = tuple[int, ...]
Parts = tuple[Tensor, ...]


@dataclasses.dataclass(eq=False)
class Team:
    """The ranks that compute each microbatch together.

    Args:
        group: of these ranks; None for this one alone.
        parts: into how many a split dim is cut; a multiple of the number of ranks.
        fast: sums go by the collectives of the backend, in an order of theirs.
        sequence: sums stay split over the positions of a sequence where nothing needs them whole.
        context: parts are runs of positions: the model is given a part of each sequence, and no parameter is cut.
        ring: attention passes keys and values on from rank to rank, and gathers none.
    """

    group: dist.ProcessGroup | None
    parts: int
    fast: bool = False
    sequence: bool = False
    context: bool = False
    ring: bool = False

    def __post_init__(self) -> None:
        self.size, self.rank = collectives.size_of(self.group), collectives.rank_in(self.group)
        self.own = self.parts // self.size
        self.numbers = range(self.rank * self.own, (self.rank + 1) * self.own)
        self._entered: tuple[weakref.ref[Tensor], int | None, Parts] | None = None
        self.met = False  # whether the model was called since, see `split_positions`

    @functools.cached_property
    def name(self) -> str:
        """The name of the group."""
        return "" if self.group is None else str(self.group.group_name)

    # --- forward, with what follows backward ---

    def enter(self, whole: Tensor) -> Parts:
        """Return a whole tensor once for each part of this rank; its gradient is the sum over all parts."""
        if not (whole.requires_grad and torch.is_grad_enabled()):
            return (whole,) * self.own
        # Projections of one tensor follow each other (query, key, value): one sum of gradients serves all of them.
        if self._entered is not None:
            known, written, entered = self._entered
            if known() is whole and written == writes(whole):
                return entered
        outputs: Parts = _Enter.apply(self, whole)
        self._entered = weakref.ref(whole), writes(whole), outputs
        return outputs

    def forget(self) -> None:
        """Let go of the tensor that was entered last: a pass is over."""
        self._entered, self.met = None, False

    def cut(self, whole: Tensor, dim: int, blocks: Blocks) -> Parts:
        """Return this rank's parts of a whole tensor."""
        return _Cut.apply(self, dim, blocks, whole)

    def gather(self, parts: Parts, dim: int, blocks: Blocks) -> Tensor:
        """Return the whole of a tensor of which this rank has parts."""
        whole: Tensor = _Gather.apply(self, dim, blocks, *parts)
        return whole

    def gather_each(self, parts: Sequence[Tensor], dim: int) -> Parts:
        """Return the whole of a tensor once for each part of this rank, which computes other things with it than the
        other parts do: its gradient is the sum over all parts, of which each rank keeps its own."""
        return _GatherEach.apply(self, dim, *parts)

    def sum(self, addends: Sequence[Tensor]) -> Tensor:
        """Return the sum of one tensor from each part, on every rank."""
        total: Tensor = _Sum.apply(self, *addends)
        return total

    def sum_cut(self, addends: Sequence[Tensor], dim: int) -> Parts:
        """Return this rank's parts of the sum of one tensor from each part."""
        return _SumCut.apply(self, dim, *addends)

    def parameter(self, held: Tensor, dim: int, blocks: Blocks) -> Parts:
        """Return this rank's parts of a parameter, of which it holds one run along a dim."""
        if self.own == 1 and len(blocks) == 1:
            return (held,)
        return _Parameter.apply(self, dim, blocks, held)

    # --- what they are made of ---

    def total(self, addends: Sequence[Tensor]) -> Tensor:
        """Add up tensors of all parts in the tree."""
        mine = _tree(addends)
        if self.group is None:
            return mine
        if self.fast:
            return collectives.all_reduce(mine.contiguous(), "sum", self.group)
        if self.size == 2:
            return _tree(self.everyone(mine).unbind())
        flat = mine.reshape(-1)
        length = -(-flat.numel() // self.size)
        rows = torch.nn.functional.pad(flat, (0, length * self.size - flat.numel())).view(self.size, length)
        # Each rank adds one slice of all addends: twice the bytes of one tensor, for any number of ranks.
        added = _tree(_torch.exchange(rows, self.size, self.name).unbind())
        return self.everyone(added).reshape(-1)[: flat.numel()].view(mine.shape)

    def total_cut(self, addends: Sequence[Tensor], dim: int) -> Parts:
        """Add up tensors of all parts in the tree, and return this rank's parts of the sum."""
        mine = _tree(addends)
        blocks = (mine.shape[dim],)
        if self.group is None:
            return self.pieces(mine, dim, blocks)
        rows = torch.stack([x.contiguous() for x in mine.chunk(self.size, dim)])
        received = _torch.exchange(rows, self.size, self.name).view(rows.shape)
        run = _tree(received.unbind())
        return tuple(x.contiguous() for x in run.chunk(self.own, dim))

    def everyone(self, mine: Tensor) -> Tensor:
        """Return `[size, *shape]`: the tensor of each rank, of the same shape on all."""
        if self.group is None:
            return mine.unsqueeze(0)
        sent = mine.contiguous().reshape(-1)
        # Bytes can be sent of any dtype; a tensor of less than two bytes an element goes as it is.
        raw = sent if sent.dtype in (torch.float32, torch.float64, torch.int64) else sent.view(torch.uint8)
        received = _torch.all_gather(raw, self.size, self.name)
        return received.view(sent.dtype).view(self.size, *mine.shape)

    def maximum(self, values: Sequence[Tensor]) -> Tensor:
        """Return the largest of one tensor from each part, element by element."""
        mine = functools.reduce(torch.maximum, values)
        return self.everyone(mine).amax(0)

    def pieces(self, whole: Tensor, dim: int, blocks: Blocks) -> Parts:
        """Cut this rank's parts out of a whole tensor."""
        return tuple(_piece(whole, dim, blocks, number, self.parts) for number in self.numbers)

    def joined(self, parts: Sequence[Tensor], dim: int, blocks: Blocks) -> Tensor:
        """Put the parts of all ranks together."""
        rows = self.everyone(torch.stack(list(parts))).flatten(0, 1)
        return _join(rows.unbind(), dim, blocks)


def _tree(addends: Sequence[Tensor]) -> Tensor:
    total: TreeSum[Tensor] = TreeSum(torch.add)
    for addend in addends:
        total.add(addend)
    return total.result()


def _piece(whole: Tensor, dim: int, blocks: Blocks, number: int, parts: int) -> Tensor:
    found, start = [], 0
    for length in blocks:
        found.append(whole.narrow(dim, start + number * (length // parts), length // parts))
        start += length
    # A copy: the bits of a product depend on where in memory its operands lie.
    return torch.cat(found, dim) if len(found) > 1 else found[0].clone(memory_format=torch.contiguous_format)


def _join(parts: Sequence[Tensor], dim: int, blocks: Blocks) -> Tensor:
    if len(blocks) == 1:
        return torch.cat(list(parts), dim)
    lengths = [length // len(parts) for length in blocks]
    split = [part.split(lengths, dim) for part in parts]
    return torch.cat([pieces[i] for i in range(len(blocks)) for pieces in split], dim)


class _Enter(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, team: Team, whole: Tensor) -> Parts:
        ctx.team = team
        return tuple(whole.view_as(whole) for _ in range(team.own))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, ctx.team.total(grads)


class _Cut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, team: Team, dim: int, blocks: Blocks, whole: Tensor) -> Parts:
        ctx.how = team, dim, blocks
        return team.pieces(whole, dim, blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        team, dim, blocks = ctx.how
        return None, None, None, team.joined(grads, dim, blocks)


class _Gather(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, team: Team, dim: int, blocks: Blocks, *parts: Tensor) -> Tensor:
        ctx.how = team, dim, blocks
        return team.joined(parts, dim, blocks)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        team, dim, blocks = ctx.how
        return None, None, None, *team.pieces(grad, dim, blocks)


class _GatherEach(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, team: Team, dim: int, *parts: Tensor) -> Parts:
        ctx.team, ctx.dim = team, dim % parts[0].ndim
        whole = team.joined(parts, ctx.dim, (parts[0].shape[ctx.dim] * team.parts,))
        return tuple(whole.view_as(whole) for _ in range(team.own))

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        return None, None, *ctx.team.total_cut(grads, ctx.dim)


class _Sum(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, team: Team, *addends: Tensor) -> Tensor:
        ctx.own = team.own
        return team.total(addends)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Any, ...]:
        return None, *(grad,) * ctx.own


class _SumCut(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, team: Team, dim: int, *addends: Tensor) -> Parts:
        ctx.team, ctx.dim, ctx.blocks = team, dim, (addends[0].shape[dim],)
        return team.total_cut(addends, dim)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        whole = ctx.team.joined(grads, ctx.dim, ctx.blocks)
        return None, None, *(whole,) * ctx.team.own


class _Parameter(torch.autograd.Function):
    """The parts of a parameter whose ranks hold one run each; of several blocks, the parts of each block."""

    @staticmethod
    def forward(ctx: Any, team: Team, dim: int, blocks: Blocks, held: Tensor) -> Parts:
        ctx.how = team, dim, blocks
        if len(blocks) == 1:
            return tuple(x.clone(memory_format=torch.contiguous_format) for x in held.chunk(team.own, dim))
        return team.pieces(torch.cat(team.everyone(held).unbind(), dim), dim, blocks)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        team, dim, blocks = ctx.how
        if len(blocks) == 1:
            return None, None, None, torch.cat(grads, dim)
        whole = team.joined(grads, dim, blocks)
        return None, None, None, whole.chunk(team.size, dim)[team.rank].contiguous()
