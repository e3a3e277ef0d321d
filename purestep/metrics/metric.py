"""The metrics: monoids of one number, and `mean`, which makes the most common one.

A metric is a pytree of sums, never a mean of means, so merging batches of different sizes in order is exact up to
rounding.
"""

from __future__ import annotations

import abc
import math
from collections.abc import Callable, Sequence
from typing import Any, Protocol, Self, runtime_checkable

import torch
from torch import Tensor

from purestep import transforms
from purestep.arguments import checked
from purestep.errors import MetricError, explain
from purestep.tree import describe, pytree
from purestep.views import Block, Note, Printed

_WIDE = frozenset((torch.float32, torch.float64, torch.complex64, torch.complex128))
Number = Any  # a 0-d tensor in a step, a Python number after the loop has read it; arithmetic is the same for both


@runtime_checkable
class Metric(Protocol):
    """A metric: a pytree whose values of several batches merge, associatively, into the value of all of them.

    Define one with `@ps.pytree`; its leaves are tensors of a fixed shape. `compute` returns a number, or a dict of
    numbers.

    Examples:
        >>> @pytree
        ... class AnyTrue:
        ...     value: Tensor  # bool []
        ...     def merge(self, other):
        ...         return AnyTrue(self.value | other.value)
        ...     def compute(self):
        ...         return self.value
        >>> isinstance(AnyTrue(torch.tensor(True)), Metric)
        True
    """

    def merge(self, other: Self) -> Self: ...

    def compute(self) -> Any: ...


class Growing(abc.ABC):
    """Base of a metric that may keep something of every sample, so that its tensors differ in size between batches.

    Ranks exchange such a metric with the sizes, and the loop merges many batches of it at once.
    """

    @property
    @abc.abstractmethod
    def grows(self) -> bool:
        """Whether this one does."""

    @abc.abstractmethod
    def merge_all(self, others: Sequence[Any]) -> Any:
        """Return what merging with one after the other gives, bit for bit."""


class Computed(Printed):
    """Internal: base of metrics that compute to one number: they print, and convert to `float`, as that number."""

    def compute(self) -> Number:
        raise MetricError(explain(f"{type(self).__name__} computes nothing", instead="override `compute(self)`"))

    def __float__(self) -> float:
        return float(self.compute())

    def __format__(self, spec: str) -> str:
        return format(float(self), spec)

    def __repr__(self) -> str:
        return f"{type(self).__name__}({written(self.compute())})"

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        return [Note(repr(self))]


def written(number: Number) -> str:
    """Return a number that is read from the device for it; of a meta, fake or traced tensor what it is."""
    try:
        return f"{float(number):.6g}"
    except (RuntimeError, TypeError, ValueError):
        return describe(number)


class _Scalar(Computed):
    """Base of the metrics that are one number."""

    value: Number

    def compute(self) -> Number:
        return self.value


@pytree
class Mean(_Scalar):
    """A weighted mean: `total / weight`.

    Attributes:
        total: sum of value times weight, at least float32.
        weight: sum of weights.

    Examples:
        >>> a, b = mean(torch.tensor(1.0), weight=3), mean(torch.tensor(5.0), weight=1)
        >>> a.merge(b)
        Mean(2, weight=4)
    """

    total: Number
    weight: Number

    def __repr__(self) -> str:
        return f"Mean({written(self.compute())}, weight={written(self.weight)})"

    def merge(self, other: Mean) -> Mean:
        return Mean(self.total + other.total, self.weight + other.weight)

    def compute(self) -> Number:
        # Python raises where a tensor gives NaN: for a mean over no samples.
        if isinstance(self.weight, (int, float)):
            return self.total / self.weight if self.weight else math.nan
        return self.total / self.weight


@pytree
class Sum(_Scalar):
    """A sum, for example of tokens.

    Examples:
        >>> Sum(2).merge(Sum(3)).compute()
        5
    """

    value: Number

    def merge(self, other: Sum) -> Sum:
        return Sum(self.value + other.value)


@pytree
class Min(_Scalar):
    """The smallest value seen; a NaN stays.

    Examples:
        >>> Min(2.0).merge(Min(3.0)).compute()
        2.0
    """

    value: Number

    def merge(self, other: Min) -> Min:
        return Min(extreme(self.value, other.value, torch.minimum, min))


@pytree
class Max(_Scalar):
    """The largest value seen; a NaN stays.

    Examples:
        >>> Max(2.0).merge(Max(3.0)).compute()
        3.0
    """

    value: Number

    def merge(self, other: Max) -> Max:
        return Max(extreme(self.value, other.value, torch.maximum, max))


def extreme(
    a: Number, b: Number, of_tensors: Callable[[Tensor, Tensor], Tensor], of_numbers: Callable[[float, float], float]
) -> Number:
    """Return the smaller or larger of two numbers, or tensors of one shape; a NaN stays."""
    if isinstance(a, Tensor):
        return of_tensors(a, b)
    # Python's min and max drop a NaN or keep it depending on the order; torch's always keep it.
    return math.nan if a != a or b != b else of_numbers(a, b)


@pytree
class Last(_Scalar):
    """The value of the last batch, for example a learning rate.

    Examples:
        >>> Last(2.0).merge(Last(3.0)).compute()
        3.0
    """

    value: Number

    def merge(self, other: Last) -> Last:
        return other


@checked(MetricError, failed=True)
def mean(value: Tensor | float, weight: Tensor | float | None = None) -> Mean:
    """Make a `Mean`.

    Args:
        value: a mean over `weight` samples, 0-d; or one value a sample, of any shape.
        weight: the number of samples or tokens, by default the number of elements of `value`. For a value with dims, a
            tensor of the same shape (a mask, say) is the weight of each element. A NaN of weight 0 is ignored.

    Returns:
        `Mean`, with 0-d sums of at least float32, on the device of `value`, detached.

    Examples:
        >>> float(mean(torch.tensor([1.0, 2.0, 6.0])))
        3.0
        >>> float(mean(torch.tensor([1.0, 2.0, 6.0]), weight=torch.tensor([1, 1, 0])))
        1.5
    """
    return made_mean(value, weight)


def made_mean(value: Any, weight: Any) -> Mean:
    """Do what `mean` does, for arguments that are known to be right."""
    value = transforms.detached(value) if isinstance(value, Tensor) else torch.tensor(float(value))
    if value.dtype not in _WIDE:
        value = value.to(torch.promote_types(value.dtype, torch.float32))
    if isinstance(weight, Tensor):
        number = None
        weight = transforms.detached(weight).to(value.device, value.dtype)
    else:
        number = 1.0 if weight is None else weight
        # Filled on the device: a copy of a number from the host would synchronize with it.
        weight = torch.full((), number, dtype=value.dtype, device=value.device)
    total = value * weight
    if not number:
        # A value of weight 0 may be NaN (a mean over padding only), and NaN * 0 is NaN.
        total = torch.where(weight == 0, 0.0, total)
    return Mean(total, weight) if value.ndim == 0 else Mean(total.sum(), weight.expand_as(value).sum())
