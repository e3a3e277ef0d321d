"""`sweep`: an experiment under every combination of settings, each in a run directory of its own, and halving.

A run that reached its end is not started again, and one that was interrupted is resumed from its last snapshot: so the
same call continues a sweep. Here runs train in turn or together; the command also trains them in worker processes.
"""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from purestep import _cells
from purestep.arguments import Count, Location, Name, checked
from purestep.errors import ConfigError, explain
from purestep.loop.cadence import Until
from purestep.loop.result import Result
from purestep.record.experiment import Experiment
from purestep.record.settings import arguments_of
from purestep.tune.grid import Member, combinations, name_of, nested, value_of
from purestep.tune.halving import Halving, rungs
from purestep.tune.perform import perform
from purestep.tune.table import Sweep
from purestep.tune.together import Together, trains
from purestep.views import written


class SweepWarning(UserWarning):
    """A run of a sweep ended by an error; the others go on."""


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
        shown = {name: written(value_of(plain, name)) for name in several}
        members.append(Member(shown, top / name_of(shown)))
        plain_by_run[members[-1].run_dir] = plain
    if not members or len(plain_by_run) < len(members):
        what = "two runs of the sweep have the same settings" if members else "a setting of the sweep has no values"
        raise ConfigError(explain(what, where=f"axes={dict(axes)!r}"[:300], instead='{"lr": [1e-3, 1e-2]}'))
    chosen = None if halving is None else _halving(halving, metric, mode, until, experiment, plain_by_run, members)
    errors: list[Exception] = []

    def make(member: Member) -> Experiment:
        return Experiment.of(experiment, plain_by_run[member.run_dir])

    def options(member: Member, end: Until | None) -> dict[str, Any]:
        given = {"run_dir": member.run_dir, "loggers": loggers, "strict": strict}
        return given if end is None else {**given, "until": end}

    def alone(member: Member, end: Until | None) -> Result | Exception:
        try:
            return make(member).fit(**options(member, end))
        except Exception as error:
            return error

    def code_of(member: Member, result: Result | Exception) -> int:
        if not isinstance(result, Exception):
            return result.exit_code
        errors.append(result)
        warnings.warn(SweepWarning(f"{member.name}: {type(result).__name__}: {result}"), stacklevel=5)
        return 1

    together = Together(members, make, lambda m, made, end: made.run(**options(m, end))) if vmap else None
    train_all = trains(together, alone, code_of)
    found, _ = perform(members, top, train_all, end=until, halving=chosen, metric=metric, mode=mode)
    if len(errors) >= len(members):
        raise errors[0]
    return found if together is None else together.told(found, members)


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
