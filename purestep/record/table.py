"""`runs`: the runs under a directory as a table that sorts, filters and shows itself."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, overload

from purestep import _cells
from purestep.arguments import Location, Name, checked
from purestep.display import curves, plots
from purestep.errors import ConfigError, explain
from purestep.loggers import read_csv
from purestep.record.summary import Summary, is_run, summarize
from purestep.views import Block, Note, Printed, Table, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

DEPTH = 4  # levels below the root at which runs are looked for
SHOWN = 100  # rows


@dataclasses.dataclass(frozen=True, repr=False)
class Runs(Printed, Sequence[Summary]):
    """A table of runs. It iterates, and is indexed by a number or a name; `sort` and `filter` give another table.

    Attributes:
        rows: a `Summary` of each run.
    """

    rows: tuple[Summary, ...]

    @overload
    def __getitem__(self, key: int | str) -> Summary: ...
    @overload
    def __getitem__(self, key: slice) -> Runs: ...
    def __getitem__(self, key: int | str | slice) -> Summary | Runs:
        if isinstance(key, slice):
            return Runs(self.rows[key])
        if isinstance(key, int):
            return self.rows[key]
        for row in self.rows:
            if row.name == key:
                return row
        names = ", ".join(row.name for row in self.rows[:20])
        raise ConfigError(explain(f"there is no run named {key!r}", where=f"runs: {names or 'none'}"))

    def __len__(self) -> int:
        return len(self.rows)

    def sort(self, by: Name, *, reverse: bool = False) -> Runs:
        """Return the table sorted by a column: an attribute of `Summary`, a metric or a setting.

        Runs without a value come last, NaN too.

        Args:
            by: "when", "updates", "name", ..., or the name of a metric or of a setting.
            reverse: largest first.

        Raises:
            ConfigError: no run has such a column, or its values are of kinds that have no order.
        """
        if not any(_has(row, by) for row in self.rows) and self.rows:
            names = dict.fromkeys([*_FIELDS, *(n for row in self.rows for n in (*row.settings, *row.metrics))])
            raise ConfigError(
                explain(f"no run has a column {by!r}", where=f"columns: {', '.join(names)}", instead='sort("when")')
            )
        with_value = [row for row in self.rows if _value(row, by) is not None]
        try:
            ordered = sorted(with_value, key=lambda row: _value(row, by), reverse=reverse)
        except TypeError as error:
            raise ConfigError(explain(f"the values of {by!r} have no order", why=str(error))) from error
        return Runs((*ordered, *(row for row in self.rows if _value(row, by) is None)))

    def filter(self, condition: Callable[[Summary], bool] | None = None, **values: Any) -> Runs:
        """Return the runs that meet a condition, and have the values that are given.

        Args:
            condition: `condition(summary) -> bool`.
            values: attributes of `Summary`, settings or metrics by name, and what they are equal to.
        """
        kept = [row for row in self.rows if condition is None or condition(row)]
        return Runs(tuple(row for row in kept if all(_value(row, name) == wanted for name, wanted in values.items())))

    def plot(self, *keys: Name, title: str | None = None) -> Figure:
        """Draw metrics of all runs over each other, a panel for each metric.

        Of up to 7 runs each has a colour of its own; more are shades in the order of the table, so `sort("lr")` first.

        Args:
            *keys: names of metrics; those that several of the runs have logged by default.
            title: of the picture; none by default.

        Raises:
            ConfigError: no run has logged a key, or there is nothing to draw.
            MissingExtra: matplotlib is not installed.
        """
        named = [(row.name, found) for row in self.rows if (found := _log(row))]
        return plots.draw(curves.beside(named, keys or None, together=False), title=title)

    def columns(self, *, shared: bool = True) -> tuple[list[str], list[list[object]]]:
        """Return the names of the columns, and a row of values for each of the first hundred runs.

        Args:
            shared: whether settings that are equal in all of them have a column, too.
        """
        rows = self.rows[:SHOWN]
        settings = [
            name
            for name in _names(row.settings for row in rows)
            if shared or any(_setting(row, name) != _setting(rows[0], name) for row in rows)
        ]
        metrics = _names(row.metrics for row in rows)
        parents = any(row.parent is not None for row in rows)
        head = [
            "run",
            "when",
            "why it ended",
            "updates",
            *settings,
            *metrics,
            *(["parent"] if parents else []),
            "digest",
        ]
        body: list[list[object]] = []
        for row in rows:
            cells: list[object] = [row.name, row.when, row.why, row.updates]
            cells += [_setting(row, name) for name in settings]
            cells += [row.metrics.get(name) for name in metrics]
            cells += [row.parent] if parents else []
            body.append([*cells, row.digest[:8]])
        return head, body

    def view(self) -> list[Block]:
        if not self.rows:
            return [Note("no runs")]
        more = len(self.rows) - SHOWN
        return [Table(*self.columns()), *([Note(f"... and {more:,} more")] if more > 0 else [])]


def _log(row: Summary) -> dict[str, list[Any]]:
    """Return what a run logged; nothing of one without a log, or with a damaged one, which its row says."""
    try:
        return read_csv(row.path)
    except (OSError, ConfigError):
        return {}


_FIELDS = tuple(field.name for field in dataclasses.fields(Summary))


def _has(row: Summary, name: str) -> bool:
    return name in _FIELDS or name in row.settings or name in row.metrics


def _value(row: Summary, name: str) -> Any:
    """Return an attribute, a setting or a metric; None for one that is missing or NaN."""
    value = getattr(row, name) if name in _FIELDS else row.settings.get(name, row.metrics.get(name))
    return None if value != value else value


def _setting(row: Summary, name: str) -> object:
    """Return a setting for a table, where True is not 1 and a list is its text."""
    value = row.settings.get(name)
    return value if value is None or isinstance(value, float) else written(value)


def _names(mappings: Any) -> list[str]:
    return list(dict.fromkeys(name for mapping in mappings for name in mapping))


@checked(ConfigError)
def runs(root: Location) -> Runs:
    """List the runs under a directory, itself included, in order of name.

    Only what each run says of itself is read: `run.json` and the header of its newest snapshot. A run that is damaged
    has a row that says so. Symbolic links are not followed.

    Args:
        root: the directory; runs are looked for up to four levels below.

    Raises:
        ConfigError: there is no such directory.

    Examples:
        >>> import tempfile, torch
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        >>> root = Path(tempfile.mkdtemp())
        >>> for n in (2, 3):
        ...     state = ps.init(lambda: torch.nn.Linear(2, 1), tx)
        ...     data = ps.data.batches({"x": torch.ones(8, 2)}, 4)
        ...     _ = ps.fit(step, state, data, until=ps.steps(n), run_dir=root / f"run{n}", settings={"n": n})
        >>> table = runs(root)
        >>> [(run.name, run.why, run.updates) for run in table.sort("updates", reverse=True)]
        [('run3', 'reached 3 steps', 3), ('run2', 'reached 2 steps', 2)]
        >>> table.filter(n=2)["run2"].settings
        {'n': 2}
    """
    top = _cells.located(root)
    if not top.is_dir():
        raise ConfigError(explain("there is no such directory", where=f"root={str(root)!r}"))
    found = sorted(_found(top, DEPTH))
    return Runs(tuple(summarize(path, _named(path, top)) for path in found))


def _named(path: Path, top: Path) -> str:
    return top.absolute().name if path == top else path.relative_to(top).as_posix()


def _found(directory: Path, depth: int) -> Iterator[Path]:
    below: list[str] = []
    try:
        if found := is_run(directory):
            yield directory
        if found or depth == 0:
            return
        with os.scandir(directory) as items:
            below = [
                item.name for item in items if item.is_dir(follow_symlinks=False) and not item.name.startswith(".")
            ]
    except OSError:  # not ours to read
        return
    for name in below:
        yield from _found(directory / name, depth - 1)
