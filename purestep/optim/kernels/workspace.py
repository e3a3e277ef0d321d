"""Temporary buffers of the operations of an update, kept from one update to the next.

Allocating fresh pages costs more than the arithmetic on them. Owns one small store for each thread. Only updates in
place use it, because no other code sees their intermediate results.
"""

from __future__ import annotations

import operator
import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep.sharding.step_account import KEPT, LEAST

_MOST_LISTS = 8  # lists kept in a thread; few suffice, because slices of a tensor have one shape, except for the last
_bytes_of = operator.attrgetter("nbytes")
_local = threading.local()


def into(name: str, function: Callable[..., Tensor], xs: Sequence[Tensor], *args: Any) -> list[Tensor] | None:
    """Return `function(x, *args)` for each tensor, in memory that the next call of this name and shapes overwrites.

    None if this would save nothing: on devices, whose allocators cache memory, for small tensors, and for lists that
    are too long.

    Examples:
        >>> first = into("double", torch.mul, [torch.ones(1 << 14)], 2.0)
        >>> second = into("double", torch.mul, [torch.ones(1 << 14)], 3.0)
        >>> float(first[0].max()), first[0] is second[0]
        (3.0, True)
    """
    size = sum(map(_bytes_of, xs))
    if not LEAST * len(xs) <= size <= KEPT or not all(x.is_cpu for x in xs):
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
