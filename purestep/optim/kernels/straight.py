"""The arithmetic of Adam over lists that were looked at once, operation for operation that of `Adam` in `optimizers`.

The functions of `foreach` look at their lists in each of a dozen operations, which takes a small update longer than the
arithmetic. Here nothing is looked at: no transform, trace or autograd may be active, and all tensors are float32.
"""

from __future__ import annotations

import operator

from torch import Tensor

from purestep.optim import _torch as kernels
from purestep.optim.kernels import foreach as fx

_dtype_of = operator.attrgetter("dtype")
_mul, _mul_ = kernels.foreach("mul")
_div, _div_ = kernels.foreach("div")


def straight_adam(
    gs: list[Tensor],
    mu: list[Tensor],
    nu: list[Tensor],
    *,
    b1: float,
    b2: float,
    eps: float,
    scale: Tensor,
    factor: float,
    reuse: bool,
) -> tuple[list[Tensor], list[Tensor], list[Tensor]]:
    """Return the updates and the new moments.

    Args:
        gs, mu, nu: gradients and moments, float32.
        b1, b2, eps: as of `adam`.
        scale: float32[], the root of the correction of the second moment.
        factor: the learning rate, with its sign, over the correction of the first moment.
        reuse: whether the moments are written over.
    """
    decay, epsilon, move = fx.operands((b2, eps, factor), gs)
    if reuse:
        kernels.foreach_lerp_(mu, gs, 1 - b1)
        _mul_(nu, decay)
    else:
        mu, nu = list(kernels.foreach_lerp(mu, gs, 1 - b1)), list(_mul(nu, decay))
    kernels.foreach_addcmul_(nu, gs, gs, 1 - b2)
    denom = fx.sqrt(nu, between="adam root" if reuse else None)
    us = fx.mul(mu, factor, between="adam move") if reuse else list(_mul(mu, move))
    _div_(denom, scale)
    kernels.foreach_add_(denom, epsilon)
    _div_(us, denom)
    return us, mu, nu


def added(ps: list[Tensor], us: list[Tensor], *, reuse: bool) -> list[Tensor]:
    """Return parameters after updates, which nothing else reads, in the dtypes of the parameters.

    The sum takes the memory of the updates where it can, because that is in the cache: two numbers have one sum,
    whichever comes first.

    Args:
        ps, us: parameters and updates.
        reuse: whether the parameters are written over.
    """
    if list(map(_dtype_of, us)) != list(map(_dtype_of, ps)):
        return fx.cast(fx.add(ps, us), ps)
    if not reuse and fx.plain(us, ps) and all(map(Tensor.is_contiguous, (*us, *ps))):
        return fx.add(us, ps, reuse=True)
    return fx.add(ps, us, reuse=reuse)
