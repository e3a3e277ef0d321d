"""`compare`: two runs beside each other, from what they recorded; nothing is executed."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Iterator, Mapping
from typing import TYPE_CHECKING, Any

from purestep.arguments import checked
from purestep.display import curves, plots
from purestep.errors import ConfigError
from purestep.record.replay import Which, opened
from purestep.record.run_record import Columns, RunRecord
from purestep.views import Block, Curves, Mark, Note, Panel, Printed, Table

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_STEPS = 12  # rows of the log that are shown


@dataclasses.dataclass(frozen=True)
class Parted:
    """The first row of the log in which two runs differ.

    Attributes:
        step: of the row.
        values: the metrics that differ there, each of the first and of the second run; None where it was not logged.
    """

    step: int
    values: Mapping[str, tuple[float | None, float | None]]


@dataclasses.dataclass(frozen=True, repr=False)
class Comparison(Printed):
    """The result of `compare`.

    Attributes:
        names: of the two runs; their directories where the names are equal.
        settings: what differs of them, by name: the values of both, None where one has none.
        conditions: what differs of their identity and environment, by dotted name, in the same way.
        metrics: of the newest snapshots, in the same way, equal ones too.
        log: the rows that both have logged: "step", and each metric of both as "<metric>, <name of the run>".
        parted: where their logs part; None where one is the beginning of the other.
        digests: of the train states of the newest snapshots.
        last_equal: the last position at which both have a snapshot of the same train state, None without one.
        logs: what each of them has logged.
    """

    names: tuple[str, str]
    settings: Mapping[str, tuple[Any, Any]]
    conditions: Mapping[str, tuple[Any, Any]]
    metrics: Mapping[str, tuple[float | None, float | None]]
    log: Mapping[str, list[Any]] = dataclasses.field(repr=False)
    parted: Parted | None
    digests: tuple[str, str]
    last_equal: int | None
    logs: tuple[Columns, Columns] = dataclasses.field(default=(Columns({}), Columns({})), compare=False)

    def plot(self, *keys: str, title: str | None = None) -> Figure:
        """Draw the metrics of both over each other, with a line at the first step where their logs part.

        Args:
            *keys: names of metrics; those that both have logged by default.
            title: of the picture; none by default.

        Raises:
            ConfigError: none of the two has logged a key, or there is no metric that both have.
            MissingExtra: matplotlib is not installed.
        """
        return plots.draw(self._panels(keys or None), title=title)

    def _panels(self, keys: tuple[str, ...] | None = None) -> tuple[Panel, ...]:
        mark = None if self.parted is None else Mark(self.parted.step, f"they part at {self.parted.step}")
        return curves.beside(zip(self.names, self.logs, strict=True), keys, mark)

    def _rows(self) -> list[list[object]]:
        rows: list[list[object]] = [[f"setting {name}", *map(_text, pair)] for name, pair in self.settings.items()]
        rows += [[name, *map(_text, pair)] for name, pair in self.conditions.items()]
        rows += [[name, *pair] for name, pair in self.metrics.items()]
        rows.append(["digest", *(digest[:12] for digest in self.digests)])
        return rows

    def _ends(self) -> list[str]:
        at = self.last_equal
        equal = "no snapshot of both is equal" if at is None else f"last snapshots equal at {at}"
        if self.parted is None:
            return [f"the logs do not part; {equal}"]
        values = "; ".join(f"{name} {_text(a)} and {_text(b)}" for name, (a, b) in self.parted.values.items())
        return [f"the logs part at step {self.parted.step}: {values}; {equal}"]

    def _log_table(self) -> Table:
        """The rows of the log around the place where they part, of the metrics that differ there; or the last ones."""
        parted = None if self.parted is None else {f"{n}, {run}" for n in self.parted.values for run in self.names}
        log = {name: column for name, column in self.log.items() if parted is None or name in parted or name == "step"}
        rows = [list(row) for row in zip(*log.values(), strict=True)]
        at = next((n for n, row in enumerate(rows) if self.parted and row[0] >= self.parted.step), len(rows))
        start = max(0, min(at - 2, len(rows) - _STEPS))
        return Table(list(log), rows[start : start + _STEPS])

    def view(self) -> list[Block]:
        blocks: list[Block] = [Table(["", *self.names], self._rows()), *map(Note, self._ends())]
        if len(self.log) > 1:  # more than the steps
            blocks += [Curves(self._panels()), self._log_table()]
        return blocks


@checked(ConfigError)
def compare(a: Which, b: Which) -> Comparison:
    """Compare two runs by what they recorded: settings, identity, environment, metrics and digests.

    Args:
        a: a run, or its directory.
        b: another.

    Examples:
        >>> import tempfile, torch
        >>> import purestep as ps
        >>> @ps.experiment
        ... def linear(lr=0.1):
        ...     tx = ps.optim.sgd(lr)
        ...     step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        ...     data = ps.data.batches({"x": torch.arange(16.0).reshape(8, 2)}, 4)
        ...     return ps.Experiment(step, ps.init(lambda: torch.nn.Linear(2, 1), tx), data, until=ps.steps(4))
        >>> root = tempfile.mkdtemp()
        >>> for lr in (0.1, 0.2):
        ...     _ = linear(lr).fit(run_dir=f"{root}/{lr}")
        >>> found = compare(f"{root}/0.1", f"{root}/0.2")
        >>> found.settings, found.parted.step
        ({'lr': (0.1, 0.2)}, 2)
    """
    first, second = opened(a), opened(b)
    names = (first.name, second.name) if first.name != second.name else (str(first.path), str(second.path))
    conditions = {
        f"{part}{path}": pair
        for part in ("identity", "environment")
        for path, pair in _differences("", getattr(first, part), getattr(second, part))
        if not path.startswith(".settings")
    }
    return Comparison(
        names=names,
        settings={path[1:]: pair for path, pair in _differences("", first.settings, second.settings)},
        conditions=conditions,
        metrics=_pairs(first.summary.metrics, second.summary.metrics),
        log=_beside(names, first.metrics, second.metrics),
        parted=_parted(first.metrics, second.metrics),
        digests=(first.digest, second.digest),
        last_equal=last_equal(first, second),
        logs=(first.metrics, second.metrics),
    )


def last_equal(a: RunRecord, b: RunRecord) -> int | None:
    """Return the last position at which both have a snapshot of one train state, or at which one is a fork of the
    other; None without any."""
    states = [{header.step: header.digests.get("state") for header in run.headers} for run in (a, b)]
    for child, other, own in ((a, b, states[0]), (b, a, states[1])):
        parent = child.parent
        if parent is not None and parent.run == str(other.path) and own.get(parent.at) == parent.digest:
            states[0][parent.at] = states[1][parent.at] = parent.digest
    return max((step for step, digest in states[0].items() if digest and digest == states[1].get(step)), default=None)


def _differences(path: str, a: Any, b: Any) -> Iterator[tuple[str, tuple[Any, Any]]]:
    if isinstance(a, Mapping) and isinstance(b, Mapping):
        for name in dict.fromkeys([*a, *b]):
            yield from _differences(f"{path}.{name}", a.get(name), b.get(name))
    elif isinstance(a, list) and isinstance(b, list) and len(a) == len(b):
        for index, (x, y) in enumerate(zip(a, b, strict=True)):
            yield from _differences(f"{path}[{index}]", x, y)
    elif a != b:
        yield path, (a, b)


def _pairs(a: Mapping[str, float], b: Mapping[str, float]) -> dict[str, tuple[float | None, float | None]]:
    return {name: (a.get(name), b.get(name)) for name in dict.fromkeys([*a, *b])}


def _rows_of(columns: Columns) -> dict[int, dict[str, float]]:
    """Return what was logged by step, the later value of a name where there are several."""
    rows: dict[int, dict[str, float]] = {}
    names = [name for name in columns if name != "step"]
    for place, step in enumerate(columns.get("step", [])):
        row = {name: columns[name][place] for name in names}
        rows.setdefault(step, {}).update({name: value for name, value in row.items() if value is not None})
    return rows


def _parted(a: Columns, b: Columns) -> Parted | None:
    rows_a, rows_b = _rows_of(a), _rows_of(b)
    for step in sorted(rows_a.keys() & rows_b.keys()):
        pairs = _pairs(rows_a[step], rows_b[step])
        # Of runs that log different metrics those of both are compared; as text, because NaN is not equal to itself.
        differing = {n: p for n, p in pairs.items() if n in a and n in b and repr(p[0]) != repr(p[1])}
        if differing:
            return Parted(step, differing)
    return None


def _beside(names: tuple[str, str], a: Columns, b: Columns) -> dict[str, list[Any]]:
    rows_a, rows_b = _rows_of(a), _rows_of(b)
    steps = sorted(rows_a.keys() & rows_b.keys())
    found: dict[str, list[Any]] = {"step": steps} if steps else {}
    for name in [name for name in curves.metrics_of(a) if name in b] if steps else []:
        for run, rows in zip(names, (rows_a, rows_b), strict=True):
            found[f"{name}, {run}"] = [rows[step].get(name) for step in steps]
    return found


def _text(value: object) -> object:
    return value if value is None or isinstance(value, (float, str)) else json.dumps(value)
