"""`sweep`: an experiment under every combination of settings, each in a run directory of its own, and halving.

Owns which combinations there are, which runs are done, which go on after a rung, and the table. A run that reached its
end is not started again, and one that was interrupted is resumed from its last snapshot: so the same call continues a
sweep. What trains a run is handed in: here `Experiment.fit`, in the command also worker processes.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import itertools
import json
import math
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from purestep import _cells
from purestep.arguments import Count, Location, Name, checked
from purestep.errors import ConfigError, explain
from purestep.loggers.base import write_atomically
from purestep.loop.cadence import Until, UntilEpochs, UntilSteps, epochs, steps
from purestep.record.experiment import Experiment
from purestep.record.settings import REQUIRED, arguments_of, encode, kind_of, settings_of
from purestep.record.summary import Summary, is_run, summarize
from purestep.record.table import Runs
from purestep.views import Block, Note, Printed, Table, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure

INTERRUPTED = {130: "SIGINT", 143: "SIGTERM"}
LEDGER = (
    "sweep.json"  # in the root: which runs went on after each rung, so that a resumed sweep decides it no other way
)
VMAPPED = "vmapped"
_ERROR = re.compile(r"[A-Za-z_.]*(Error|Exception|Interrupt|Exit)\b")


class SweepWarning(UserWarning):
    """A run of a sweep ended by an error; the others go on."""


@dataclasses.dataclass(frozen=True)
class Member:
    """One combination of settings, and the directory of its run.

    Attributes:
        values: of the settings in which the runs of the sweep differ, as text.
        run_dir: of the run.
    """

    values: Mapping[str, str]
    run_dir: Path

    @property
    def name(self) -> str:
        """Of the run: its directory below the root."""
        return self.run_dir.name


@dataclasses.dataclass(frozen=True)
class Halving:
    """Successive halving: at each end but the last, only the best runs go on.

    Attributes:
        factor: one of so many goes on.
        ends: where the runs stop to be compared, the last where they end.
        metric: by which.
        mode: whether "min" or "max" is better.
    """

    factor: int
    ends: tuple[Until, ...]
    metric: str
    mode: Literal["min", "max"]

    def best(self, values: Mapping[str, float]) -> list[str]:
        """Return the names of those that go on, the best first; one that is not finite is behind all that are.

        Examples:
            >>> halving = Halving(3, (), "loss", "min")
            >>> halving.best({"a": 0.3, "b": float("nan"), "c": 0.1, "d": 0.2})
            ['c', 'd']
        """
        sign = 1.0 if self.mode == "min" else -1.0
        order = sorted(values, key=lambda name: sign * values[name] if math.isfinite(values[name]) else math.inf)
        return order[: -(-len(order) // self.factor)]


# Trains some runs until an end (None: that of their experiment) and returns an exit code, 130 or 143 for a signal.
TrainAll = Callable[[Sequence[Member], Until | None], int]


@dataclasses.dataclass(frozen=True)
class Row:
    """A run of a sweep.

    Attributes:
        values: of the settings in which the runs differ, as text.
        run_dir: of the run.
        summary: what the directory says, None for a run that has not been started.
        left_at: the end at which it was left behind by better ones, "" for one that was not.
        how: it trains: "vmapped", or "in turn: " and why; "" where the sweep did not ask.
    """

    values: Mapping[str, str]
    run_dir: Path
    summary: Summary | None
    left_at: str = ""
    how: str = ""

    @property
    def why(self) -> str:
        """Why it ended, or that it was not started."""
        if self.left_at:
            return f"left at {self.left_at}"
        return "not started" if self.summary is None else self.summary.why


@dataclasses.dataclass(frozen=True, repr=False)
class Sweep(Printed):
    """The runs of a sweep. It prints as a table. Made by `sweep`.

    Attributes:
        root: the directory with the run directories.
        rows: a `Row` for each combination, in order.
        metric: by which runs are compared, None for none.
        mode: whether "min" or "max" of it is better.
        interrupted: the signal that ended the sweep, None for one that is complete.
    """

    root: Path
    rows: tuple[Row, ...]
    metric: str | None = None
    mode: Literal["min", "max"] = "min"
    interrupted: str | None = None

    @property
    def done(self) -> bool:
        """Whether each run that was not left behind reached its end."""
        return all(row.left_at or _is_done(row.summary) for row in self.rows)

    @property
    def best(self) -> Summary:
        """The run with the best metric among those that were not left behind.

        Raises:
            ConfigError: the sweep has no metric, or no run has a finite value of it.
        """
        if self.metric is None:
            raise ConfigError(
                explain("nothing says which run is the best", instead='ps.tune.sweep(..., metric="val/loss")')
            )
        found = [row.summary for row in self.rows if row.summary is not None and not row.left_at]
        finite = [one for one in found if math.isfinite(one.metrics.get(self.metric, math.nan))]
        if not finite:
            raise ConfigError(_no_metric(self.metric, found))
        sign = 1 if self.mode == "min" else -1
        return min(finite, key=lambda one: sign * one.metrics[str(self.metric)])

    @property
    def runs(self) -> Runs:
        """The runs that were started, as the table of `ps.runs`: it sorts and filters."""
        return Runs(tuple(row.summary for row in self.rows if row.summary is not None))

    def plot(self, *keys: Name, title: str | None = None) -> Figure:
        """Draw metrics of all runs over each other, as `ps.runs(root).plot` does.

        Args:
            *keys: names of metrics; by default the metric of the sweep, or those that several of the runs have logged.
            title: of the picture; none by default.

        Raises:
            ConfigError: no run has logged a key, or there is nothing to draw.
            MissingExtra: matplotlib is not installed.
        """
        chosen = keys or (() if self.metric is None else (self.metric,))
        return self.runs.plot(*chosen, title=title)

    def columns(self) -> tuple[list[str], list[list[object]]]:
        """Return the names of the columns, and a row of values for each run."""
        metrics = list(dict.fromkeys(name for row in self.rows if row.summary for name in row.summary.metrics))
        told = any(row.how for row in self.rows)
        how = ["how it trains"] if told else []
        head = [*(self.rows[0].values if self.rows else ()), *how, "why it ended", "batches", *metrics, "digest"]
        body: list[list[object]] = []
        for row in self.rows:
            cells: list[object] = [*row.values.values(), *([row.how] if told else []), row.why]
            if row.summary is None:
                cells += [None] * (len(metrics) + 2)
            else:
                cells += [row.summary.batches, *map(row.summary.metrics.get, metrics), row.summary.digest[:8]]
            body.append(cells)
        return head, body

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        notes = [] if self.interrupted is None else [Note(f"{self.interrupted}: the same call continues the sweep")]
        finite = [row for row in self.rows if row.summary and not row.left_at and self.metric in row.summary.metrics]
        if self.metric is not None and finite and not self.interrupted:
            best = self.best
            notes.append(Note(f"best {self.metric}: {best.metrics[self.metric]:.4g}, {best.name}"))
        return [Table(*self.columns()), *notes]


def _no_metric(metric: str, found: Sequence[Summary]) -> str:
    names = list(dict.fromkeys(name for one in found for name in one.metrics))
    return explain(
        f"no run has a finite {metric!r}",
        where=f"metrics: {', '.join(names) or 'none'}",
        instead=f"metric={names[0]!r}" if names else None,
    )


# --- what the command shares ------------------------------------------------------------------------------------------


def name_of(values: Mapping[str, str]) -> str:
    """Return the name of the directory of a run: the settings that differ.

    Examples:
        >>> name_of({"lr": "1e-3", "optimizer": "lion(1e-4)"})
        'lr=1e-3,optimizer=lion(1e-4)'
    """
    text = ",".join(f"{name}={value}" for name, value in values.items())
    return re.sub(r"[^\w.,=()+-]+", "_", text)[:200] or "run"


def is_done(run_dir: Path, end: Until | None = None) -> bool:
    """Tell whether a run reached its end: it was neither interrupted, nor ended by an error.

    Args:
        run_dir: of the run.
        end: where it is to end; None for wherever its experiment says. A run that ended for a reason of its own, such
            as early stopping, is done.
    """
    return _is_done(summary_of(run_dir), end)


def summary_of(run_dir: Path) -> Summary | None:
    """Return what a run directory says, None for a run that has not been started."""
    return summarize(run_dir, run_dir.name) if is_run(run_dir) else None


def _is_done(row: Summary | None, end: Until | None = None) -> bool:
    if row is None or row.damage or row.why in ("not finished", "not started", *INTERRUPTED.values()):
        return False
    if _ERROR.match(row.why):
        return False
    return end is None or row.why == f"reached {end}" or not row.why.startswith("reached ")


def combinations(axes: Mapping[str, Sequence[Any]]) -> list[tuple[dict[str, Any], tuple[str, ...]]]:
    """Return each combination of values, and the names of the settings in which they differ.

    Examples:
        >>> [values for values, _ in combinations({"lr": [0.1, 0.2], "seed": [0]})]
        [{'lr': 0.1, 'seed': 0}, {'lr': 0.2, 'seed': 0}]
    """
    several = tuple(name for name, values in axes.items() if len(values) > 1) or tuple(axes)
    return [(dict(zip(axes, chosen, strict=True)), several) for chosen in itertools.product(*axes.values())]


def perform(
    members: Sequence[Member],
    root: Path,
    train_all: TrainAll,
    *,
    end: Until | None = None,
    halving: Halving | None = None,
    metric: str | None = None,
    mode: Literal["min", "max"] = "min",
) -> tuple[Sweep, int]:
    """Train the members that are not done, in rungs where there is halving.

    Args:
        members: of the sweep.
        root: the directory of all.
        train_all: trains some of them until an end.
        end: of each run; None for where its experiment says.
        halving: which go on; None for all.
        metric, mode: by which the best is found.

    Returns:
        The sweep, and the largest exit code of `train_all`.

    Raises:
        ConfigError: `root` holds another sweep with halving, or a run has no value of the metric.
    """
    left: dict[str, str] = {}
    code, alive = 0, list(members)
    ledger = _Ledger(root, members, halving) if halving is not None else None
    ends: Sequence[Until | None] = (end,) if halving is None else halving.ends
    for number, until in enumerate(ends):
        kept = None if ledger is None else ledger.kept(number)
        if kept is None:
            todo = [member for member in alive if not is_done(member.run_dir, until)]
            found = train_all(todo, until) if todo else 0
            code = max(code, found)
            if found in INTERRUPTED:
                break
            if halving is not None and ledger is not None and number < len(ends) - 1:
                found_now = {member.name: summary_of(member.run_dir) for member in alive}
                values = {name: _metric_of(row, halving.metric) for name, row in found_now.items()}
                if not any(map(math.isfinite, values.values())):
                    raise ConfigError(_no_metric(halving.metric, [row for row in found_now.values() if row]))
                kept = halving.best(values)
                ledger.write(number, values, kept)
        if kept is not None:
            left |= {member.name: str(until) for member in alive if member.name not in kept}
            alive = [member for member in alive if member.name in kept]
    rows = tuple(
        Row(member.values, member.run_dir, summary_of(member.run_dir), left.get(member.name, "")) for member in members
    )
    return Sweep(root, rows, metric, mode, INTERRUPTED.get(code)), code


def _metric_of(row: Summary | None, metric: str) -> float:
    """Return the metric of a run; NaN for one that an error ended, or that has none."""
    return float(row.metrics.get(metric, math.nan)) if row is not None and _is_done(row) else math.nan


class _Ledger:
    """What was decided at each rung, in a file of the root."""

    def __init__(self, root: Path, members: Sequence[Member], halving: Halving) -> None:
        self.path = root / LEDGER
        asked = {
            "members": [member.name for member in members],
            "ends": [str(end) for end in halving.ends],
            "factor": halving.factor,
            "metric": halving.metric,
            "mode": halving.mode,
        }
        self.told: dict[str, Any] = {**asked, "rungs": []}
        if not self.path.exists():
            trained = [member.name for member in members if is_run(member.run_dir)]
            if trained:
                raise ConfigError(
                    explain(
                        "this directory holds runs that were not stopped at the rungs",
                        where=f"{root}: {', '.join(trained[:5])}",
                        why="runs are compared after the same part of their length",
                        instead="another root",
                    )
                )
            self._save()
            return
        try:
            told = json.loads(self.path.read_text())
        except ValueError as error:
            raise ConfigError(explain("the record of a sweep cannot be read", where=str(self.path))) from error
        changed = [name for name, value in asked.items() if told.get(name) != value]
        if changed:
            raise ConfigError(
                explain(
                    "this directory holds another sweep",
                    where=f"{self.path}: another {', '.join(changed)}",
                    why="which runs went on was decided among those of that sweep",
                    instead="another root, or the same arguments",
                )
            )
        self.told = told

    def kept(self, number: int) -> list[str] | None:
        rungs = self.told["rungs"]
        return list(rungs[number]["kept"]) if number < len(rungs) else None

    def write(self, number: int, values: Mapping[str, float], kept: Sequence[str]) -> None:
        shown = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self.told["rungs"].append({"end": self.told["ends"][number], "values": shown, "kept": list(kept)})
        self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.told, indent=1))


def rungs(end: Until | None, members: int, factor: int) -> tuple[Until, ...]:
    """Return the ends of successive halving: the last is `end`, each before it has one `factor`-th of the budget.

    Raises:
        ConfigError: `end` is not in steps or epochs, or has too few of them.

    Examples:
        >>> [str(end) for end in rungs(epochs(9), members=9, factor=3)]
        ['1 epochs', '3 epochs', '9 epochs']
    """
    if not isinstance(end, (UntilEpochs, UntilSteps)):
        raise ConfigError(
            explain(
                "halving divides the length of a run, which is a number of steps or of epochs",
                where=f"until={end}",
                instead="ps.tune.sweep(..., until=ps.epochs(9), halving=3)",
            )
        )
    count = 0
    while members > 1:
        members, count = -(-members // factor), count + 1
    make = epochs if isinstance(end, UntilEpochs) else steps
    lengths = [-(-end.n // factor**power) for power in range(count, -1, -1)]
    if len(set(lengths)) < len(lengths):
        raise ConfigError(
            explain(
                "the runs are too short for so many rungs",
                where=f"until={end}, halving={factor}: rungs at {', '.join(map(str, lengths))}",
                instead=f"until=ps.{make.__name__}({factor**count}), or halving={factor + 1}",
            )
        )
    return tuple(make(length) for length in lengths)


# --- from Python ------------------------------------------------------------------------------------------------------


@checked(ConfigError, failed=True)
def sweep(
    experiment: Callable[..., Experiment],
    axes: Mapping[str, Sequence[Any]],
    *,
    root: Location,
    settings: Mapping[str, Any] | None = None,
    until: Until | None = None,
    metric: Name | None = None,
    mode: Literal["min", "max"] = "min",
    halving: Count | None = None,
    loggers: Sequence[Any] | None = None,
    strict: bool = False,
    vmap: bool = False,
) -> Sweep:
    """Train an experiment under every combination of settings, one after the other, each in its own run directory.

    With `vmap=True` runs that are the same program on other tensors train together, in one step that `torch.vmap` maps
    over their states: those that differ in a seed, in hyperparameters that `inject_hyperparams` keeps in the state, in
    their data. Their loops, logs, callbacks and snapshots are their own. They have the numbers of a run alone up to
    rounding, not its bits; each snapshot records `vmap`, and a resume without it says so. Others train in turn, and the
    table says why.

    The same call continues a sweep: a run that reached its end is not started again, one that was interrupted is
    resumed. A run that ends by an error is a `SweepWarning`, and the others go on.

    Args:
        experiment: function that makes an experiment; its arguments are the settings, see `ps.experiment`.
        axes: values of each setting that changes: `{"lr": [1e-3, 1e-2], "seed": range(8)}`. Dots lead into settings
            with fields or arguments: `optimizer.learning_rate`.
        root: directory of the run directories.
        settings: others, the same in all runs.
        until: where each run ends; by default where its experiment says.
        metric: by which runs are compared: one of `result.metrics`, such as `val/loss`.
        mode: whether "min" or "max" of it is better.
        halving: compare the runs at a part of their length, and go on with the best one in so many: with 3 and nine
            runs of 9 epochs all train 1 epoch, the best three 3, the best one 9. A run that goes on is resumed, and has
            the bits of one that was never stopped. Needs `metric`, and `until` in steps or epochs.
        loggers: as `fit` takes them.
        strict: as `fit` takes it.
        vmap: train runs together where that is possible; all their states are in memory at once.

    Returns:
        A value that prints as a table: `rows`, `best`, `runs` (that of `ps.runs`), `plot()`.

    Raises:
        ConfigError: a setting or a value is none of the experiment, two runs have the same settings, `halving` has no
            metric or its rungs no room, or `root` holds another sweep with halving.
        Exception: that of the first run, where every run ended by one.

    Examples:
        >>> import tempfile, torch
        >>> import purestep as ps
        >>> def linear(lr: float = 0.1, seed: int = 0) -> ps.Experiment:
        ...     tx = ps.optim.sgd(lr)
        ...     step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        ...     state = ps.init(lambda: torch.nn.Linear(2, 1), tx, seed=seed)
        ...     return ps.Experiment(step, state, ps.data.batches({"x": torch.ones(8, 2)}, 4), until=ps.steps(4))
        >>> found = sweep(linear, {"lr": [0.1, 0.01], "seed": range(2)}, root=tempfile.mkdtemp())
        >>> [row.why for row in found.rows], found.rows[1].run_dir.name
        (['reached 4 steps', 'reached 4 steps', 'reached 4 steps', 'reached 4 steps'], 'lr=0.1,seed=1')

    Reference of halving: Jamieson and Talwalkar, Non-stochastic Best Arm Identification, 2016.
    """
    top = _cells.located(root)
    plain_by_run: dict[Path, dict[str, Any]] = {}
    members = []
    for values, several in combinations({name: list(chosen) for name, chosen in axes.items()}):
        plain = nested(experiment, {**(settings or {}), **values})
        arguments_of(experiment, plain)  # every error of settings comes before the first run
        shown = {name: written(_found(plain, name)) for name in several}
        members.append(Member(shown, top / name_of(shown)))
        plain_by_run[members[-1].run_dir] = plain
    if not members or len(plain_by_run) < len(members):
        what = "two runs of the sweep have the same settings" if members else "a setting of the sweep has no values"
        raise ConfigError(explain(what, where=f"axes={dict(axes)!r}"[:300], instead='{"lr": [1e-3, 1e-2]}'))
    chosen = None if halving is None else _halving(halving, metric, mode, until, experiment, plain_by_run, members)
    errors: list[Exception] = []

    together = _Together(experiment, members, plain_by_run) if vmap else None

    def failed(member: Member, error: Exception) -> None:
        errors.append(error)
        warnings.warn(SweepWarning(f"{member.name}: {type(error).__name__}: {error}"), stacklevel=5)

    def train_all(todo: Sequence[Member], end: Until | None) -> int:
        code = 0
        for turn in [[member] for member in todo] if together is None else together.turns(todo):
            given = [
                {"run_dir": m.run_dir, "loggers": loggers, "strict": strict} | ({} if end is None else {"until": end})
                for m in turn
            ]
            if together is not None and together.how(turn[0]) == VMAPPED:
                results = together.train(turn, given)
            else:
                results = [_fit(experiment, plain_by_run[turn[0].run_dir], given[0])]
            for member, result in zip(turn, results, strict=True):
                if isinstance(result, Exception):
                    failed(member, result)
                code = max(code, 1 if isinstance(result, Exception) else result.exit_code)
            if any(not isinstance(result, Exception) and result.interrupted for result in results):
                break
        return code

    found, _ = perform(members, top, train_all, end=until, halving=chosen, metric=metric, mode=mode)
    if len(errors) >= len(members):
        raise errors[0]
    if together is None:
        return found
    rows = [dataclasses.replace(row, how=together.how(m)) for row, m in zip(found.rows, members, strict=True)]
    return dataclasses.replace(found, rows=tuple(rows))


def _fit(experiment: Callable[..., Experiment], plain: Mapping[str, Any], options: Mapping[str, Any]) -> Any:
    """Return the result of a run that trains in turn, or the error that ended it."""
    try:
        return Experiment.of(experiment, plain).fit(**options)
    except Exception as error:
        return error


class _Together:
    """Which runs of a sweep train together, and how. All of them count, whichever are done already."""

    def __init__(
        self,
        experiment: Callable[..., Experiment],
        members: Sequence[Member],
        plain_by_run: Mapping[Path, dict[str, Any]],
    ) -> None:
        from purestep.tune.vmapped import groups_of

        self._made: dict[str, Experiment] = {}
        for member in members:
            with contextlib.suppress(Exception):  # its run says what is wrong
                self._made[member.name] = Experiment.of(experiment, plain_by_run[member.run_dir])
        self._groups = groups_of(self._made)

    def how(self, member: Member) -> str:
        """Say how a run trains."""
        if any(member.name in group for group in self._groups.together):
            return VMAPPED
        return f"in turn: {self._groups.alone.get(member.name, 'it could not be made')}"

    def turns(self, todo: Sequence[Member]) -> list[list[Member]]:
        """Return the runs in the order in which they train: those of a group at once."""
        groups = [[member for member in todo if member.name in group] for group in self._groups.together]
        return [*filter(None, groups), *([member] for member in todo if self.how(member) != VMAPPED)]

    def train(self, members: Sequence[Member], options: Sequence[Mapping[str, Any]]) -> list[Any]:
        """Train runs of one group; return their results, or the errors that ended them."""
        from purestep.tune.vmapped import train_together

        return train_together([self._made[member.name] for member in members], options)


def _halving(
    factor: int,
    metric: str | None,
    mode: Literal["min", "max"],
    until: Until | None,
    experiment: Callable[..., Experiment],
    plain_by_run: Mapping[Path, dict[str, Any]],
    members: Sequence[Member],
) -> Halving:
    if metric is None or factor < 2:
        raise ConfigError(
            explain(
                "halving goes by a metric, and keeps one run in two or more",
                where=f"halving={factor!r}, metric={metric!r}",
                instead='ps.tune.sweep(..., halving=3, metric="val/loss")',
            )
        )
    end = until or _first_end(experiment, [plain_by_run[member.run_dir] for member in members])
    if end is None:
        raise ConfigError(explain("nothing says where the runs end", instead="ps.tune.sweep(..., until=ps.epochs(9))"))
    return Halving(factor, rungs(end, len(members), factor), metric, mode)


def _first_end(experiment: Callable[..., Experiment], settings: Sequence[Mapping[str, Any]]) -> Until | None:
    """Return where an experiment ends, by the first settings with which it can be made; its run says what is wrong."""
    for plain in settings:
        with contextlib.suppress(Exception):
            return Experiment.of(experiment, plain).until
    return None


def nested(maker: Callable[..., Experiment], values: Mapping[str, Any]) -> dict[str, Any]:
    """Return settings by dotted name as JSON, nested."""
    known = {setting.name: setting for setting in settings_of(maker)}
    found: dict[str, Any] = {}
    for path, value in values.items():
        first, *rest = path.split(".")
        kind = known[first].kind if first in known else kind_of(Any)
        if not rest:
            found[first] = encode(value, kind, first)
            continue
        if first not in found and first in known and known[first].default is not REQUIRED:
            found[first] = copy.deepcopy(encode(known[first].default, kind, first))
        place = found.setdefault(first, {})
        for name in rest[:-1]:
            place = place.setdefault(name, {}) if isinstance(place, dict) else None
        if not isinstance(place, dict):
            raise ConfigError(explain(f"the setting {path} is inside of one that has no fields", where=f"{first}"))
        place[rest[-1]] = encode(value, kind_of(Any), path)
    return found


def _found(plain: Mapping[str, Any], path: str) -> Any:
    value: Any = plain
    for name in path.split("."):
        value = value[name]
    return value
