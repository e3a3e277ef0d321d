"""What one operation on the tape of deferred init is, and what its name says about it.

`init_tape` records and replays them.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep import _torch, tree

Function = Callable[..., Any]
# Operations after which the former content of what they write does not matter.
FILLS = {"uniform_", "normal_", "zero_", "fill_", "random_", "exponential_", "copy_", "_no_grad_trunc_normal_"}
EMPTY = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Operations that take no value from a tensor but its shape, strides and dtype.
LIKE = {"zeros_like", "ones_like", "full_like", "empty_like", "new_zeros", "new_ones", "new_full", "new_empty"}
COPIES = {"clone", "_to_copy"}
NONE = -1


@dataclasses.dataclass(frozen=True)
class Ref:
    """A tensor on the tape: a window on a storage. Storages are numbered as they appear.

    One of the storage `NONE` stands for a tensor whose values are never read.
    """

    storage: int
    size: tuple[int, ...]
    stride: tuple[int, ...]
    offset: int
    dtype: torch.dtype


@dataclasses.dataclass(frozen=True)
class Op:
    """One operation: function and arguments (tensors as Refs), the storages it reads and writes, the tensors it makes.

    `fills` is a storage whose former content does not matter afterwards, if there is one.
    """

    function: Any
    args: tuple[Any, ...]
    kwargs: dict[str, Any]
    reads: frozenset[int]
    writes: frozenset[int]
    made: tuple[Ref, ...]
    fills: int | None
    is_random: bool


def shape_of(tensor: Tensor) -> Ref:
    """Return what stands for a tensor of which an operation takes shape, strides and dtype alone."""
    return Ref(NONE, tuple(tensor.shape), tensor.stride(), 0, tensor.dtype)


def name_of(function: Function) -> str:
    """Return the name of an operation, without that of its overload."""
    return str(function.__name__).split(".")[0]


def written_by(function: Function, args: Sequence[object], kwargs: Mapping[str, object]) -> list[Tensor]:
    """Return the tensors among the arguments of an operation that it writes into."""
    found: list[Tensor] = []
    for position, argument in enumerate(_torch.schema_of(function).arguments):
        if argument.alias_info is not None and argument.alias_info.is_write:
            value = args[position] if position < len(args) else kwargs.get(argument.name)
            found += [t for t in tree.leaves(value) if isinstance(t, Tensor)]
    return found
