"""Tensors on their way from one stage of a pipeline to another.

A message says what it is, and then come a row of fixed length for each tensor and the bytes of all of them: shapes,
strides and the place in a line of the cache are those of the sender, because the bits of what is computed from a tensor
may depend on them. Messages between two ranks arrive in the order in which they were sent, without tags, which NCCL
does not have; one that comes before it is wanted waits here.
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
_ABOUT = 6  # numbers of a message: its key, tensors, bytes
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
    """What a message is: the rank that sends it and the one that receives it know it by the same key.

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

    def numbers(self) -> list[int]:
        """Return what the head of a message says of it."""
        return [_KINDS.index(self.kind), self.stage, self.index, self.item]

    @staticmethod
    def of(numbers: Sequence[int]) -> Key:
        """Return the key that a head has."""
        return Key(_KINDS[numbers[0]], *numbers[1:4])


@dataclasses.dataclass(frozen=True)
class Lines:
    """The groups over which the ranks of a pipeline send: one for each direction.

    A rank would send and receive over one group in turn: two that send to each other at once would wait for each other
    where what is sent waits in line until it is taken, as on NCCL's stream.

    Attributes:
        up: to ranks with a higher number.
        down: to ranks with a lower one.
    """

    up: dist.ProcessGroup | None
    down: dist.ProcessGroup | None

    def between(self, source: int, to: int) -> dist.ProcessGroup | None:
        """Return the group over which one coordinate sends to another."""
        return self.up if to > source else self.down


class Wire:
    """Sends and receives tensors along an axis of a mesh, for the length of a step.

    Args:
        lines: the ranks along the axis.
        device: where tensors are sent from and received.
    """

    def __init__(self, lines: Lines, device: torch.device) -> None:
        self.lines, self.device = lines, device
        self.ranks = [0] if lines.up is None else dist.get_process_group_ranks(lines.up)
        self.here = dist.get_rank(lines.up)
        self.leaving: list[tuple[Any, Tensor]] = []
        self.early: dict[tuple[int, Key], list[Tensor | None]] = {}

    def send(self, to: int, key: Key, tensors: Sequence[Tensor | None]) -> None:
        """Begin to send tensors to a coordinate; whether each requires gradients is told, too."""
        laid = [None if x is None else _laid(x) for x in tensors]
        rows = torch.zeros(len(tensors), _HEAD, dtype=torch.int64)
        pieces, at = [], rows.nbytes
        for row, x, trained in zip(rows, laid, tensors, strict=True):
            if x is None or trained is None:
                continue
            span, before = _span(x), x.data_ptr() % _LINE if x.numel() else 0
            numbers = [_TRAINED if trained.requires_grad else _PRESENT, _DTYPES.index(x.dtype), x.dim(), span, before]
            row[:5] = torch.tensor(numbers)
            row[5 : 5 + x.dim()] = torch.tensor(x.shape)
            row[5 + _DIMS : 5 + _DIMS + x.dim()] = torch.tensor(x.stride())
            pieces.append(torch.zeros(-at % _LINE + before, dtype=torch.uint8, device=self.device))
            pieces.append(x.as_strided((span,), (1,)).view(torch.uint8))
            at += sum(len(piece) for piece in pieces[-2:])
        self._begin(torch.tensor([*key.numbers(), len(tensors), at]).to(self.device), to)
        if at:
            self._begin(torch.cat([rows.view(-1).view(torch.uint8).to(self.device), *pieces]), to)

    def _begin(self, sent: Tensor, to: int) -> None:
        # Without this what has arrived would be held until the step ends.
        self.leaving = [(work, held) for work, held in self.leaving if not work.is_completed()]
        group = self.lines.between(self.here, to)
        self.leaving.append((dist.isend(sent, self.ranks[to], group), sent))

    def receive(self, source: int, key: Key) -> list[Tensor | None]:
        """Return the tensors that a coordinate has sent, once they are here; trained ones require gradients."""
        while (source, key) not in self.early:
            self._take(source)
        return self.early.pop((source, key))

    def _take(self, source: int) -> None:
        """Receive the next message of a coordinate, whatever it is."""
        about = torch.empty(_ABOUT, dtype=torch.int64, device=self.device)
        group = self.lines.between(source, self.here)
        dist.recv(about, self.ranks[source], group)
        *numbers, count, length = about.tolist()
        data = torch.empty(length, dtype=torch.uint8, device=self.device)
        if length:
            dist.recv(data, self.ranks[source], group)
        at = count * _HEAD * torch.int64.itemsize
        found: list[Tensor | None] = []
        for row in data[:at].view(torch.int64).view(count, _HEAD).tolist():
            start = at + -at % _LINE + row[4]
            if row[0] != _ABSENT:
                at = start + row[3] * _DTYPES[row[1]].itemsize
            found.append(_unpacked(data, row, start))
        self.early[source, Key.of(numbers)] = found

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
