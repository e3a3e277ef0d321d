"""Private names of torch that split tensors need. Seen to work on torch 2.11.0, 2.13.0 and 2.14.1.

wrapper                 a tensor with a shape and no memory, of a class with `__torch_function__`. Torch documents
                        it in "Extending PyTorch" under this name. Without it: `Tensor._make_subclass` of an
                        expanded scalar.
no_subclass             a context in which `__torch_function__` is not asked: published as
                        `torch.overrides` functions in part.
all_gather, exchange, pass_on, arrived
                        collectives that may stand in a traced graph. Without them: those of
                        `torch.distributed.nn.functional`, which copy.
FakeTensorMode          tensors of shapes without memory, for what a rank of a pipeline does not compute. There is no
                        public name; `torch.export` uses it. Without it: tensors on the meta device, which do not mix
                        with those of a batch.
_schema                 which arguments an operator writes into. Without it: the names that end in an underscore.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import DataDependentOutputException, DynamicOutputShapeException
from torch._subclasses.fake_tensor import FakeTensor as FakeTensor
from torch._subclasses.fake_tensor import FakeTensorMode as FakeTensorMode

T = TypeVar("T", bound=Tensor)
# What an operation raises whose result depends on the values of a fake tensor.
ValueOfAnotherStage = DataDependentOutputException, DynamicOutputShapeException
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


def pass_on(sent: Tensor, count: int, rank: int, group_name: str) -> Tensor:
    """Begin to send a flat tensor to the next member of a group; `arrived` waits for that of the one before."""
    to, source = [0] * count, [0] * count
    to[(rank + 1) % count] = source[(rank - 1) % count] = sent.numel()
    begun: Tensor = torch.ops._c10d_functional.all_to_all_single(sent, source, to, group_name)
    return begun


def arrived(begun: Tensor) -> Tensor:
    """Return what a collective that was begun receives, once it is here."""
    received: Tensor = torch.ops._c10d_functional.wait_tensor(begun)
    return received


def written_by(func: Any, args: Sequence[Any]) -> list[Tensor]:
    """Return the tensors that an operator of aten writes into, of its positional arguments."""
    if not func._schema.is_mutable:
        return []
    pairs = zip(args, func._schema.arguments, strict=False)
    found = [x for x, argument in pairs if argument.alias_info is not None and argument.alias_info.is_write]
    return [x for x in found if isinstance(x, Tensor)]
