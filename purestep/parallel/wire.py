"""Tensors on their way from one stage of a pipeline to another.

A message is a head of fixed length for each tensor, and then the bytes of all of them: shapes, strides and the place in
a line of the cache are those of the sender, because the bits of what is computed from a tensor may depend on them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any, Literal

import torch
import torch.distributed as dist
from torch import Tensor

from purestep.errors import StepError, explain

_DIMS = 8
_HEAD = 5 + 2 * _DIMS  # what is there, dtype, dims, elements of memory, bytes before it; sizes; strides
_LINE = 64
_DTYPES = [
    *(torch.float32, torch.float64, torch.float16, torch.bfloat16, torch.complex64, torch.complex128),
    *(torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool),
]
Kind = Literal["forward", "backward", "tied", "tied gradients", "metrics", "buffers"]
_KINDS: tuple[Kind, ...] = ("forward", "backward", "tied", "tied gradients", "metrics", "buffers")
_ABSENT, _PRESENT, _TRAINED = range(3)


@dataclasses.dataclass(frozen=True)
class Key:
    """What a message is: every rank that sends or receives it makes the same number of it.

    Args:
        kind: what is sent.
        stage: that it is for.
        index: of the microbatch.
        item: of several of one kind.
    """

    kind: Kind
    stage: int
    index: int = 0
    item: int = 0

    def tag(self, part: int) -> int:
        """Return the tag of the head (0) or of the bytes (1)."""
        number = ((_KINDS.index(self.kind) * 64 + self.stage) * 64 + self.item) * 2 + part
        return self.index << 16 | number & 0xFFFF


class Wire:
    """Sends and receives tensors along an axis of a mesh, for the length of a step.

    Args:
        group: the ranks along the axis.
    """

    def __init__(self, group: dist.ProcessGroup | None) -> None:
        self.group = group
        self.ranks = [0] if group is None else dist.get_process_group_ranks(group)
        self.here = dist.get_rank(group)
        self.leaving: list[tuple[Any, Tensor]] = []

    def send(self, to: int, key: Key, tensors: Sequence[Tensor | None]) -> None:
        """Begin to send tensors to a coordinate; whether each requires gradients is told, too."""
        laid = [None if x is None else _laid(x) for x in tensors]
        head = torch.zeros(len(tensors), _HEAD, dtype=torch.int64)
        pieces, at = [], 0
        for row, x, trained in zip(head, laid, tensors, strict=True):
            if x is None or trained is None:
                continue
            span, before = _span(x), x.data_ptr() % _LINE if x.numel() else 0
            numbers = [_TRAINED if trained.requires_grad else _PRESENT, _DTYPES.index(x.dtype), x.dim(), span, before]
            row[:5] = torch.tensor(numbers)
            row[5 : 5 + x.dim()] = torch.tensor(x.shape)
            row[5 + _DIMS : 5 + _DIMS + x.dim()] = torch.tensor(x.stride())
            pieces.append(torch.zeros(-at % _LINE + before, dtype=torch.uint8))
            pieces.append(x.as_strided((span,), (1,)).view(torch.uint8))
            at += sum(len(piece) for piece in pieces[-2:])
        self._begin(head, to, key.tag(0))
        if pieces:
            self._begin(torch.cat(pieces), to, key.tag(1))

    def _begin(self, sent: Tensor, to: int, tag: int) -> None:
        # Without this what has arrived would be held until the step ends.
        self.leaving = [(work, held) for work, held in self.leaving if not work.is_completed()]
        self.leaving.append((dist.isend(sent, self.ranks[to], self.group, tag), sent))

    def receive(self, source: int, key: Key, count: int) -> list[Tensor | None]:
        """Return so many tensors that a coordinate has sent, once they are here; trained ones require gradients."""
        head = torch.empty(count, _HEAD, dtype=torch.int64)
        if count:
            dist.recv(head, self.ranks[source], self.group, key.tag(0))
        rows, places, at = head.tolist(), [], 0
        for row in rows:
            start = at + -at % _LINE + row[4]
            places.append(start)
            if row[0] != _ABSENT:
                at = start + row[3] * _DTYPES[row[1]].itemsize
        if at == 0 and not any(row[0] for row in rows):
            return [None] * count
        data = torch.empty(at, dtype=torch.uint8)
        dist.recv(data, self.ranks[source], self.group, key.tag(1))
        return [_unpacked(data, row, start) for row, start in zip(rows, places, strict=True)]

    def close(self) -> None:
        """Wait until all that was sent has arrived."""
        for work, _ in self.leaving:
            work.wait()
        self.leaving = []


def _unpacked(data: Tensor, row: Sequence[int], start: int) -> Tensor | None:
    if row[0] == _ABSENT:
        return None
    dtype, dims, span = _DTYPES[row[1]], row[2], row[3]
    flat = data[start : start + span * dtype.itemsize].view(dtype)
    found = flat.as_strided(row[5 : 5 + dims], row[5 + _DIMS : 5 + _DIMS + dims])
    return found.requires_grad_() if row[0] == _TRAINED else found


def _laid(x: Tensor) -> Tensor:
    """Return a tensor whose memory can be sent as it is."""
    x = x.detach().resolve_conj().resolve_neg()
    if x.dim() > _DIMS or x.dtype not in _DTYPES or x.layout != torch.strided:
        raise StepError(
            explain(
                "a tensor cannot be sent from one stage to the next",
                where=f"{x.dtype}{list(x.shape)}, {x.layout}",
                why=f"dense tensors of at most {_DIMS} dims and the usual dtypes can",
                instead="begin the stage at another submodule",
            )
        )
    # The memory between its elements is sent along, so a tensor with large gaps is copied without them.
    return x if _span(x) <= 2 * x.numel() + _LINE else x.contiguous()


def _span(x: Tensor) -> int:
    if x.numel() == 0:
        return 0
    return 1 + sum((n - 1) * step for n, step in zip(x.shape, x.stride(), strict=True))
