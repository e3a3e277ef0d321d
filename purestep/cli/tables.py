"""Commands that read runs without executing them: tables, one run, its snapshots, its curves, its export."""

from __future__ import annotations

import argparse
import datetime
from pathlib import Path
from typing import Any

from purestep.cli import show
from purestep.cli.usage import UsageError
from purestep.errors import nearest_name
from purestep.record.summary import Summary, is_run
from purestep.record.table import Runs
from purestep.record.table import runs as runs_under


def runs(arguments: argparse.Namespace) -> int:
    """List runs."""
    root = Path(arguments.root)
    if not root.is_dir():
        raise UsageError(f"there is no such directory: {root}", near_run(root))
    table = runs_under(root)
    for condition in arguments.filter:
        table = _filtered(table, condition)
    if arguments.sort:
        table = _sorted(table, arguments.sort, reverse=arguments.reverse)
    elif arguments.reverse:
        table = Runs(tuple(reversed(table.rows)))
    if arguments.json:
        show.as_json([_plain(row) for row in table])
    elif not table:
        show.say(f"no runs under {root}")
    else:
        show.table(*table.columns(shared=len(table) == 1))
    return 0


def _filtered(table: Runs, condition: str) -> Runs:
    name, equals, text = condition.partition("=")
    if not equals or not name:
        raise UsageError(f"--filter is NAME=VALUE, not {condition!r}", "--filter lr=0.001")

    def is_equal(row: Summary) -> bool:
        value = row.settings.get(name, getattr(row, name, None))
        if isinstance(value, (int, float)) and not isinstance(value, bool):
            try:
                return float(text) == value
            except ValueError:
                return False
        return str(value) == text

    return table.filter(is_equal)


def _sorted(table: Runs, by: str, *, reverse: bool) -> Runs:
    from purestep.errors import ConfigError

    try:
        return table.sort(by, reverse=reverse)
    except ConfigError as error:
        names = {n for row in table for n in (*row.settings, *row.metrics)} | {"when", "updates", "name", "why"}
        near = nearest_name(by, names)
        raise UsageError(
            f"no run has a column {by!r}", f"--sort {near}" if near else ", ".join(sorted(names))
        ) from error


def near_run(path: Path) -> str:
    """Return the directory most similar to a wrong path; "" if there is none."""
    if not path.parent.is_dir():
        return ""
    near = nearest_name(path.name, [item.name for item in path.parent.iterdir() if item.is_dir()])
    return str(path.parent / near) if near else ""


def run_directory(text: str) -> Path:
    """Return the run directory named on the command line.

    Raises:
        UsageError: it does not exist, or is no run directory.
    """
    path = Path(text)
    if not path.is_dir():
        raise UsageError(f"there is no such run: {text}", near_run(path) or "purestep runs DIR")
    if not is_run(path):
        raise UsageError(f"this is no run directory: {text}", f"purestep runs {text}")
    return path


def _plain(row: Summary) -> dict[str, Any]:
    return {
        "name": row.name,
        "path": str(row.path),
        "when": _time(row.when),
        "why": row.why,
        "updates": row.updates,
        "batches": row.batches,
        "metrics": dict(row.metrics),
        "settings": dict(row.settings),
        "digest": row.digest,
        "parent": None if row.parent is None else {"run": row.parent.run, "at": row.parent.at},
        "damage": row.damage,
    }


def _time(when: datetime.datetime | None) -> str | None:
    return None if when is None else when.isoformat()


def show_run(arguments: argparse.Namespace) -> int:
    """Show one run."""
    from purestep.record.run_record import open as open_run

    run = open_run(run_directory(arguments.run))
    if arguments.json:
        programs = [
            {"file": p.file, "function": p.function, "command": p.command, "commit": p.commit} for p in run.programs
        ]
        told = {"snapshots": list(run.snapshots), "programs": programs, "environment": dict(run.environment)}
        show.as_json({**_plain(run.summary), **told})
    else:
        show.facts({str(name): value for name, value in run.facts()})
    return 0


def snapshots(arguments: argparse.Namespace) -> int:
    """List the snapshots of a run."""
    from purestep.record.run_record import open as open_run

    run = open_run(run_directory(arguments.run))
    rows: list[dict[str, Any]] = [
        {
            "position": header.step,
            "updates": header.info.get("updates"),
            "epoch": header.info.get("epoch"),
            "when": datetime.datetime.fromtimestamp(header.created, datetime.UTC),
            **header.metrics,
            "digest": header.digests.get("state", header.digest),
        }
        for header in run.headers
    ]
    names = list(dict.fromkeys(name for row in rows for name in row if name != "digest"))
    if arguments.json:
        show.as_json([{**row, "when": _time(row["when"])} for row in rows])
    elif rows:
        cut = [[row.get(name) for name in names] + [str(row["digest"])[:12]] for row in rows]
        show.table([*names, "digest"], cut)
    else:
        show.say(f"{arguments.run} has no snapshots")
    return 0


def plot(arguments: argparse.Namespace) -> int:
    """Draw learning curves."""
    from purestep.display.plots import learning_curves

    if arguments.out and not str(arguments.out).lower().endswith(".png"):
        raise UsageError(f"OUT must end with .png, not {str(arguments.out)!r}", "curves.png")
    run = run_directory(arguments.run)
    log = run / "metrics.csv"
    if not log.is_file():
        raise UsageError(f"{arguments.run} has no metrics.csv to draw", "a run with the logger csv")
    known = log.read_text().partition("\n")[0].split(",")
    for name in arguments.metric or ():
        if name not in known:
            near = nearest_name(name, known)
            raise UsageError(
                f"{arguments.run} has logged no {name!r}", f"--metric {near}" if near else ", ".join(known)
            )
    print(learning_curves(log, arguments.out or run / "learning_curves.png", keys=arguments.metric))
    return 0


def export(arguments: argparse.Namespace) -> int:
    """Write a snapshot as one file."""
    from purestep import snapshot
    from purestep.record.run_record import open as open_run

    run = open_run(run_directory(arguments.run))
    if Path(arguments.out).suffix not in (".safetensors", ".pt", ".pth"):
        raise UsageError(f"OUT must end with .safetensors, .pt or .pth, not {arguments.out!r}", "model.safetensors")
    if arguments.best and arguments.at is not None:
        raise UsageError("--best and --at both say which snapshot", "one of them")
    if not run.headers:
        raise UsageError(f"{arguments.run} has no snapshots")
    step = arguments.at
    if step is not None and step not in run.snapshots:
        raise UsageError(f"there is no snapshot at {step}", f"--at {min(run.snapshots, key=lambda s: abs(s - step))}")
    if arguments.best:
        known = {name for header in run.headers for name in header.metrics}
        if arguments.best not in known:
            near = nearest_name(arguments.best, known)
            raise UsageError(
                f"no snapshot has the metric {arguments.best!r}", f"--best {near}" if near else ", ".join(known)
            )
        with snapshot.Store(snapshot.root_of(run.path)) as store:
            step = store.best(arguments.best, arguments.mode)
    out = snapshot.consolidate(run.path, arguments.out, step=step, only=arguments.only)
    show.say(f"the snapshot at {step if step is not None else run.snapshots[-1]}")
    print(out)
    return 0
