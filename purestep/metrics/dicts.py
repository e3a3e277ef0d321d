"""Dicts of metrics: made from the result of a loss function, merged over batches, computed to a row of the log.

Steps call `as_metrics`, the loop the others. Only `compute` reads values, which synchronizes with the device.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from torch import Tensor

from purestep import transforms, tree
from purestep.arguments import checked
from purestep.errors import MetricError, explain
from purestep.metrics.converted import refuse_unconverted
from purestep.metrics.metric import Metric, Number, mean


def sample_count(batch: Any) -> int:
    """Return the number of samples of a batch: the size of dim 0 of its first leaf that has dims.

    A batch without leaves (None, for a loss that draws its own data) counts as one sample.

    Raises:
        MetricError: there are leaves, but none has dims.

    Examples:
        >>> import torch
        >>> sample_count({"image": torch.zeros(32, 8, 8), "label": torch.zeros(32)})
        32
    """
    leaves = tree.leaves(batch)
    for leaf in leaves:
        if getattr(leaf, "ndim", 0) > 0:
            return int(leaf.shape[0])
    if not leaves:
        return 1
    raise MetricError(
        explain(
            "the batch has no tensor with dims, so its number of samples is unknown",
            where=described(batch),
            instead="let the first dim of the tensors in a batch be the samples",
        )
    )


def leaf_lines(value: object, root: str) -> list[str]:
    """Return path, dtype and shape of each leaf of a tree, as errors show them.

    Examples:
        >>> import torch
        >>> leaf_lines({"x": torch.zeros(2, 3), "name": "a"}, "batch")
        ["batch['name']: str 'a'", "batch['x']: float32[2, 3]"]
    """
    leaves = zip(tree.paths(value, root), tree.leaves(value), strict=True)
    return [f"{path}: {tree.describe(leaf)}" for path, leaf in leaves]


def described(batch: object) -> str:
    """Return path, dtype and shape of the first five leaves of a batch, for an error about it."""
    return ", ".join(leaf_lines(batch, "batch")[:5])


@checked(MetricError, failed=True)
def as_metrics(values: Any, samples: int) -> dict[str, Metric]:
    """Convert the dict that a step or loss function returns to metrics: a number is a mean over the batch.

    Args:
        values: dict of str to a metric, a 0-d tensor, a number, or a tensor of one value a sample.
        samples: number of samples of the batch, the weight of plain numbers.

    Returns:
        The same keys with metrics, detached.

    Raises:
        MetricError: a key is not a string, or a value cannot be a metric; the message names the key.

    Examples:
        >>> import torch
        >>> from purestep.metrics import Sum
        >>> m = as_metrics({"loss": torch.tensor(2.0), "tokens": Sum(torch.tensor(7))}, samples=4)
        >>> float(m["loss"].total), float(m["tokens"])
        (8.0, 7.0)
    """
    if type(values) is not dict and not isinstance(values, Mapping):
        raise MetricError(
            explain(
                f"metrics are a dict of names to values, not {tree.describe(values)}",
                instead='return loss, {"accuracy": ps.metrics.accuracy(logits, labels)}',
            )
        )
    return {_name(key): _metric(key, value, samples) for key, value in values.items()}


def _name(key: object) -> str:
    if not isinstance(key, str) or not key:
        raise MetricError(
            explain(
                "the name of a metric is a string",
                where=f"metrics key {key!r} of type {type(key).__name__}",
                why="it becomes a column of the log, as train/<name>",
                instead=f"{{'{key}': value}}" if key != "" else "{'accuracy': value}",
            )
        )
    return key


def _metric(key: str, value: Any, samples: int) -> Metric:
    # The usual value is a tensor, and isinstance of a protocol takes longer than the mean of it.
    if not isinstance(value, Tensor) and isinstance(value, Metric):
        return tree.map(lambda x: transforms.detached(x) if isinstance(x, Tensor) else x, value)
    if isinstance(value, Tensor) and value.ndim > 0 and value.shape[0] != samples:
        raise MetricError(
            explain(
                f"metric {key!r} is neither one number nor one value a sample",
                where=f"metrics[{key!r}]: {tree.describe(value)}, samples in the batch: {samples}",
                instead=f"reduce it: {{{key!r}: value.mean()}}, or say how it merges: ps.metrics.Sum(value.sum())",
            )
        )
    refuse_unconverted(key, value)
    if isinstance(value, (Tensor, int, float)):
        return mean(value, samples if not isinstance(value, Tensor) or value.ndim == 0 else None)
    raise MetricError(
        explain(
            f"metric {key!r} has no value that can be merged over batches",
            where=f"metrics[{key!r}]: {type(value).__name__}",
            instead="a 0-d tensor, a number, or one of ps.metrics.Mean, Sum, Min, Max, Last",
        )
    )


def are_plain(values: object) -> bool:
    """Tell whether a dict of metrics has plain numbers, which need the number of samples to become metrics.

    Examples:
        >>> are_plain({"loss": 0.5}), are_plain({"loss": mean(0.5)})
        (True, False)
    """
    return not isinstance(values, Mapping) or any(not hasattr(value, "merge") for value in values.values())


@checked(MetricError, failed=True)
def merge(a: Mapping[str, Metric], b: Mapping[str, Metric]) -> dict[str, Metric]:
    """Merge two dicts of metrics of the same names.

    Raises:
        MetricError: a name is in one of them only.

    Examples:
        >>> float(merge({"loss": mean(1.0)}, {"loss": mean(3.0)})["loss"])
        2.0
    """
    if a.keys() != b.keys():
        new, gone = sorted(b.keys() - a.keys()), sorted(a.keys() - b.keys())
        raise MetricError(
            explain(
                "a step returned other metrics than the one before",
                where="; ".join(
                    f"{word}: {', '.join(keys)}" for word, keys in (("new", new), ("missing", gone)) if keys
                ),
                why="a mean over an epoch needs the metric of every batch",
                instead="return the same names every time, with weight 0 for a batch without a value",
            )
        )
    return {key: a[key].merge(b[key]) for key in a}


@checked(MetricError, failed=True)
def compute(metrics: Mapping[str, Metric], prefix: str = "") -> dict[str, float]:
    """Compute each metric to a float; one that computes to a dict becomes several entries, `name/key`.

    Args:
        metrics: by name.
        prefix: of the names in the row.

    Raises:
        MetricError: a metric computes to a tensor of several elements.

    Examples:
        >>> import torch
        >>> compute({"loss": mean(torch.tensor(2.0), 4)}, prefix="val/")
        {'val/loss': 2.0}
    """
    row: dict[str, float] = {}
    for name, metric in metrics.items():
        row |= {prefix + entry: float(number) for entry, number in entries(name, metric)}
    return row


def entries(name: str, metric: Metric) -> Iterator[tuple[str, Number]]:
    """Yield the names and numbers that a metric computes to; the numbers may be tensors of one element.

    Raises:
        MetricError: it computes to something else.

    Examples:
        >>> list(entries("loss", mean(2.0)))
        [('loss', tensor(2.))]
    """
    value = metric.compute()
    pairs: Iterable[tuple[str, Number]] = (
        ((f"{name}/{key}", v) for key, v in value.items()) if isinstance(value, Mapping) else ((name, value),)
    )
    for entry, number in pairs:
        if isinstance(number, Tensor) and number.numel() != 1:
            raise MetricError(
                explain(
                    f"metric {name!r} computes to more than one number",
                    where=tree.describe(number),
                    instead="let compute() return a number, or a dict of numbers",
                )
            )
        yield entry, number
