"""Private names of torch that several processes need, those of DTensor left out (`_dtensor`).

Seen to work on torch 2.11.0, 2.13.0 and 2.14.1.

    default_store           where ranks leave word for those that miss them, when no collective works any more.
                            Without it: keep the store of `join`, which a process group of the caller's does not give.
    all_reduce              a collective that may stand in a traced graph. Without it:
                            `torch.distributed.nn.functional.all_reduce`, which copies.
    foreach_norm            norms of many tensors at once. Without it: `torch.linalg.vector_norm` of each.
    foreach_copy_           copies of many tensors at once. Without it: `copy_` of each.
    foreach_add_            sums of many pairs at once. Without it: `add_` of each.
"""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor

foreach_norm = torch._foreach_norm
foreach_copy_ = torch._foreach_copy_
foreach_add_ = torch._foreach_add_


def default_store() -> dist.Store:
    """Return the key-value store through which the processes of the default group found each other."""
    return dist.distributed_c10d._get_default_store()


def all_reduce(values: Tensor, op: str, group_name: str) -> Tensor:
    """Return the "sum", "max" or "min" of a tensor over a group, as an operator with a value of its own."""
    functional = torch.ops._c10d_functional
    reduced: Tensor = functional.wait_tensor(functional.all_reduce(values, op, group_name))
    return reduced
