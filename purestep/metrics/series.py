"""The metrics of several steps, read from the device at once and folded in order.

`to_host` makes a `Series` of what a burst of steps returned; `fold` adds it to sums, one step after the other,
without making an object for each step where the metric is a plain sum. The loop calls both; the result never depends
on how steps are grouped into bursts.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from purestep import tree
from purestep.errors import MetricError, explain
from purestep.metrics.kinds import Mean, Metric, Sum
from purestep.metrics.record import merge

Columns = dict[str, Sequence[Any]]  # values of each field, a step each


class Series(Sequence[Mapping[str, Metric]]):
    """Metrics of several steps on the host: a sequence with one dict of metrics a step, stored by columns."""

    def __init__(self, kinds: Mapping[str, type], columns: Mapping[str, Columns], length: int) -> None:
        self.kinds = kinds
        self.columns = columns
        self._length = length

    def __len__(self) -> int:
        return self._length

    @overload
    def __getitem__(self, index: int) -> Mapping[str, Metric]: ...
    @overload
    def __getitem__(self, index: slice) -> Sequence[Mapping[str, Metric]]: ...
    def __getitem__(self, index: Any) -> Any:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return {name: self.metric(name, index) for name in self.kinds}

    def __iter__(self) -> Iterator[Mapping[str, Metric]]:
        return (self[i] for i in range(self._length))

    def metric(self, name: str, index: int) -> Any:
        """Return one metric of one step."""
        node: Any = object.__new__(self.kinds[name])
        node.__dict__.update({field: column[index] for field, column in self.columns[name].items()})
        return node


def to_host(steps: Sequence[Mapping[str, Metric]]) -> Series:
    """Read the metrics of several steps from the device, all 0-d tensors of a dtype in one transfer.

    0-d leaves become Python numbers (so that further sums are float64), others CPU tensors.

    Raises:
        MetricError: the steps differ in the names or types of their metrics.

    Example:
        >>> series = to_host([{"loss": Mean(torch.tensor(2.0), torch.tensor(4.0))} for _ in range(3)])
        >>> len(series), series[0]
        (3, {'loss': Mean(total=2.0, weight=4.0)})
    """
    if not steps:
        return Series({}, {}, 0)
    first = steps[0]
    kinds = {name: type(metric) for name, metric in first.items()}
    columns: dict[str, Columns] = {}
    for name, kind in kinds.items():
        try:
            rows = [step[name].__dict__ for step in steps]
        except KeyError:
            rows = []
        if not rows or any(type(step[name]) is not kind for step in steps):
            raise _changed(steps)
        columns[name] = {field: [row[field] for row in rows] for field in rows[0]}
    if any(len(step) != len(first) for step in steps):
        raise _changed(steps)
    _read(columns)
    return Series(kinds, columns, len(steps))


def _changed(steps: Sequence[Mapping[str, Metric]]) -> MetricError:
    for step in steps:
        if step.keys() != steps[0].keys():
            try:
                merge(steps[0], step)
            except MetricError as error:
                return error
    found = [f"{n}: {type(steps[0][n]).__name__} and {type(s[n]).__name__}" for s in steps for n in s]
    different = [text for text in found if len(set(text.split(": ")[1].split(" and "))) > 1]
    return MetricError(explain("a metric changed its type between two steps", where=different[0] if different else ""))


def _read(columns: Mapping[str, Columns]) -> None:
    """Replace the tensors in the columns by what they hold."""
    scalars: dict[Any, list[tuple[Columns, str]]] = {}
    for fields in columns.values():
        for field, values in fields.items():
            if all(isinstance(v, Tensor) and v.ndim == 0 for v in values):
                scalars.setdefault((values[0].dtype, values[0].device), []).append((fields, field))
            elif not all(isinstance(v, (int, float)) for v in values):
                fields[field] = [tree.map(_on_host, v) for v in values]
    for places in scalars.values():
        together = [value for fields, field in places for value in fields[field]]
        numbers = torch.stack(together).tolist() if len(together) > 1 else [together[0].item()]
        length = len(together) // len(places)
        for i, (fields, field) in enumerate(places):
            fields[field] = numbers[i * length : (i + 1) * length]


def _on_host(value: Any) -> Any:
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.ndim == 0 else value.cpu()


def fold(sums: Mapping[str, Metric], steps: Sequence[Mapping[str, Metric]]) -> Mapping[str, Metric]:
    """Merge the metrics of steps into sums, strictly one after the other: where bursts are cut changes no bit.

    Example:
        >>> steps = [{"loss": Mean(1.0, 1.0)}, {"loss": Mean(5.0, 3.0)}]
        >>> fold(fold({}, steps[:1]), steps[1:])["loss"]
        Mean(total=6.0, weight=4.0)
    """
    if not isinstance(steps, Series) or not all(kind in (Mean, Sum) for kind in steps.kinds.values()):
        for step in steps:
            sums = merge(sums, step) if sums else dict(step)
        return sums
    if not len(steps):
        return sums
    if not sums:
        sums, start = {name: steps.metric(name, 0) for name in steps.kinds}, 1
    else:
        start = 0
        if sums.keys() != steps.kinds.keys():
            merge(sums, steps[0])
    return {name: kind(**_totals(sums[name], steps.columns[name], start)) for name, kind in steps.kinds.items()}


def _totals(metric: Any, columns: Columns, start: int) -> dict[str, Any]:
    totals = {}
    for field, values in columns.items():
        total = metric.__dict__[field]
        for value in values[start:] if start else values:
            total += value
        totals[field] = total
    return totals
