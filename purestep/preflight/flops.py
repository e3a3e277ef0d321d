"""Floating-point operations of one call of an operator, by the formulas of torch's own counter.

Its `FlopCounterMode` is not used: it follows modules by global hooks, and knows no attention of a CPU.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor

from purestep import _torch


def flops_of(operator: Any, args: tuple[Any, ...], kwargs: Mapping[str, Any], out: Any) -> int:
    """Return the operations of a call: 2 for each multiplication with its addition, 0 for what has no formula.

    Args:
        operator: an overload of an operator of torch.
        args, kwargs: what it was called with.
        out: what it returned.

    Examples:
        >>> import torch
        >>> a, b = torch.ones(3, 4), torch.ones(4, 5)
        >>> flops_of(torch.ops.aten.mm.default, (a, b), {}, a @ b)
        120
    """
    formula = _formulas().get(operator.overloadpacket)
    return 0 if formula is None else int(formula(*args, **kwargs, out_val=out))


@functools.cache
def _formulas() -> Mapping[Any, Callable[..., Any]]:
    from torch.utils import flop_counter

    def forward(query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
        return int(flop_counter.sdpa_flop_count(query.shape, key.shape, value.shape))

    def backward(grad: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Any, **__: Any) -> int:
        return int(flop_counter.sdpa_backward_flop_count(grad.shape, query.shape, key.shape, value.shape))

    own: dict[Any, Callable[..., Any]] = {
        _torch.cpu_attention: forward,
        _torch.cpu_attention_backward: backward,
    }
    return {**flop_counter.flop_registry, **own}
