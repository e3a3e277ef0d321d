"""The arguments of a run, refused where they make no sense, before anything begins; and names that callbacks wait for.

Names of evaluations are known from the start, those of metrics from the dry runs before the first step. A name that
never comes would be a wait for ever.
"""

from __future__ import annotations

import difflib
import math
import os
from collections.abc import Collection, Mapping, Sequence
from pathlib import PurePath
from typing import Any

import torch

from purestep.errors import ConfigError, MetricError, explain
from purestep.loggers.base import Logger
from purestep.loop.cadence import Every, Until
from purestep.loop.events import Callback
from purestep.loop.roles import Evaluator, Recurring, SnapshotPolicy, Watcher
from purestep.remote import Remote

Known = Mapping[str, Collection[str] | None]
_OWN_CALLBACK = "ps.callbacks.tap(function), or a frozen dataclass that subclasses ps.callbacks.Reducer"


def check_step(step: object) -> None:
    """Refuse a step that cannot be called, or a class of steps.

    Raises:
        ConfigError: with what was given, like all functions here.
    """
    if not callable(step) or isinstance(step, type):
        raise ConfigError(explain("a step is a function (state, batch) -> (state, metrics)", where=f"step={step!r}"))


def check_until(until: object) -> None:
    """Refuse an end that is none."""
    if not isinstance(until, Until):
        raise ConfigError(
            explain(
                "until= says when the run ends",
                where=f"until={until!r}",
                instead="ps.epochs(5), ps.steps(1000), ps.seconds(3600), or both: ps.epochs(5) | ps.seconds(3600)",
            )
        )


def check_device(device: object) -> None:
    """Refuse what names no device that torch knows."""
    if device is None or device == "auto":
        return
    try:
        torch.device(device)  # type: ignore[call-overload]
    except (RuntimeError, TypeError, ValueError, OverflowError) as error:
        raise ConfigError(
            explain(
                "device= is a device, 'auto', or None",
                where=f"device={device!r}",
                why="None leaves the state where it is, 'auto' is ps.default_device()",
                instead="device='cuda'",
            )
        ) from error


def check_on_save_error(answer: object) -> None:
    """Refuse other answers to a save that failed than "continue" and "stop"."""
    if answer not in ("continue", "stop"):
        raise ConfigError(explain("on_save_error= is 'continue' or 'stop'", where=f"on_save_error={answer!r}"))


def check_grace(seconds: object) -> None:
    """Refuse a grace period that is no time."""
    number = isinstance(seconds, (int, float)) and not isinstance(seconds, bool)
    if seconds is not None and not (number and (0 <= seconds < 2**63 or seconds == math.inf)):  # type: ignore[operator]
        raise ConfigError(
            explain(
                "grace_seconds= is how long the scheduler waits after SIGTERM",
                where=f"grace_seconds={seconds!r}",
                instead="grace_seconds=100, or None to wait until the last snapshot is durable",
            )
        )


def check_resume(resume: object) -> None:
    """Refuse what says nothing of where to begin."""
    if resume not in ("auto", "never", "must") and (isinstance(resume, bool) or not isinstance(resume, int)):
        raise ConfigError(
            explain(
                "resume= is 'auto', 'never', 'must', or the number of a snapshot",
                where=f"resume={resume!r}",
                instead="resume='auto'   # continue if there is a snapshot, start otherwise",
            )
        )


def check_flags(**flags: object) -> None:
    """Refuse a switch that is neither on nor off."""
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ConfigError(explain(f"{name}= is True or False", where=f"{name}={flag!r}"))


def check_free_settings(names: object) -> None:
    if not isinstance(names, (list, tuple)) or not all(isinstance(name, str) and name for name in names):
        raise ConfigError(
            explain(
                "free_settings= are names of settings",
                where=f"free_settings={names!r}",
                instead='free_settings=["num_workers"]',
            )
        )


def check_counts(least: int, **counts: object) -> None:
    """Refuse a number of batches that is none."""
    for name, count in counts.items():
        if count is not None and (isinstance(count, bool) or not isinstance(count, int) or not least <= count < 2**63):
            raise ConfigError(
                explain(f"{name}= is a number of batches", where=f"{name}={count!r}", instead=f"{name}=2, or None")
            )


def check_run_dir(run_dir: object) -> None:
    """Refuse a run directory that is no path, or names no directory."""
    if not isinstance(run_dir, (str, os.PathLike, type(None))):
        raise ConfigError(explain("run_dir= is a path", where=f"run_dir={run_dir!r}", instead="run_dir='runs/digits'"))
    if isinstance(run_dir, str) and "://" in run_dir:
        raise ConfigError(
            explain(
                "run_dir= is a directory of this machine",
                where=f"run_dir={run_dir!r}",
                why="snapshots are written to a disk first, so that training does not wait for a network",
                instead=f'run_dir="runs/{run_dir.rstrip("/").rpartition("/")[2]}", remote={run_dir!r}',
            )
        )
    if run_dir is not None:
        _check_named(os.fspath(run_dir), run_dir)


def checked_remote(remote: object, run_dir: object) -> Remote | None:
    """Return where the run directory is copied to; refuse what is no such place, and a copy of no directory."""
    if isinstance(remote, str):
        remote = Remote(remote)
    if not isinstance(remote, (Remote, type(None))):
        raise ConfigError(
            explain(
                "remote= is a url, or ps.Remote(url, ...)",
                where=f"remote={remote!r}",
                instead='remote="s3://bucket/runs/a"',
            )
        )
    if remote is not None and run_dir is None:
        raise ConfigError(
            explain(
                "remote= copies the run directory, and there is none",
                where=f"remote={remote!r}, run_dir=None",
                why="snapshots are written to a disk first, so that training does not wait for a network",
                instead='ps.fit(..., run_dir="runs/a", remote="s3://bucket/runs/a")',
            )
        )
    return remote


def _check_named(text: object, run_dir: object) -> None:
    """Refuse the current directory, which an empty text means without saying so, and what no file system can name."""
    if not isinstance(text, str) or "\0" in text:
        raise ConfigError(explain("run_dir= is a path", where=f"run_dir={run_dir!r}", instead="run_dir='runs/digits'"))
    if not text.strip() or (isinstance(run_dir, PurePath) and not run_dir.parts):  # Path("") prints as ".", too
        raise ConfigError(
            explain(
                "run_dir= names no directory",
                where=f"run_dir={run_dir!r}",
                why="an empty path is the current directory, which is seldom meant: everything of the run goes there",
                instead="run_dir='runs/digits', run_dir='.' for the current directory, or None to write nothing",
            )
        )


def check_place(run_dir: PurePath | None, callbacks: Sequence[Callback]) -> None:
    """Refuse snapshots without a directory for them."""
    if run_dir is None and any(isinstance(callback, SnapshotPolicy) for callback in callbacks):
        raise ConfigError(
            explain("snapshots need a place", where="run_dir=None", instead='ps.fit(..., run_dir="runs/name")')
        )


# --- callbacks and loggers --------------------------------------------------------------------------------------------


def check_callbacks(callbacks: Sequence[Callback]) -> None:
    """Refuse callbacks that are none, and those that cannot work together.

    Raises:
        ConfigError: with the names of those concerned.
    """
    for callback in _listed("callbacks", callbacks, "[ps.callbacks.log(every=ps.every.steps(50))]"):
        if not isinstance(callback, Callback) or isinstance(callback, type) or not isinstance(callback.name, str):
            called = getattr(callback, "__name__", "") if callable(callback) else ""
            raise ConfigError(
                explain(
                    "this is not a callback",
                    where=f"callbacks: {called or repr(callback)}",
                    why="a callback is a value with name, init, react and horizon",
                    instead=f"{called}(...)   # called" if called else _OWN_CALLBACK,
                )
            )
        if isinstance(callback, Recurring) and not isinstance(callback.every, Every):
            raise ConfigError(
                explain(
                    "every= says when something recurs",
                    where=f"{callback.name!r}: every={callback.every!r}",
                    instead="ps.every.steps(100), ps.every.epoch(), ps.every.seconds(60), or two of them: a | b",
                )
            )
    if any(isinstance(c, Evaluator) and c.name == "train" for c in callbacks):
        raise ConfigError(
            explain(
                "an evaluation clashes with the metrics of training",
                where="evaluate(..., name='train')",
                why="both would be logged as train/<metric>",
                instead="ps.callbacks.evaluate(loss_fn, data, name='train_set')",
            )
        )
    check_sets(callbacks)


def check_loggers(loggers: object) -> None:
    """Refuse loggers that are none.

    Raises:
        ConfigError: with the first one.
    """
    if loggers is None:
        return
    for logger in _listed("loggers", loggers, "[ps.loggers.csv()]"):
        if not isinstance(logger, Logger):
            called = getattr(logger, "__name__", "") if callable(logger) else ""
            raise ConfigError(
                explain(
                    "this is not a logger",
                    where=f"loggers: {called or repr(logger)}",
                    why="a logger is a value that says where rows go",
                    instead=f"{called}(...)   # called" if called else "ps.loggers.csv(), ps.loggers.tensorboard()",
                )
            )


def _listed(name: str, given: object, instead: str) -> Sequence[Any]:
    if not isinstance(given, (list, tuple)):
        raise ConfigError(explain(f"{name}= is a list", where=f"{name}={given!r}", instead=f"{name}={instead}"))
    return given


# --- names that callbacks wait for ------------------------------------------------------------------------------------


def _watched(callbacks: Sequence[Callback], *, ranked: bool) -> list[tuple[Callback, str]]:
    """Return each callback with each metric that it waits for, and by which it ranks.

    Ranks may go by any row, and a callback of the user's may log what it likes.
    """
    ranked = ranked and all(type(callback).__module__.startswith("purestep.") for callback in callbacks)
    chosen = [c for c in callbacks if isinstance(c, Watcher) and (ranked or not isinstance(c, SnapshotPolicy))]
    return [(callback, name) for callback in chosen for name in callback.watches()]


def check_sets(callbacks: Sequence[Callback]) -> None:
    """Refuse a wait for metrics of a set that nothing evaluates.

    Raises:
        ConfigError: with the callback and the sets that there are.
    """
    evaluated = [c.name for c in callbacks if isinstance(c, Evaluator)]
    for callback, name in _watched(callbacks, ranked=False):
        part = name.split("/")[0]
        if part in (*evaluated, "train"):
            continue
        sets = ", ".join(f"{other}/..." for other in evaluated)
        raise ConfigError(
            explain(
                f"{callback.name!r} watches {name!r}, which no callback evaluates",
                where=f"evaluated: {sets or 'nothing'}",
                why="it would wait for it for ever",
                instead=f"ps.callbacks.evaluate(loss_fn, data, name={part!r})",
            )
        )


def check_names(callbacks: Sequence[Callback], known: Known) -> None:
    """Refuse a wait for a metric that its set does not have.

    Args:
        callbacks: of the run.
        known: names of the metrics of each set, None where they are not known.

    Raises:
        MetricError: with the metrics that there are.
    """
    for callback, name in _watched(callbacks, ranked=True):
        part, _, metric = name.partition("/")
        names = known.get(part)
        if names is None:
            continue
        bare = metric.removesuffix("_epoch") if part == "train" else metric
        # A metric that computes to several numbers logs each below its own name.
        if any(bare == n or bare.startswith(f"{n}/") for n in names):
            continue
        suffix = metric[len(bare) :]
        near = difflib.get_close_matches(bare, names, n=1, cutoff=0.0) or [""]
        raise MetricError(
            explain(
                f"{callback.name!r} watches {name!r}, which is not among the metrics of {part!r}",
                where=f"{part}: {', '.join(sorted(names))}",
                why="it would wait for it for ever",
                instead=f"{part}/{near[0]}{suffix}",
            )
        )
