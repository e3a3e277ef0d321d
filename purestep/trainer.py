"""`fit` and `run`: what users call to train. They put the defaults around the interpreter in `loop`."""

from __future__ import annotations

import dataclasses
from typing import Any

from purestep import callbacks, data
from purestep.arguments import checked
from purestep.errors import ConfigError
from purestep.loop.cadence import UntilEpochs, every
from purestep.loop.events import Callback
from purestep.loop.options import RunArguments, takes
from purestep.loop.result import Result
from purestep.loop.roles import Evaluator, Instrument, Recurring, SnapshotPolicy, Watcher
from purestep.loop.run import Run


@dataclasses.dataclass(frozen=True)
class _DryRunOver(UntilEpochs):
    """The end of the one epoch, of a few batches, that a dry run has."""

    batches: int

    def __str__(self) -> str:
        return f"the end of a dry run of {self.batches} batches"


@dataclasses.dataclass(frozen=True)
class _Unsaved(callbacks.Reducer):
    """In place of a callback that says which snapshots stay: a dry run has none, but names are checked."""

    name: str
    watched: tuple[str, ...]

    def watches(self) -> tuple[str, ...]:
        return self.watched


def _dry(arguments: RunArguments, batches: int) -> RunArguments:
    """The same run on a few batches, with everything that it does at some moment at their end, and no trace of it."""

    return dataclasses.replace(
        arguments,
        train=data.take(arguments.train, batches),
        until=_DryRunOver(1, batches),
        callbacks=[
            _shortened(callback, batches) for callback in arguments.callbacks if not isinstance(callback, Instrument)
        ],
        loggers=[],
        run_dir=None,
        remote=None,
        resume="never",
        dry_run=None,
    )


def _shortened(callback: Callback, batches: int) -> Any:
    if isinstance(callback, SnapshotPolicy):
        policy: Any = callback
        return _Unsaved(policy.name, tuple(policy.watches() if isinstance(policy, Watcher) else ()))
    limited: Any = callback.limited(batches) if isinstance(callback, Evaluator) else None
    return _once(callback if limited is None else limited)


def _once(callback: Any) -> Any:
    recurs = isinstance(callback, Recurring) and dataclasses.is_dataclass(callback)
    return dataclasses.replace(callback, every=every.epoch()) if recurs else callback


def _with_defaults(arguments: RunArguments) -> RunArguments:
    if arguments.dry_run is not None:
        arguments = _dry(arguments, arguments.dry_run)
    names = {callback.name for callback in arguments.callbacks}
    added: list[Callback] = [] if "log" in names else [callbacks.log()]
    if "progress" not in names:
        added.append(callbacks.progress(epochs=arguments.until.epochs, steps=arguments.until.steps))
    return dataclasses.replace(arguments, callbacks=(*arguments.callbacks, *added))


@checked(ConfigError, failed=True)
@takes(RunArguments)
def run(arguments: RunArguments) -> Run:
    """Start a run and return it as an iterator of events; control stays with you. Takes what `fit` takes.

    A run that is left before its end keeps its directory and its threads until `close()`, or the end of a `with` block.

    Examples:
        >>> import torch
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> state = ps.init(lambda: torch.nn.Linear(2, 1), tx)
        >>> step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        >>> batches = ps.data.batches({"x": torch.ones(8, 2)}, 4)
        >>> events = ps.run(step, state, batches, until=ps.steps(3))
        >>> [type(event).__name__ for event in events if not isinstance(event, ps.loop.Ticked)]
        ['Started', 'StepsDone', 'EpochDone', 'StepsDone', 'Stopped']
        >>> events.loop.cursor.batches
        3
    """
    return Run(_with_defaults(arguments))


@checked(ConfigError, failed=True)
@takes(RunArguments)
def fit(arguments: RunArguments) -> Result:
    """Train until the end, and return what came of it. A second call with the same run_dir continues the first.

    Args:
        step: pure function `(state, batch) -> (state, metrics)`, from `make_step` or written by hand.
        state: the first state; a resumed run takes its structure, shapes and dtypes, not its values.
        train: `data.batches(...)`, a DataLoader, any iterable of batches, or a `data.Source`.
        until: where the run ends: `steps(n)`, `epochs(n)`, `seconds(s)`, `minutes(n)`, `hours(n)`, combined with `|`
            and `&`; or what `ps.until` reads from text.
        callbacks: features of the run, see `purestep.callbacks`. `log()` and `progress()` are added when absent.
        loggers: where rows go, see `purestep.loggers`; a CSV file in `run_dir` when None.
        run_dir: directory of everything the run writes; None writes nothing (and cannot resume).
        resume: "auto" continues from the latest snapshot if there is one, "must" demands one, "never" refuses any,
            and a number goes back to that snapshot and gives up the later ones.
        on_save_error: when a snapshot cannot be written (a full disk): "continue" warns and tries again at the next due
            moment, "stop" raises.
        remote: copy of the run directory elsewhere: a url that fsspec knows, such as "s3://bucket/runs/a", or a
            `ps.Remote`. A run whose directory is behind the copy, an empty one say, begins at the copy. Snapshots are
            copied in the background once they are durable; see docs/snapshots.md.
        strict: refuse to resume, instead of warning, where the run is not the one that was saved (another seed, loss
            function, learning rate, callback) or its bits may differ (another number of intra-op threads).
        grace_seconds: how long the scheduler waits between SIGTERM and SIGKILL. After a signal the run returns within
            this time, even if the disk is still writing its last snapshot; None waits until it is durable.
        donate: update states in place, which the run alone owns: `ps.donate(step)` for a step that is not compiled. The
            state that is given stays as it is, and one that a callback or the caller kept from an earlier event cannot
            be used any more. The bits are the same.
        settings: hyperparameters, JSON by name: recorded in the run directory and in snapshots, given to loggers, shown
            by `ps.runs`. No bit depends on them; a resume says when they have changed.
        free_settings: names of those that a resume may change without a word: where a run ends, how many workers load.
        device: where to train: the state is moved there first, and batches follow. None: where the state is, which
            `init` has chosen; "auto": `ps.default_device()`. A resumed run may go on on another device; a warning then
            says that its bits may differ.
        dry_run: run so many batches of everything instead: train, then each evaluation on as many, and each callback
            that recurs, once. Nothing is written: no run directory, no snapshot, no row of a logger. `state` stays as
            it is; the result has the trained one.
        check_evaluation: batches of each evaluation to compute before the first step, so that one that fails does so
            at once; 0 for none. By default 1, where shapes without values do not tell and the data are those of
            `data.batches` or a list.

    Returns:
        Result with state, metrics, reason and run_dir. After SIGINT or SIGTERM the run ends at the next step, with a
        snapshot; `result.exit_code` is then 130 or 143. A second SIGINT raises KeyboardInterrupt at once.

    Raises:
        ConfigError: arguments that do not fit together, or a run_dir in use by a living process.
        DataError: the position of the snapshot is no place in `train`, which is not what the run was saved with.
        StepError: the step broke its contract.
        SnapshotError: the snapshots of `run_dir` cannot be read or do not fit `state`.

    Examples:
        >>> import torch
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> state = ps.init(lambda: torch.nn.Linear(2, 1), tx)
        >>> step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        >>> result = ps.fit(step, state, ps.data.batches({"x": torch.ones(8, 2)}, 4), until=ps.epochs(3))
        >>> result.reason, int(result.state.step)
        ('reached 3 epochs', 6)
    """
    events = Run(_with_defaults(arguments))
    del arguments  # the run alone holds the state from here on
    for _ in events:
        pass
    return events.result()
