"""torch's fused optimizer kernels: the update of parameters and moments in one pass over the memory.

Used by sgd, adam, adamw and amsgrad with `fused=True`, in plain eager mode only. The kernels write into all their lists
except the gradients, so parameters and moments must be copies, or donated. To compute an update alone, the kernels run
on parameters of zeros.
"""

from __future__ import annotations

import itertools

import torch
from torch import Tensor

from purestep.optim import _torch
from purestep.optim.kernels import foreach as fx

_is_contiguous = Tensor.is_contiguous


def _groups(xs: list[Tensor], numbers: list[float] | None = None) -> list[list[int]]:
    """Group the positions of tensors by device, dtype and a number of each, because a fused kernel takes one group."""
    groups: dict[tuple[torch.device, torch.dtype, float], list[int]] = {}
    for i, x in enumerate(xs):
        groups.setdefault((x.device, x.dtype, numbers[i] if numbers else 0.0), []).append(i)
    return list(groups.values())


def fitted(grads: list[Tensor], *lists: list[Tensor]) -> list[Tensor] | None:
    """Return gradients in the memory layout of the parameters and moments; None if no kernel takes those.

    The kernels index the memory of all tensors in the same order, without checks. Gradients have the layout of the
    backward pass, which for a convolution may be channels-last.

    Args:
        grads: gradients.
        *lists: parameters and moments, which a kernel writes into: dense, and at each position of one dtype and layout.
    """
    if all(map(_is_contiguous, itertools.chain(grads, *lists))) and len(fx.dtypes(grads, *lists)) == 1:
        return grads
    result = []
    for g, *xs in zip(grads, *lists, strict=True):
        layout = _layout(xs[0] if xs else g)
        if layout is None or any(x.dtype != g.dtype or _layout(x) is not layout for x in xs):
            return None
        result.append(g if _layout(g) is layout else g.contiguous(memory_format=layout))
    return result


def _layout(x: Tensor) -> torch.memory_format | None:
    if x.is_contiguous():
        return torch.contiguous_format
    of_images = {4: torch.channels_last, 5: torch.channels_last_3d}.get(x.dim())
    return of_images if of_images is not None and x.is_contiguous(memory_format=of_images) else None


def fused_sgd(
    params: list[Tensor],
    grads: list[Tensor],
    trace: list[Tensor] | None,
    *,
    rate: float | Tensor,
    momentum: float = 0.0,
    nesterov: bool = False,
) -> None:
    """Take a step of momentum SGD; `params` and `trace` are overwritten."""
    for at in _groups(grads):
        _torch.fused_sgd(
            [params[i] for i in at],
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


def fused_adam(
    params: list[Tensor],
    grads: list[Tensor],
    mu: list[Tensor],
    nu: list[Tensor],
    nu_max: list[Tensor] | None,
    count: Tensor,
    decays: list[float],
    *,
    rate: float | Tensor,
    b1: float,
    b2: float,
    eps: float,
) -> None:
    """Take the `count`-th step of Adam, each parameter with its decoupled decay; all but `grads` are overwritten."""
    groups = _groups(grads, decays)
    for at in groups:
        steps = count.to(grads[at[0]].device, torch.float32)
        lists = params, grads, mu, nu, [] if nu_max is None else nu_max
        if len(groups) > 1:
            lists = tuple([xs[i] for i in at] if xs else [] for xs in lists)  # type: ignore[assignment]
        _torch.fused_adamw(
            *lists,
            [steps] * len(at),
            lr=rate,
            beta1=b1,
            beta2=b2,
            weight_decay=decays[at[0]],
            eps=eps,
            amsgrad=nu_max is not None,
            maximize=False,
        )
