"""Batch norm over several ranks: the statistics of all microbatches that are computed at the same time, put together.

`Synced` is a mode around the model of one microbatch; it answers calls of `batch_norm` in training and nothing else.
Its gradient is that of the mean over the whole batch, also where microbatches differ in what they weigh.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.functional import batch_norm
from torch.overrides import TorchFunctionMode

from purestep import _torch
from purestep.distributed import collectives
from purestep.microbatch import Context
from purestep.parallel.assignment import Shares

_SIGNATURE = inspect.signature(batch_norm)


def synced(
    shares: Shares, counts: bool, factor: Callable[[], float | Tensor], around: Context | None
) -> Context | None:
    """Return what makes the context that a model runs in: with batch norm over ranks, where the plan says so.

    Args:
        shares: who computes which microbatches.
        counts: whether that of this rank is one of the batch, and no stand-in.
        factor: returns what the gradient of it is multiplied by later.
        around: makes the context that it runs in otherwise, or None.
    """
    group = shares.group
    if not shares.plan.sync_batchnorm or group is None:
        return around

    @contextlib.contextmanager
    def entered() -> Iterator[None]:
        outer = contextlib.nullcontext() if around is None else around()
        with outer, Synced(group, counts, factor):
            yield

    return entered


class Synced(TorchFunctionMode):
    """Normalise by the statistics of all ranks that compute a microbatch now; every one of them runs the same model.

    Args:
        group: those ranks.
        counts: whether the microbatch of this rank is one of the batch, and no stand-in.
        weigh: returns what the gradient of this microbatch is multiplied by later; asked in the backward pass.
    """

    def __init__(self, group: dist.ProcessGroup, counts: bool, weigh: Callable[[], float | Tensor]) -> None:
        super().__init__()
        self.group, self.counts, self.weigh = group, counts, weigh

    def __torch_function__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is batch_norm:
            call = _SIGNATURE.bind(*args, **(kwargs or {}))
            call.apply_defaults()
            if call.arguments["training"]:
                return self._normalized(**call.arguments)
        return func(*args, **(kwargs or {}))

    def _normalized(
        self,
        input: Tensor,
        running_mean: Tensor | None,
        running_var: Tensor | None,
        weight: Tensor | None,
        bias: Tensor | None,
        training: bool,
        momentum: float,
        eps: float,
    ) -> Tensor:
        out, mean, var, count = _BatchNorm.apply(input, weight, bias, self, eps)
        with torch.no_grad():
            if running_mean is not None:
                running_mean.lerp_(mean.to(running_mean.dtype), momentum)
            if running_var is not None:
                unbiased = var * count / (count - 1).clamp(min=1)
                running_var.lerp_(unbiased.to(running_var.dtype), momentum)
        return out

    def shared(self, values: Tensor) -> Tensor:
        """Return `[R, n]`: what each rank gives, zeros from those whose microbatch does not count."""
        given = values if self.counts else torch.zeros_like(values)
        return collectives.gather(given.contiguous(), self.group).wait()


class _BatchNorm(torch.autograd.Function):
    """Batch norm by mean and variance over all ranks. Returns the output, mean, variance (biased) and count."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor | None, bias: Tensor | None, synced: Synced, eps: float
    ) -> tuple[Tensor, ...]:
        wide = x.to(torch.promote_types(x.dtype, torch.float32))
        dims = [0, *range(2, x.ndim)]
        channels = x.shape[1]
        own = wide.mean(dims)
        square = (wide - _per_channel(own, x)).square().sum(dims)
        rows = synced.shared(torch.cat([own.new_full((1,), wide.numel() // channels), own, square]))
        counts, means, squares = rows.split([1, channels, channels], dim=1)
        count = counts.sum()
        mean = (counts * means).sum(0) / count
        var = (squares + counts * (means - mean).square()).sum(0) / count
        scale = torch.rsqrt(var + eps)
        hat = (wide - _per_channel(mean, x)) * _per_channel(scale, x)
        out = hat if weight is None else hat * _per_channel(weight, x)
        out = (out if bias is None else out + _per_channel(bias, x)).to(x.dtype)
        ctx.save_for_backward(hat, weight, scale, count)
        ctx.synced, ctx.dims, ctx.dtypes = synced, dims, (x.dtype, getattr(bias, "dtype", None))
        ctx.mark_non_differentiable(mean, var, count)
        return out, mean, var, count

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        hat, weight, scale, count = ctx.saved_tensors
        grad, synced = grads[0].to(hat.dtype), ctx.synced
        with _torch.no_torch_function():
            sums = torch.cat([grad.sum(ctx.dims), (grad * hat).sum(ctx.dims)])
            # Losses of microbatches are weighted after their backward pass, so what comes from others is here.
            factor = synced.weigh() if synced.counts else 1.0
            mean, slope = (synced.shared(sums * factor).sum(0) / factor / count).chunk(2)
            inner = grad - _per_channel(mean, hat) - hat * _per_channel(slope, hat)
            inner = inner * _per_channel(scale if weight is None else scale * weight, hat)
            own_bias, own_weight = sums.chunk(2)
        return (
            inner.to(ctx.dtypes[0]),
            None if weight is None else own_weight.to(weight.dtype),
            None if ctx.dtypes[1] is None else own_bias.to(ctx.dtypes[1]),
            None,
            None,
        )


def _per_channel(values: Tensor, like: Tensor) -> Tensor:
    return values.view(1, -1, *[1] * (like.ndim - 2))
