"""torch's fused optimizer kernels as pure functions: they are given zeros for parameters, so what they write is the
update.

Used by sgd, adam and adamw with `fused=True`, in plain eager mode only. The lists of state that come in must be copies
made
by the caller: the kernels write into them.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def _groups(xs: list[Tensor]) -> list[list[int]]:
    """Positions of tensors by device and dtype: a fused kernel takes one kind at a time."""
    groups: dict[Any, list[int]] = {}
    for i, x in enumerate(xs):
        groups.setdefault((x.device, x.dtype), []).append(i)
    return list(groups.values())


def fused_sgd(
    grads: list[Tensor], trace: list[Tensor] | None, *, rate: Any, momentum: float = 0.0, nesterov: bool = False
) -> list[Tensor]:
    """Return the updates of momentum SGD; `trace` is overwritten with the new momentum."""
    updates = [torch.zeros_like(g) for g in grads]
    for at in _groups(grads):
        torch._fused_sgd_(
            [updates[i] for i in at],
            [grads[i] for i in at],
            [trace[i] for i in at] if trace is not None else [],
            weight_decay=0.0,
            momentum=momentum,
            lr=rate,
            dampening=0.0,
            nesterov=nesterov,
            maximize=False,
            is_first_step=False,
        )
    return updates


def fused_adam(
    grads: list[Tensor],
    mu: list[Tensor],
    nu: list[Tensor],
    nu_max: list[Tensor] | None,
    count: Tensor,
    *,
    rate: Any,
    b1: float,
    b2: float,
    eps: float,
) -> list[Tensor]:
    """Return the updates of Adam at its `count`-th step; `mu`, `nu` and `nu_max` are overwritten."""
    updates = [torch.zeros_like(g) for g in grads]
    for at in _groups(grads):
        steps = count.to(grads[at[0]].device, torch.float32)
        torch._fused_adam_(
            [updates[i] for i in at],
            [grads[i] for i in at],
            [mu[i] for i in at],
            [nu[i] for i in at],
            [nu_max[i] for i in at] if nu_max is not None else [],
            [steps] * len(at),
            lr=rate,
            beta1=b1,
            beta2=b2,
            weight_decay=0.0,
            eps=eps,
            amsgrad=nu_max is not None,
            maximize=False,
        )
    return updates
