"""Metrics of regression: errors, and the moments that `r2` and `pearson` follow from.

Moments merge by the formula of Chan, Golub and LeVeque (1979): deviations from a mean, not differences of large sums.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from purestep import transforms, tree
from purestep.arguments import checked
from purestep.errors import MetricError, explain
from purestep.metrics.metric import Computed, Mean, Number, mean
from purestep.tree import pytree


@pytree
class RootMean(Computed):
    """The square root of a weighted mean. Made by `rmse`.

    Attributes:
        total, weight: as of `Mean`.
    """

    total: Number
    weight: Number

    def merge(self, other: RootMean) -> RootMean:
        return RootMean(self.total + other.total, self.weight + other.weight)

    def compute(self) -> Number:
        value = Mean(self.total, self.weight).compute()
        return value.sqrt() if isinstance(value, Tensor) else math.sqrt(value)


@pytree
class Moments:
    """First and second moments of pairs of numbers.

    Attributes:
        count: number of pairs.
        mean_x, mean_y: means.
        xx, yy, xy: sums of products of deviations from the means.
    """

    count: Number
    mean_x: Number
    mean_y: Number
    xx: Number
    yy: Number
    xy: Number

    def merge(self, other: Moments) -> Moments:
        count = self.count + other.count
        # No pairs in both: the share is 0 / 1, not NaN.
        share = other.count / (count + (count == 0))
        x, y = other.mean_x - self.mean_x, other.mean_y - self.mean_y
        both = self.count * share
        return Moments(
            count,
            self.mean_x + x * share,
            self.mean_y + y * share,
            self.xx + other.xx + x * x * both,
            self.yy + other.yy + y * y * both,
            self.xy + other.xy + x * y * both,
        )


@pytree
class R2(Computed):
    """The coefficient of determination. Made by `r2`.

    Attributes:
        moments: of predictions (x) and targets (y).
        residual: sum of squared errors.
    """

    moments: Moments
    residual: Number

    def merge(self, other: R2) -> R2:
        return R2(self.moments.merge(other.moments), self.residual + other.residual)

    def compute(self) -> Tensor:
        return 1 - torch.as_tensor(self.residual, dtype=torch.float64) / self.moments.yy


@pytree
class Pearson(Computed):
    """The correlation of predictions and targets. Made by `pearson`.

    Attributes:
        moments: of predictions (x) and targets (y).
    """

    moments: Moments

    def merge(self, other: Pearson) -> Pearson:
        return Pearson(self.moments.merge(other.moments))

    def compute(self) -> Tensor:
        xx, yy, xy = (
            torch.as_tensor(v, dtype=torch.float64) for v in (self.moments.xx, self.moments.yy, self.moments.xy)
        )
        return (xy / (xx.sqrt() * yy.sqrt())).clamp(-1, 1)


@checked(MetricError, failed=True)
def mse(preds: Tensor, target: Tensor) -> Mean:
    """Mean squared error, over all elements.

    Args:
        preds, target: numbers of one shape.

    Raises:
        MetricError: the shapes differ.

    Examples:
        >>> float(mse(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])))
        2.0
    """
    x, y = _pair("mse", preds, target)
    return mean((x - y).square())


@checked(MetricError, failed=True)
def mae(preds: Tensor, target: Tensor) -> Mean:
    """Mean absolute error, over all elements. Arguments and errors as of `mse`.

    Examples:
        >>> float(mae(torch.tensor([1.0, 2.0]), torch.tensor([1.0, 4.0])))
        1.0
    """
    x, y = _pair("mae", preds, target)
    return mean((x - y).abs())


@checked(MetricError, failed=True)
def rmse(preds: Tensor, target: Tensor) -> RootMean:
    """Root mean squared error, over all elements of all batches. Arguments and errors as of `mse`.

    Examples:
        >>> float(rmse(torch.tensor([1.0]), torch.tensor([1.0])).merge(rmse(torch.tensor([2.0]), torch.tensor([4.0]))))
        1.4142135381698608
    """
    squares = mse(preds, target)
    return RootMean(squares.total, squares.weight)


@checked(MetricError, failed=True)
def r2(preds: Tensor, target: Tensor) -> R2:
    """The coefficient of determination over all samples: 1 - sum of squared errors / sum of squares around the mean.

    Args:
        preds, target: numbers of one shape; each element counts as a sample.

    Raises:
        MetricError: the shapes differ.

    Examples:
        >>> round(float(r2(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([1.0, 2.0, 4.0]))), 4)
        0.7857

    Reference: `sklearn.metrics.r2_score`.
    """
    x, y = _pair("r2", preds, target)
    return R2(_moments(x, y), (x - y).square().sum())


@checked(MetricError, failed=True)
def pearson(preds: Tensor, target: Tensor) -> Pearson:
    """The correlation of predictions and targets over all samples. Arguments and errors as of `r2`.

    Examples:
        >>> round(float(pearson(torch.tensor([1.0, 2.0, 3.0]), torch.tensor([2.0, 4.0, 6.0]))), 4)
        1.0

    Reference: `scipy.stats.pearsonr`.
    """
    return Pearson(_moments(*_pair("pearson", preds, target)))


def _pair(name: str, preds: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    if preds.shape != target.shape:
        raise MetricError(
            explain(
                f"{name} compares numbers of one shape",
                where=f"preds: {tree.describe(preds)}, target: {tree.describe(target)}",
                why="broadcasting would compare every number with every other one",
                instead="preds.squeeze(-1), or target.unsqueeze(-1)",
            )
        )
    dtype = torch.promote_types(torch.promote_types(preds.dtype, target.dtype), torch.float32)
    return transforms.detached(preds).to(dtype), transforms.detached(target).to(dtype)


def _moments(x: Tensor, y: Tensor) -> Moments:
    # Not `mean()`: of no numbers it is NaN.
    count = torch.full((), x.numel(), dtype=x.dtype, device=x.device)
    some = max(x.numel(), 1)
    mean_x, mean_y = x.sum() / some, y.sum() / some
    dx, dy = x - mean_x, y - mean_y
    return Moments(count, mean_x, mean_y, dx.square().sum(), dy.square().sum(), (dx * dy).sum())
