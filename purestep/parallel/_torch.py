"""Private names of torch that split tensors need. Seen to work on torch 2.11.0, 2.13.0 and 2.14.1.

wrapper                 a tensor with a shape and no memory, of a class with `__torch_function__`. Torch documents
                        it in "Extending PyTorch" under this name. Without it: `Tensor._make_subclass` of an
                        expanded scalar.
no_subclass             a context in which `__torch_function__` is not asked: published as
                        `torch.overrides` functions in part.
all_gather, exchange    collectives that may stand in a traced graph. Without them: those of
                        `torch.distributed.nn.functional`, which copy.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TypeVar

import torch
from torch import Tensor

T = TypeVar("T", bound=Tensor)
no_subclass = torch._C.DisableTorchFunctionSubclass
nn_functions = torch._C._nn


def wrapper(kind: type[T], shape: Sequence[int], like: Tensor) -> T:
    """Return a tensor of a class that has a shape, the dtype and device of another one, and no memory."""
    made: T = torch.Tensor._make_wrapper_subclass(kind, shape, dtype=like.dtype, device=like.device)
    return made


def all_gather(sent: Tensor, count: int, group_name: str) -> Tensor:
    """Return what each of the `count` members of a group sent, one after the other along dim 0."""
    functional = torch.ops._c10d_functional
    received: Tensor = functional.wait_tensor(functional.all_gather_into_tensor(sent, count, group_name))
    return received


def exchange(sent: Tensor, count: int, group_name: str) -> Tensor:
    """Return `[count, n]`: the row that each member of a group has for this one, of the rows `[count, n]` it sent."""
    functional, n = torch.ops._c10d_functional, sent.numel() // count
    sizes = [n] * count
    received: Tensor = functional.wait_tensor(functional.all_to_all_single(sent.reshape(-1), sizes, sizes, group_name))
    return received.view(count, n)
