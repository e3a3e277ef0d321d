"""Gradients that are sent in a narrower dtype than they are added up in, where a plan says `compress=`.

What a rank has added up itself stays in its own dtype; the exchange between ranks, and what it adds, is in the narrow
one, as in torch's `bf16_compress_hook`.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
import torch.distributed as dist
from torch import Tensor

from purestep.distributed import collectives
from purestep.distributed.collectives import Pending


def sum_into(values: Tensor, group: dist.ProcessGroup | None, dtype: torch.dtype | None) -> Pending:
    """Do what `collectives.sum_into` does, with the tensor sent in a dtype."""
    return _narrowed(collectives.sum_into, values, group, dtype)


def scatter_sum(rows: Tensor, group: dist.ProcessGroup | None, dtype: torch.dtype | None) -> Pending:
    """Do what `collectives.scatter_sum` does, with the rows sent in a dtype."""
    return _narrowed(collectives.scatter_sum, rows, group, dtype)


def _narrowed(
    reduce: Callable[[Tensor, dist.ProcessGroup | None], Pending],
    values: Tensor,
    group: dist.ProcessGroup | None,
    dtype: torch.dtype | None,
) -> Pending:
    if group is None or dtype is None or dtype.itemsize >= values.element_size():
        return reduce(values, group)
    # Shares of a mean: float16 could not hold the sum over many ranks.
    count, wide = collectives.size_of(group), values.dtype
    pending = reduce((values / count).to(dtype), group)
    added = pending.after or (lambda received: received)
    pending.after = lambda received: added(received).to(wide).mul_(count)
    return pending
