"""Commands that compare recorded runs or execute them again: each calls one function of `record`."""

from __future__ import annotations

import argparse
import copy
import dataclasses
import hashlib
import json
from pathlib import Path
from typing import Any

from purestep.cli import run as run_command
from purestep.cli import show
from purestep.cli.flags import Pairs, Settings
from purestep.cli.load import Loaded, load
from purestep.cli.tables import run_directory
from purestep.cli.usage import UsageError
from purestep.record.run_record import RunRecord
from purestep.record.run_record import open as open_run


def experiment_of(run: RunRecord, spec: str | None) -> Loaded:
    """Load the function that makes the experiment of a run: from the given file, else from the recorded one.

    Raises:
        UsageError: the run recorded no file, or the file is gone.
    """
    if spec is not None:
        return load(spec)
    programs = [program for program in run.programs if program.file.endswith(".py")]
    if not programs:
        raise UsageError(f"{run.path.name} does not say which file made it", "--experiment FILE.py")
    program = programs[-1]
    path = Path(program.file)
    if not path.is_file():
        raise UsageError(f"the file that made {run.path.name} is gone: {path}", "--experiment FILE.py")
    if path.resolve().is_relative_to(run.path.resolve()):
        # A run directory may come from another machine, so code in it is executed only on request.
        raise UsageError(f"{run.path.name} names a file in its own directory", f"--experiment {path}")
    show.say(f"experiment: {path}" + ("" if path.read_text() == program.source else ", which was edited since"))
    named = program.function if program.function.isidentifier() else ""
    loaded = load(f"{path}:{named}" if named and f"def {named}(" in path.read_text() else str(path))
    return loaded


def compare(arguments: argparse.Namespace) -> int:
    """Compare what two runs recorded."""
    from purestep.record.compare import compare as compared

    found = compared(run_directory(arguments.a), run_directory(arguments.b))
    if arguments.json:
        told = dataclasses.asdict(found)
        told.pop("log", None)
        show.as_json(told)
    else:
        print(found)
    return 0


def diff(arguments: argparse.Namespace) -> int:
    """Compare two states bit by bit; exit code 1 if they differ."""
    from purestep import tree

    states = []
    for text in (arguments.a, arguments.b):
        run = open_run(run_directory(text))
        if not run.snapshots:
            raise UsageError(f"{text} has no snapshots")
        if arguments.at is not None and arguments.at not in run.snapshots:
            raise UsageError(
                f"{text} has no snapshot at {arguments.at}", f"one of {', '.join(map(str, run.snapshots))}"
            )
        like = experiment_of(run, arguments.experiment).make(run.settings).state
        states.append(run.state(like, step=arguments.at))
    first, second = states
    found = tree.diff(first, second, root="state")
    if arguments.json:
        show.as_json([str(difference) for difference in found])
    else:
        print("\n".join(str(difference) for difference in found) or "the same bits")
    return int(bool(found))


def bisect(arguments: argparse.Namespace) -> int:
    """Find the first batch in which two runs differ; exit code 1 if there is one."""
    from purestep.record.bisect import bisect as bisected

    first, second = (open_run(run_directory(text)) for text in (arguments.a, arguments.b))
    found = bisected(first, second, experiment_of(first, arguments.experiment).function)
    print(found)
    if arguments.operation and found:
        print(found.operation())
    return int(bool(found))


def replay(arguments: argparse.Namespace) -> int:
    """Execute steps again."""
    from purestep.record.replay import replay as replayed

    run = open_run(run_directory(arguments.run))
    first = arguments.at - 1 if arguments.first is None else arguments.first
    if first >= arguments.at:
        raise UsageError(f"--from {first} is not before --at {arguments.at}", f"--from {arguments.at - 1}")
    loaded = experiment_of(run, arguments.experiment)
    rows: list[dict[str, Any]] = []
    for step in replayed(run, loaded.function, first, arguments.at):
        digest = step.digest
        stored = next((h.digests.get("state") for h in run.headers if h.step == step.position), None)
        same = None if stored is None else digest == stored
        rows.append(
            {
                "position": step.position,
                "epoch": step.epoch,
                "batch": step.batch,
                **step.metrics,
                "samples": None if step.indices is None else step.indices.tolist(),
                "digest": digest,
                "as stored": same,
            }
        )
    if arguments.json:
        show.as_json(rows)
    else:
        names = [name for name in rows[0] if name != "samples"]
        show.table([*names, "samples"], [[row[name] for name in names] + [row["samples"]] for row in rows], widest=64)
    return int(any(row["as stored"] is False for row in rows))


def fork(arguments: argparse.Namespace, pairs: Pairs, wants_help: bool) -> int:
    """Start a new run from a position of another run, under other settings."""
    from purestep.record.fork import fork as forked

    run_command.prepare(arguments)
    run = open_run(run_directory(arguments.run))
    loaded = experiment_of(run, arguments.experiment)
    settings = Settings(loaded.function)
    settings.plain |= {name: copy.deepcopy(value) for name, value in run.settings.items() if name in settings}
    if wants_help:
        print(settings.help("purestep fork"), end="")
        return 0
    rest = run_command.read_into(settings, arguments, pairs)
    settings.check()
    experiment = run_command.adapted(loaded.make(settings.plain), arguments, run_command.until_of(rest))
    changed = json.dumps([settings.plain, rest], sort_keys=True).encode()
    target = Path(arguments.run_dir or f"{run.path}-at-{arguments.at}-{hashlib.sha256(changed).hexdigest()[:6]}")
    if not target.exists():
        forked(run, at=arguments.at, run_dir=target, experiment=loaded.function)
    elif open_run(run_directory(str(target))).parent is None:
        raise UsageError(f"{target} is a run that is no fork", "another --run-dir")
    if arguments.prepare:
        print(target)
        return 0
    return run_command.trained(loaded, experiment, target, arguments)


def verify(arguments: argparse.Namespace) -> int:
    """Execute a run again and compare it with its snapshots; exit code 1 if they differ."""
    from purestep.record.verify import verify as verified

    run = open_run(run_directory(arguments.run))
    found = verified(run, experiment_of(run, arguments.experiment).function, every=arguments.every)
    if arguments.json:
        spans = [{"first": s.first, "last": s.last, "equal": s.equal, "found": s.found} for s in found.spans]
        show.as_json({"ok": found.ok, "spans": spans})
    else:
        print(found)
    return int(not found.ok)
