"""Private names of torch that optimizers need: arithmetic over lists of tensors, and fused steps.

Seen to work on torch 2.11.0, 2.13.0 and 2.14.1. Torch documents the unary `torch._foreach_*` functions under these
names; the others are the functions of its own optimizers, with the signatures of the operators. `foreach` and `fused`
call them.

    foreach                 `torch._foreach_<name>` and its in-place form. Without one: the loop over tensors that
                            `foreach` also uses for tensors that the kernel refuses; the bits are the same.
    foreach_add ... foreach_norm
                            functions with other arguments than lists.
    fused_sgd, fused_adamw  one kernel for the whole step. Without them: `fused=True` is refused, as on devices without
                            such a kernel.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

foreach_add, foreach_add_ = torch._foreach_add, torch._foreach_add_
foreach_lerp, foreach_lerp_ = torch._foreach_lerp, torch._foreach_lerp_
foreach_addcmul, foreach_addcmul_ = torch._foreach_addcmul, torch._foreach_addcmul_
foreach_addcdiv, foreach_addcdiv_ = torch._foreach_addcdiv, torch._foreach_addcdiv_
foreach_copy_, foreach_norm = torch._foreach_copy_, torch._foreach_norm
fused_sgd, fused_adamw = torch._fused_sgd_, torch._fused_adamw_


def foreach(name: str) -> tuple[Callable[..., tuple[Tensor, ...]], Callable[..., Any]]:
    """Return a function over lists of tensors, and its in-place form, which overwrites the first list."""
    return getattr(torch, f"_foreach_{name}"), getattr(torch, f"_foreach_{name}_")
