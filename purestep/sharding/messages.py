"""The parts of many split tensors in one message, as bytes; full tensors from the messages of all members of a group.

Arithmetic and copies only; `placement` sends the messages. As bytes tensors of any dtypes go together, also of dtypes
that a backend cannot send.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from purestep.distributed._torch import foreach_copy_
from purestep.sharding.spec import Box

_ALIGN = 16  # bytes: every message begins where a tensor of any dtype may begin


def slice_of(full: Tensor, part: Box) -> Tensor:
    """Return the view of a tensor at `(offset, shape)`."""
    for dim, (start, length) in enumerate(zip(*part, strict=True)):
        full = full.narrow(dim, start, length)
    return full


def copies(views: Sequence[Tensor]) -> list[Tensor]:
    """Return contiguous copies of some tensors."""
    made = [torch.empty_like(x, memory_format=torch.contiguous_format) for x in views]
    copy_all(made, views)
    return made


def copy_all(into: Sequence[Tensor], come: Sequence[Tensor]) -> None:
    """Copy tensors into others of their shapes and dtypes; a card does all that lie alike in memory together."""
    groups: dict[object, list[int]] = {}
    for i, (target, x) in enumerate(zip(into, come, strict=True)):
        # One pair of other strides would make torch copy a whole list one by one.
        alike = target.stride() == x.stride() and target.device == x.device
        groups.setdefault((x.dtype, x.device) if alike else i, []).append(i)
    for at in groups.values():
        foreach_copy_([into[i] for i in at], [come[i] for i in at])


class Message:
    """The layout of the messages that the members of a group send each other.

    Args:
        shapes: of the full tensors.
        dtypes: of the full tensors.
        boxes: for each tensor the part of each member, in the order of the group.
    """

    def __init__(
        self, shapes: Sequence[tuple[int, ...]], dtypes: Sequence[torch.dtype], boxes: Sequence[Sequence[Box]]
    ) -> None:
        self.shapes, self.dtypes, self.boxes = shapes, dtypes, boxes
        self.count = len(boxes[0])
        # The widest dtype first: each part begins at a multiple of its size.
        self.order = sorted(range(len(shapes)), key=lambda i: -dtypes[i].itemsize)
        # Shorter parts are filled up: all members send messages of one length.
        self.lengths = [max(math.prod(shape) for _, shape in boxes[i]) * dtypes[i].itemsize for i in self.order]
        self.filling = -sum(self.lengths) % _ALIGN
        self.even = all(is_even(parts) for parts in boxes)

    def pack(self, parts: Sequence[Tensor]) -> Tensor:
        """Return this member's message, uint8 [n]. What fills it up is never read, and has no value."""
        pieces = []
        for i, length in zip(self.order, self.lengths, strict=True):
            piece = parts[i].detach().reshape(-1).view(torch.uint8)
            pieces.append(piece)
            if short := length - piece.numel():
                pieces.append(piece.new_empty(short))
        if self.filling:
            pieces.append(pieces[0].new_empty(self.filling))
        return torch.cat(pieces)

    def unpack(self, received: Tensor) -> list[Tensor]:
        """Return the full tensors of the messages of all members, uint8 [R, n]."""
        full = [received.new_empty(shape, dtype=dtype) for shape, dtype in zip(self.shapes, self.dtypes, strict=True)]
        lengths = [*self.lengths, self.filling]
        if self.even:
            # The parts of all members follow one another in a full tensor: one kernel puts them all in place.
            runs = [full[i].view(-1).view(torch.uint8).view(self.count, -1) for i in self.order]
            torch.split_with_sizes_copy(
                received, lengths, dim=1, out=[*runs, received.new_empty(self.count, self.filling)]
            )
            return full
        into, come = [], []
        for i, rows in zip(self.order, received.split(lengths, dim=1), strict=False):
            for row, (offset, shape) in zip(rows.view(self.dtypes[i]), self.boxes[i], strict=True):
                into.append(slice_of(full[i], (offset, shape)))
                come.append(row[: math.prod(shape)].view(shape))
        copy_all(into, come)
        return full


def even_dim(boxes: Sequence[Box]) -> int | None:
    """Return the dim of which the members hold equal runs, in their order; None if there is none."""
    first = boxes[0][1]
    for dim, length in enumerate(first):
        if all(
            part == first and offset == tuple(i * length if d == dim else 0 for d in range(len(first)))
            for i, (offset, part) in enumerate(boxes)
        ):
            return dim
    return None


def is_even(boxes: Sequence[Box]) -> bool:
    """Tell whether the members hold equal runs of dim 0, in their order: below one another, they are the whole."""
    return even_dim(boxes) == 0
