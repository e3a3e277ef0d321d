"""The arguments of a run, refused where they make no sense, before anything begins."""

from __future__ import annotations

import os
from pathlib import PurePath
from typing import Any

from purestep.errors import ConfigError, explain
from purestep.loop.cadence import Until


def check_arguments(step: Any, until: Any, on_save_error: str, grace: Any, run_dir: Any, **flags: Any) -> None:
    """Refuse a step that cannot be called, an end that is none, other answers to a failed save, and what is no path.

    Raises:
        ConfigError: names the argument, and what to write instead.
    """
    if not callable(step) or isinstance(step, type):
        raise ConfigError(explain("a step is a function (state, batch) -> (state, metrics)", where=f"step={step!r}"))
    if not isinstance(until, Until):
        raise ConfigError(
            explain(
                "until= says when the run ends",
                where=f"until={until!r}",
                instead="ps.epochs(5), ps.steps(1000), ps.seconds(3600), or both: ps.epochs(5) | ps.seconds(3600)",
            )
        )
    if on_save_error not in ("continue", "stop"):
        raise ConfigError(explain("on_save_error= is 'continue' or 'stop'", where=f"on_save_error={on_save_error!r}"))
    if grace is not None and (isinstance(grace, bool) or not isinstance(grace, (int, float)) or not grace >= 0):
        raise ConfigError(
            explain(
                "grace_seconds= is how long the scheduler waits after SIGTERM",
                where=f"grace_seconds={grace!r}",
                instead="grace_seconds=100, or None to wait until the last snapshot is durable",
            )
        )
    if not isinstance(run_dir, (str, os.PathLike, type(None))):
        raise ConfigError(explain("run_dir= is a path", where=f"run_dir={run_dir!r}", instead="run_dir='runs/digits'"))
    for name, flag in flags.items():
        if not isinstance(flag, bool):
            raise ConfigError(explain(f"{name}= is True or False", where=f"{name}={flag!r}"))
    if run_dir is not None:
        _check_named(os.fspath(run_dir), run_dir)


def _check_named(text: str | bytes, run_dir: Any) -> None:
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
