"""`search`: settings that Optuna proposes, each trained in a run directory of its own, and pruned by a metric.

Owns how a study and its runs stay together across a stop: a trial that was interrupted is proposed again, finds its run
directory by its settings, and goes on there. What is proposed depends on the seed and on the finished trials alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from purestep import _cells
from purestep.arguments import Count, Location, Name, Seed, checked
from purestep.errors import ConfigError, explain, import_extra
from purestep.loop.cadence import Until
from purestep.loop.result import Result
from purestep.record.experiment import Experiment
from purestep.record.settings import arguments_of
from purestep.tune.grid import name_of, nested
from purestep.tune.sweep import SweepWarning
from purestep.tune.table import Row, Sweep, summary_of
from purestep.views import written

if TYPE_CHECKING:
    import optuna

JOURNAL = "optuna.journal"
_REPORTED = "purestep.reported"  # attribute of a trial that goes on: (batches, metric) at the ends where it stopped
_END = "purestep.left_at"  # attribute of a trial: the end at which it was pruned


@checked(ConfigError, failed=True)
def search(
    experiment: Callable[..., Experiment],
    space: Mapping[str, Any],
    *,
    root: Location,
    metric: Name,
    trials: Count = 20,
    mode: Literal["min", "max"] = "min",
    settings: Mapping[str, Any] | None = None,
    until: Until | None = None,
    prune_at: Sequence[Until] = (),
    pruner: Any = None,
    sampler: Callable[..., Any] | None = None,
    seed: Seed = 0,
    storage: Any = None,
    loggers: Sequence[Any] | None = None,
    strict: bool = False,
) -> Sweep:
    """Train an experiment under settings that Optuna proposes, one run after the other, each in its own directory.

    The same call continues a study: finished trials are not trained again, an interrupted one is resumed, and the next
    proposals are those of a study that was never stopped. A larger `trials` adds to it.

    Args:
        experiment: function that makes an experiment; its arguments are the settings, see `ps.experiment`.
        space: a distribution of Optuna for each setting that changes:
            `{"lr": optuna.distributions.FloatDistribution(1e-5, 1e-1, log=True)}`. Dots lead into settings with fields.
        root: directory of the run directories and of the study.
        metric: what is optimised: one of `result.metrics`, such as `val/loss`.
        trials: number of finished trials at which to end, pruned ones and failed ones included.
        mode: whether "min" or "max" of the metric is better.
        settings: others, the same in all runs.
        until: where each run ends; by default where its experiment says.
        prune_at: ends at which a run stops for a moment, reports its metric and may be pruned.
        pruner: of Optuna, `MedianPruner()` by default; only with `prune_at`.
        sampler: function of `seed=` that makes a sampler of Optuna, `TPESampler` by default. It is made anew for each
            trial, so that a study that was stopped proposes what one that was not does.
        seed: of the sampler, together with the number of finished trials.
        storage: of Optuna, or its URL; by default the file `optuna.journal` in `root`.
        loggers: as `fit` takes them.
        strict: as `fit` takes it.

    Returns:
        The runs as `ps.tune.sweep` returns them, in the order of the trials.

    Raises:
        ConfigError: a setting or a value is none of the experiment, or a run has no such metric.
        MissingExtra: optuna is not installed (`pip install "purestep[optuna]"`).
        Exception: that of the first run, where every run ended by one.
    """
    import_extra("optuna", extra="optuna", needed_by="ps.tune.search()")
    top = _cells.located(root)
    top.mkdir(parents=True, exist_ok=True)
    study = _study(top, storage, pruner, mode)
    for frozen in study.get_trials(states=_states("RUNNING")):
        # Told as failed and proposed again: the settings find the run directory, where the run goes on.
        study.tell(frozen.number, state=_states("FAIL")[0])
        reported = [list(pair) for pair in sorted(frozen.intermediate_values.items())]
        study.enqueue_trial(frozen.params, user_attrs={_REPORTED: reported})
    errors: list[Exception] = []
    interrupted = None
    while (finished := len(_finished(study))) < trials and interrupted is None:
        study.sampler = _sampler(sampler, (seed + finished) % 2**32)
        trial = study.ask(dict(space))
        plain, run_dir = _member(experiment, trial.params, settings or {}, top)
        arguments_of(experiment, plain)
        options = {"run_dir": run_dir, "loggers": loggers, "strict": strict}
        try:
            made = Experiment.of(experiment, plain)
            interrupted = _train(study, trial, made, until, prune_at, metric, options)
        except ConfigError:
            raise
        except Exception as error:
            errors.append(error)
            text = f"{run_dir.name}: {type(error).__name__}: {error}"
            warnings.warn(SweepWarning(text), stacklevel=3)
            trial.set_user_attr("error", text)
            study.tell(trial, state=_states("FAIL")[0])
    if errors and not study.get_trials(states=_states("COMPLETE", "PRUNED")):
        raise errors[0]
    return Sweep(top, _rows(study, experiment, settings or {}, top), metric, mode, interrupted)


def _train(
    study: optuna.Study,
    trial: optuna.Trial,
    made: Experiment,
    until: Until | None,
    prune_at: Sequence[Until],
    metric: str,
    options: Mapping[str, Any],
) -> str | None:
    """Train a trial to its end, or until it is pruned; return the signal that interrupted it."""
    reported = list(trial.user_attrs.get(_REPORTED, ()))
    for end in prune_at:
        if reported:  # the run is past this end: its latest metric is another
            batches, value = reported.pop(0)
        else:
            result = made.fit(**options, until=end)
            if result.interrupted:
                return str(result.reason)
            batches, value = result.loop.cursor.batches, _value(result, metric, f"it is reported at {end}")
        if math.isfinite(value):
            trial.report(value, batches)
            if trial.should_prune():
                trial.set_user_attr(_END, str(end))
                study.tell(trial, state=_states("PRUNED")[0])
                return None
    result = made.fit(**options, **({} if until is None else {"until": until}))
    if result.interrupted:
        return str(result.reason)
    value = _value(result, metric, "it is what the study optimises")
    if math.isfinite(value):
        study.tell(trial, value)
    else:
        trial.set_user_attr("error", f"{metric} is {value}")
        study.tell(trial, state=_states("FAIL")[0])
    return None


def _value(result: Result, metric: str, why: str) -> float:
    if metric not in result.metrics:
        where = f"{result.run_dir}: {', '.join(result.metrics) or 'none'}"
        raise ConfigError(explain(f"a run has no metric {metric!r}", where=where, why=why))
    return float(result.metrics[metric])


def _study(top: Path, storage: Any, pruner: Any, mode: str) -> optuna.Study:
    import optuna
    from optuna.storages import JournalStorage
    from optuna.storages.journal import JournalFileBackend

    return optuna.create_study(
        storage=JournalStorage(JournalFileBackend(str(top / JOURNAL))) if storage is None else storage,
        study_name=top.name,
        pruner=optuna.pruners.MedianPruner() if pruner is None else pruner,
        direction="minimize" if mode == "min" else "maximize",
        load_if_exists=True,
    )


def _states(*names: str) -> tuple[optuna.trial.TrialState, ...]:
    import optuna

    return tuple(optuna.trial.TrialState[name] for name in names)


def _sampler(make: Callable[..., Any] | None, seed: int) -> Any:
    import optuna

    return (make or optuna.samplers.TPESampler)(seed=seed)


def _finished(study: optuna.Study) -> list[optuna.trial.FrozenTrial]:
    """Return the trials that came to an end of their own: not those that were interrupted and proposed again."""
    found = study.get_trials(states=_states("COMPLETE", "PRUNED", "FAIL"))
    return [trial for trial in found if trial.state.name != "FAIL" or "error" in trial.user_attrs]


def _member(
    experiment: Callable[..., Experiment], params: Mapping[str, Any], settings: Mapping[str, Any], top: Path
) -> tuple[dict[str, Any], Path]:
    plain = nested(experiment, {**settings, **params})
    return plain, top / name_of({name: written(value) for name, value in params.items()})


def _rows(
    study: optuna.Study, experiment: Callable[..., Experiment], settings: Mapping[str, Any], top: Path
) -> tuple[Row, ...]:
    rows = {}
    for trial in study.get_trials():
        if not trial.params:
            continue
        _, run_dir = _member(experiment, trial.params, settings, top)
        shown = {name: written(value) for name, value in trial.params.items()}
        rows[run_dir] = Row(shown, run_dir, summary_of(run_dir), trial.user_attrs.get(_END, ""))
    return tuple(rows.values())
