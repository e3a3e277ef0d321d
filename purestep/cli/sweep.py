"""`purestep sweep`: an experiment under every combination of settings, each in a run directory of its own.

The same command continues a sweep, as `tune.sweep` decides: a run that reached its end is not started again, an
interrupted run is resumed from its last snapshot. Each worker process imports torch once and trains several runs in
sequence.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import multiprocessing
import re
import signal
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from concurrent.futures.process import BrokenProcessPool
from pathlib import Path
from types import FrameType
from typing import Any

from purestep.cli import run as run_command
from purestep.cli import show
from purestep.cli.flags import Pairs, Settings
from purestep.cli.load import Loaded, load
from purestep.cli.usage import UsageError, of_explained
from purestep.errors import ConfigError, PurestepError
from purestep.loop.cadence import Until
from purestep.tune.sweep import INTERRUPTED, Halving, Member, Sweep, combinations, is_done, name_of, perform, rungs

Axes = Mapping[str, Sequence[str]]


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep, as it is sent to a worker process.

    Attributes:
        values: the settings that the sweep varies, as text.
        plain: all settings, as JSON.
        until: the end of the run if it is not a setting; else None.
        run_dir: directory of the run.
        arguments: arguments of the command.
    """

    values: Mapping[str, str]
    plain: Mapping[str, Any]
    until: str | None
    run_dir: Path
    arguments: argparse.Namespace


def sweep(arguments: argparse.Namespace, pairs: Pairs, wants_help: bool) -> int:
    """Train an experiment under every combination of settings, and print a table."""
    run_command.prepare(arguments)
    loaded = load(arguments.file)
    settings, _ = run_command.settings_of(loaded, arguments, [])
    if wants_help:
        return run_command.help_of("sweep", loaded, settings)
    axes = axes_of(pairs, settings)
    root = Path(arguments.run_dir or f"runs/{loaded.stem}-sweep")
    jobs = list(_jobs(settings, axes, root, arguments))
    by_run = {job.run_dir: job for job in jobs}
    if len(by_run) < len(jobs):
        raise UsageError("two runs of the sweep have the same settings", "each value once")
    # Errors in settings are found before the first run.
    for job in jobs:
        checked = copy.copy(settings)
        checked.plain = dict(job.plain)
        checked.check()
    end = run_command.until_of({"until": jobs[0].until} if jobs[0].until else {})
    members = [Member(job.values, job.run_dir) for job in jobs]
    todo = [member for member in members if not is_done(member.run_dir)]
    show.say(f"{len(jobs)} runs in {root}, {len(jobs) - len(todo)} of them done")

    def train_all(some: Sequence[Member], until: Until | None) -> int:
        chosen = [by_run[member.run_dir] for member in some]
        if until is not None:
            chosen = [dataclasses.replace(job, until=str(until)) for job in chosen]
        return _in_turn(chosen) if arguments.jobs == 1 or len(chosen) < 2 else _side_by_side(chosen, arguments.jobs)

    options = {"halving": _halving(arguments, end, loaded, jobs), "metric": arguments.metric, "mode": arguments.mode}
    try:
        found, code = perform(members, root, train_all, **options)
    except ConfigError as error:
        raise of_explained(error) from error
    return _report(found, arguments) or code


def _halving(arguments: argparse.Namespace, end: Until | None, loaded: Loaded, jobs: Sequence[Job]) -> Halving | None:
    """Return the rungs of `--halving`, None without it."""
    if arguments.halving is None:
        return None
    if arguments.metric is None or arguments.halving < 2:
        raise UsageError("--halving keeps one run in two or more, by a metric", "--halving 3 --metric val/loss")
    last = end or run_command.adapted(loaded.make(jobs[0].plain), arguments).until
    try:
        ends = rungs(last, len(jobs), arguments.halving)
    except ConfigError as error:
        raise of_explained(error) from error
    return Halving(arguments.halving, ends, arguments.metric, arguments.mode)


def axes_of(pairs: Pairs, settings: Settings) -> dict[str, list[str]]:
    """Return the values of each setting that was given, in order.

    Raises:
        UsageError: a flag has no value.
    """
    found: dict[str, list[str]] = {}
    for name, text in pairs:
        if text is None:
            name, value = _switched(name, settings)
            found[name] = [value]
        else:
            found[name] = values_of(text, is_list=_takes_list(settings, name))
    return found


def _switched(name: str, settings: Settings) -> tuple[str, str]:
    """Return the setting that a flag without a value is of, and its text: `--clip`, `--no-clip`."""
    one = copy.copy(settings)
    one.plain = copy.deepcopy(settings.plain)
    one.read_flags([(name, None)])
    return (name[3:], "false") if name.startswith("no_") else (name, "true")


def values_of(text: str, *, is_list: bool = False) -> list[str]:
    """Return the values in a text, which are separated by commas outside of brackets; `a..b` is a range of integers.

    Args:
        text: text of a flag.
        is_list: whether a single value is a list; several lists are then written in brackets.

    Examples:
        >>> values_of("1e-4,1e-3"), values_of("0..3"), values_of("chain(scale(1), scale(2)),lion(1e-4)")
        (['1e-4', '1e-3'], ['0', '1', '2', '3'], ['chain(scale(1), scale(2))', 'lion(1e-4)'])
        >>> values_of("1,2", is_list=True), values_of("[1,2],[3]", is_list=True)
        (['1,2'], ['[1,2]', '[3]'])
    """
    if is_list and not text.strip().startswith("["):
        return [text]
    parts, depth = [""], 0
    for letter in text:
        depth += (letter in "([{") - (letter in ")]}")
        if letter == "," and depth == 0:
            parts.append("")
        else:
            parts[-1] += letter
    found = []
    for part in map(str.strip, parts):
        span = re.fullmatch(r"(-?\d+)\.\.(-?\d+)", part)
        if span is None:
            found.append(part)
            continue
        first, last = int(span[1]), int(span[2])
        found += map(str, range(first, last + 1) if first <= last else range(first, last - 1, -1))
    return found


def _takes_list(settings: Settings, name: str) -> bool:
    setting = next((setting for setting in settings.known if setting.name == name), None)
    return setting is not None and isinstance(settings.plain.get(name), list)


def _jobs(settings: Settings, axes: Axes, root: Path, arguments: argparse.Namespace) -> Iterator[Job]:
    for values, several in combinations(axes):
        one = copy.copy(settings)
        one.plain = copy.deepcopy(settings.plain)
        until = None if "until" in settings else values.get("until")
        one.read_flags([(name, text) for name, text in values.items() if name != "until" or until is None])
        shown = {name: values[name] for name in several}
        yield Job(shown, one.plain, until, root / name_of(shown), arguments)


# --- the runs ---------------------------------------------------------------------------------------------------------


def _train(job: Job) -> int:
    """Train one run, and return its exit code; an error does not end the sweep."""
    loaded = load(job.arguments.file)
    try:
        until = run_command.until_of({"until": job.until} if job.until is not None else {})
        experiment = run_command.adapted(loaded.make(job.plain), job.arguments, until)
        result = loaded.fit(
            experiment,
            run_dir=job.run_dir,
            loggers=run_command.loggers_of(job.arguments),
            strict=job.arguments.strict,
        )
    except (PurestepError, UsageError) as error:
        print(f"{job.run_dir}: {error}", file=sys.stderr)
        return 1
    except Exception:
        print(f"{job.run_dir}:", file=sys.stderr)
        traceback.print_exc()
        return 1
    return int(result.exit_code)


def _in_turn(jobs: Sequence[Job]) -> int:
    code = 0
    for number, job in enumerate(jobs):
        show.say(f"[{number + 1}/{len(jobs)}] {job.run_dir}")
        code = max(code, found := _train(job))
        if found in INTERRUPTED:
            break
    return code


def _side_by_side(jobs: Sequence[Job], workers: int) -> int:
    """Train in worker processes. On a signal the current runs save and stop, and no other run is started."""
    told: list[int] = []
    code, queue = 0, list(jobs)
    context = multiprocessing.get_context("spawn")
    pool = ProcessPoolExecutor(min(workers, len(jobs)), mp_context=context, initializer=_quiet, initargs=(jobs[0],))

    def forward(number: int, frame: FrameType | None) -> None:
        told.append(number)
        for process in multiprocessing.active_children():
            process.terminate() if len(told) == 1 else process.kill()

    before = {number: signal.signal(number, forward) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        with pool:
            going: dict[Future[int], Job] = {}
            while going or (queue and not told):
                while queue and not told and len(going) < workers:
                    job = queue.pop(0)
                    show.say(f"[{len(jobs) - len(queue)}/{len(jobs)}] {job.run_dir}")
                    going[pool.submit(_train, job)] = job
                for future in wait(going, return_when=FIRST_COMPLETED, timeout=0.5).done:
                    code = max(code, _result(future, going.pop(future)))
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
    return 128 + told[0] if told else code


def _quiet(job: Job) -> None:
    """Prepare a worker: Ctrl-C on the terminal reaches it through its parent only, and it shows no progress bar."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    run_command.prepare(job.arguments)
    with contextlib.suppress(UsageError):
        load(job.arguments.file)


def _result(future: Future[int], job: Job) -> int:
    try:
        return future.result()
    except BrokenProcessPool:
        print(f"{job.run_dir}: its process died", file=sys.stderr)
        return 1


def _report(found: Sweep, arguments: argparse.Namespace) -> int:
    """Print the table; return 1 if a run did not reach its end."""
    if arguments.json:
        show.as_json(
            [
                {
                    "run_dir": str(row.run_dir),
                    "values": dict(row.values),
                    "why": row.why,
                    "batches": None if row.summary is None else row.summary.batches,
                    "metrics": {} if row.summary is None else dict(row.summary.metrics),
                    "digest": "" if row.summary is None else row.summary.digest,
                }
                for row in found.rows
            ]
        )
    else:
        show.table(*found.columns())
    return int(not found.done)
