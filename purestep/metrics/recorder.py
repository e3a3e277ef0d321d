"""The metrics of several steps, read to the host and folded in order.

A `Recorder` makes a `Series` of the metrics that a chunk of steps returns; `fold` adds it to sums, one step after the
other, without an object for each step where the metric is a plain sum. The loop calls both; the result does not depend
on how the steps are divided into chunks.
"""

from __future__ import annotations

import functools
import operator
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, overload

import torch
from torch import Tensor

from purestep import tree
from purestep.errors import MetricError, explain
from purestep.metrics.dicts import merge
from purestep.metrics.metric import Growing, Mean, Metric, Sum

Columns = dict[str, Sequence[Any]]  # by field, the values of all steps
_NUMBERS = frozenset((float, int, bool))
BLOCK = 64  # steps: enough that the code which reads is fetched once for many, and few that wait


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
    def __getitem__(self, index: int | slice) -> Mapping[str, Metric] | Sequence[Mapping[str, Metric]]:
        if isinstance(index, slice):
            return [self[i] for i in range(*index.indices(self._length))]
        if not -self._length <= index < self._length:
            raise IndexError(index)
        return {name: self.metric(name, index) for name in self.kinds}

    def __iter__(self) -> Iterator[Mapping[str, Metric]]:
        return (self[i] for i in range(self._length))

    def metric(self, name: str, index: int) -> Metric:
        """Return one metric of one step."""
        # Without `__init__`, which would check and convert values that a metric of this class has had already.
        node: Any = object.__new__(self.kinds[name])
        node.__dict__.update({field: column[index] for field, column in self.columns[name].items()})
        return node


class Recorder:
    """Collects the metrics of steps one by one, and returns them as a `Series`.

    Numbers in host memory are read for many steps at once, because after each step the code that reads them has left
    the cache of the processor, which costs more than the numbers themselves. Tensors on a device are kept, and read by
    `series` in one transfer for each dtype, so that no step synchronizes with the device.

    Attributes:
        waiting: metrics of the last steps, not read yet. A loop may append to it what it would give to `add`, and call
            `read` every `BLOCK` steps: then no function of Python is called for a step.

    Examples:
        >>> recorder = Recorder()
        >>> for value in (1.0, 2.0, 4.0):
        ...     recorder.add({"loss": Mean(torch.tensor(value), torch.tensor(1.0))})
        >>> recorder.series().columns["loss"]["total"]
        [1.0, 2.0, 4.0]
    """

    def __init__(self) -> None:
        self._first: Mapping[str, Metric] = {}
        self._columns: dict[str, Columns] = {}
        # By metric: name, class, and for each field its name, `append` of its column, and whether it is on the host.
        self._layout: list[tuple[str, type, list[tuple[str, Callable[[Any], None], bool]]]] = []
        self.waiting: list[Mapping[str, Metric]] = []
        self._length = 0
        self._all_read = True

    def __len__(self) -> int:
        return self._length + len(self.waiting)

    def add(self, step: Mapping[str, Metric]) -> None:
        """Add the metrics of one step.

        Raises:
            MetricError: this step or one of the 63 before it has other names or classes than the first one.
        """
        self.waiting.append(step)
        if len(self.waiting) >= BLOCK:
            self.read()

    def read(self) -> None:
        """Read the numbers of the steps that wait, as far as they are in host memory; raises what `add` raises."""
        if not self._length and self.waiting:
            self._set_layout(self.waiting[0])
        for step in self.waiting:
            if len(step) != len(self._layout):
                raise _changed(self._first, step)
            for name, kind, fields in self._layout:
                metric = step.get(name)
                if type(metric) is not kind:
                    raise _changed(self._first, step)
                values = metric.__dict__
                for field, append, on_host in fields:
                    value = number = values[field]
                    if on_host and type(value) is Tensor:
                        number = value.tolist()  # one call instead of three: for the device, the dims and the item
                    if type(number) not in _NUMBERS:
                        self._all_read, number = False, value
                    append(number)
            self._length += 1
        self.waiting.clear()

    def _set_layout(self, step: Mapping[str, Metric]) -> None:
        self._first = step
        for name, metric in step.items():
            columns: dict[str, list[Any]] = {field: [] for field in metric.__dict__}
            on_host = {f: type(v) is Tensor and v.is_cpu and not v.ndim for f, v in metric.__dict__.items()}
            self._columns[name] = dict(columns)
            self._layout.append((name, type(metric), [(f, columns[f].append, on_host[f]) for f in columns]))

    def series(self) -> Series:
        """Return all steps that were added, on the host: 0-d leaves as Python numbers, others as CPU tensors."""
        self.read()
        if not self._all_read:
            _read_tensors(self._columns)
            self._all_read = True
        return Series({name: kind for name, kind, _ in self._layout}, self._columns, self._length)


def to_host(steps: Sequence[Mapping[str, Metric]]) -> Series:
    """Read the metrics of several steps from the device, all 0-d tensors of a dtype in one transfer.

    0-d leaves become Python numbers (so that further sums are float64), others CPU tensors.

    Raises:
        MetricError: the steps differ in the names or types of their metrics.

    Examples:
        >>> series = to_host([{"loss": Mean(torch.tensor(2.0), torch.tensor(4.0))} for _ in range(3)])
        >>> len(series), series[0]
        (3, {'loss': Mean(0.5, weight=4)})
    """
    recorder = Recorder()
    for step in steps:
        recorder.add(step)
    return recorder.series()


def _changed(first: Mapping[str, Metric], step: Mapping[str, Metric]) -> MetricError:
    try:
        merge(dict.fromkeys(first, Sum(0)), dict.fromkeys(step, Sum(0)))
    except MetricError as error:
        return error
    name = next(name for name in first if type(first[name]) is not type(step[name]))
    where = f"{name}: {type(first[name]).__name__} and {type(step[name]).__name__}"
    return MetricError(explain("a metric changed its type between two steps", where=where))


def _read_tensors(columns: Mapping[str, Columns]) -> None:
    """Replace the tensors in the columns by their values."""
    # 0-d tensors of one dtype and device are stacked there and copied at once: each copy would synchronize.
    scalars: dict[tuple[torch.dtype, torch.device], list[tuple[Columns, str]]] = {}
    for fields in columns.values():
        for field, values in fields.items():
            if all(isinstance(v, Tensor) and v.ndim == 0 for v in values):
                scalars.setdefault((values[0].dtype, values[0].device), []).append((fields, field))
            elif not all(isinstance(v, (int, float)) for v in values):
                fields[field] = [tree.map(_to_host, v) for v in values]
    for group in scalars.values():
        tensors = [value for fields, field in group for value in fields[field]]
        numbers = torch.stack(tensors).tolist() if len(tensors) > 1 else [tensors[0].item()]
        length = len(tensors) // len(group)
        for i, (fields, field) in enumerate(group):
            fields[field] = numbers[i * length : (i + 1) * length]


def _to_host(value: object) -> object:
    if not isinstance(value, Tensor):
        return value
    return value.item() if value.ndim == 0 else value.cpu()


def fold(sums: Mapping[str, Metric], steps: Sequence[Mapping[str, Metric]]) -> Mapping[str, Metric]:
    """Merge the metrics of steps into sums, one step after the other, so that chunks of any length give the same bits.

    Args:
        sums: of the steps before; empty at the start.
        steps: one dict of metrics a step.

    Raises:
        MetricError: the names of the metrics differ.

    Examples:
        >>> steps = [{"loss": Mean(1.0, 1.0)}, {"loss": Mean(5.0, 3.0)}]
        >>> fold(fold({}, steps[:1]), steps[1:])["loss"]
        Mean(1.5, weight=4)
    """
    # The fields of Mean and Sum are sums themselves, which are added column by column, in the order of the steps.
    if not isinstance(steps, Series) or not all(kind in (Mean, Sum) for kind in steps.kinds.values()):
        return _merged(sums, steps)
    if not len(steps):
        return sums
    if not sums:
        sums, start = {name: steps.metric(name, 0) for name in steps.kinds}, 1
    else:
        start = 0
        if sums.keys() != steps.kinds.keys():
            merge(sums, steps[0])
    return {name: kind(**_totals(sums[name], steps.columns[name], start)) for name, kind in steps.kinds.items()}


def _merged(sums: Mapping[str, Metric], steps: Sequence[Mapping[str, Metric]]) -> Mapping[str, Metric]:
    """Merge step by step, but what keeps every sample at once: each merge would copy all that came before."""
    every = [sums, *steps] if sums else list(steps)
    if not every or not any(isinstance(metric, Growing) for metric in every[0].values()):
        for step in steps:
            sums = merge(sums, step) if sums else dict(step)
        return sums
    first, *rest = every
    growing = {name for name, metric in first.items() if isinstance(metric, Growing)}
    others = {name: metric for name, metric in first.items() if name not in growing}
    for step in rest:
        if step.keys() != first.keys():
            merge(first, step)
        others = merge(others, {name: step[name] for name in others})
    whole = {name: first[name].merge_all([step[name] for step in rest]) for name in growing}  # type: ignore[attr-defined]
    return {name: whole[name] if name in growing else others[name] for name in first}


def _totals(metric: Metric, columns: Columns, start: int) -> dict[str, Any]:
    totals = {}
    for field, values in columns.items():
        # Not in place: a tensor belongs to the step, or to the sums of a state before. `sum` may round otherwise.
        totals[field] = functools.reduce(operator.add, values[start:] if start else values, metric.__dict__[field])
    return totals
