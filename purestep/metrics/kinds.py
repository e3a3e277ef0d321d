"""The metrics themselves: monoids of one number, and `mean`, which makes the most common one.

A metric is a pytree of sums, never a mean of means, so merging batches of different sizes in order is exact to
rounding.
"""

from __future__ import annotations

import math
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from purestep import transforms
from purestep.arguments import checked
from purestep.errors import MetricError
from purestep.tree import pytree

_WIDE = frozenset((torch.float32, torch.float64, torch.complex64, torch.complex128))
Number = Any  # a 0-d tensor while on a device, a Python number once read by the loop


@runtime_checkable
class Metric(Protocol):
    """What a metric is: a pytree whose values of several batches merge, associatively, into that of all of them.

    Define one with `@ps.pytree`; its leaves are tensors of a fixed shape. `compute` returns a number, or a dict of
    numbers.
    """

    def merge(self, other: Self) -> Self: ...

    def compute(self) -> Any: ...


class _Scalar:
    """What metrics of one number share: they print, and convert to `float`, as the number they stand for."""

    def compute(self) -> Any:
        return self.value  # type: ignore[attr-defined]

    def __float__(self) -> float:
        return float(self.compute())

    def __format__(self, spec: str) -> str:
        return format(float(self), spec)


@pytree
class Mean(_Scalar):
    """A weighted mean: `total / weight`.

    Attributes:
        total: sum of value times weight, at least float32.
        weight: sum of weights.

    Example:
        >>> a, b = mean(torch.tensor(1.0), weight=3), mean(torch.tensor(5.0), weight=1)
        >>> float(a.merge(b))
        2.0
    """

    total: Number
    weight: Number

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def compute(self) -> Any:
        if isinstance(self.weight, (int, float)):
            return self.total / self.weight if self.weight else math.nan
        return self.total / self.weight


@pytree
class Sum(_Scalar):
    """A sum, for example of tokens.

    Example:
        >>> Sum(2).merge(Sum(3)).compute()
        5
    """

    value: Number

    def merge(self, other: Sum) -> Sum:
        return Sum(self.value + other.value)


@pytree
class Min(_Scalar):
    """The smallest value seen; a NaN stays.

    Example:
        >>> Min(2.0).merge(Min(3.0)).compute()
        2.0
    """

    value: Number

    def merge(self, other: Min) -> Min:
        return Min(_pick(self.value, other.value, torch.minimum, min))


@pytree
class Max(_Scalar):
    """The largest value seen; a NaN stays.

    Example:
        >>> Max(2.0).merge(Max(3.0)).compute()
        3.0
    """

    value: Number

    def merge(self, other: Max) -> Max:
        return Max(_pick(self.value, other.value, torch.maximum, max))


def _pick(a: Any, b: Any, tensors: Any, numbers: Any) -> Any:
    if isinstance(a, Tensor):
        return tensors(a, b)
    return math.nan if a != a or b != b else numbers(a, b)


@pytree
class Last(_Scalar):
    """The value of the last batch, for example a learning rate.

    Example:
        >>> Last(2.0).merge(Last(3.0)).compute()
        3.0
    """

    value: Number

    def merge(self, other: Last) -> Last:
        return other


@checked(MetricError, failed=True)
def mean(value: Tensor | float, weight: Tensor | float | None = None) -> Mean:
    """Make a Mean.

    Args:
        value: a mean over `weight` samples, 0-d; or one value a sample, of any shape.
        weight: how much it counts: samples, tokens. By default the number of elements of `value`. For a value with
            dims, a tensor of the same shape (a mask, say) weights each element. A NaN of weight 0 does not count.

    Returns:
        Mean, with sums of at least float32.

    Example:
        >>> float(mean(torch.tensor([1.0, 2.0, 6.0])))
        3.0
        >>> float(mean(torch.tensor([1.0, 2.0, 6.0]), weight=torch.tensor([1, 1, 0])))
        1.5
    """
    value = transforms.detached(value) if isinstance(value, Tensor) else torch.tensor(float(value))
    if value.dtype not in _WIDE:
        value = value.to(torch.promote_types(value.dtype, torch.float32))
    if isinstance(weight, Tensor):
        number = None
        weight = transforms.detached(weight).to(value.device, value.dtype)
    else:
        number = 1.0 if weight is None else weight
        # Filled on the device: copying a number there from the host would wait for it.
        weight = torch.full((), number, dtype=value.dtype, device=value.device)
    total = value * weight
    if not number:
        # What has weight 0 may be NaN (a mean over padding only); it must not count.
        total = torch.where(weight == 0, 0.0, total)
    return Mean(total, weight) if value.ndim == 0 else Mean(total.sum(), weight.expand_as(value).sum())
