"""Temporary buffers of the operations of an update, kept from one update to the next.

To take pages from the operating system and give them back costs more than the arithmetic on them. Owns one small store
a thread; only updates in place use it, whose intermediate results no other code sees.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

_MOST_BYTES = 1 << 25  # of one list; more is left to the allocator
_MOST_LISTS = 8  # the slices of a tensor have one shape, but for the last
_local = threading.local()


def into(name: str, function: Callable[..., Tensor], xs: Sequence[Tensor], *args: Any) -> list[Tensor] | None:
    """Return `function(x, *args)` for each tensor, in memory that the next call of this name and shapes takes again.

    None where it would save nothing: on devices, whose allocators keep memory, and for lists that are too long to keep.

    Examples:
        >>> first = into("double", torch.mul, [torch.ones(2)], 2.0)
        >>> second = into("double", torch.mul, [torch.ones(2)], 3.0)
        >>> first[0].tolist(), first[0] is second[0]
        ([3.0, 3.0], True)
    """
    if not all(x.is_cpu for x in xs) or sum(x.nbytes for x in xs) > _MOST_BYTES:
        return None
    kept: dict[Hashable, list[Tensor]] = _local.__dict__.setdefault("kept", {})
    key = name, tuple((x.shape, x.stride(), x.dtype) for x in xs)
    room = kept.pop(key, None)
    if room is None:
        room = [torch.empty_like(x) for x in xs]
        if len(kept) >= _MOST_LISTS:
            del kept[next(iter(kept))]
    kept[key] = room
    return [function(x, *args, out=own) for x, own in zip(xs, room, strict=True)]
