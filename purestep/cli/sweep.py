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
from purestep.loop.result import Result
from purestep.loop.run import Run
from purestep.record.experiment import Experiment
from purestep.tune.grid import Member, combinations, name_of
from purestep.tune.halving import Halving, rungs
from purestep.tune.perform import perform
from purestep.tune.table import Sweep, is_done
from purestep.tune.together import Together, trains

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
    if arguments.vmap and arguments.jobs > 1:
        raise UsageError("--vmap trains runs together in one process, --jobs in several", "one of the two")
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

    work = _Work(loaded, by_run)
    together = Together(members, work.make, work.start) if arguments.vmap else None
    in_turn = trains(together, work.alone, work.code_of)

    def train_all(todo: Sequence[Member], rung: Sequence[Member], until: Until | None) -> int:
        if arguments.jobs == 1 or len(todo) < 2:
            return in_turn(todo, rung, until)
        return _side_by_side([work.job(member, until) for member in todo], arguments.jobs)

    options = {"halving": _halving(arguments, end, loaded, jobs), "metric": arguments.metric, "mode": arguments.mode}
    try:
        found, code = perform(members, root, train_all, **options)
    except ConfigError as error:
        raise of_explained(error) from error
    return _report(found if together is None else together.told(found, members), arguments) or code


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


@dataclasses.dataclass(frozen=True)
class _Work:
    """How the runs of a sweep are made and trained in this process.

    Attributes:
        loaded: the experiment.
        jobs: by run directory.
    """

    loaded: Loaded
    jobs: Mapping[Path, Job]

    def job(self, member: Member, until: Until | None) -> Job:
        job = self.jobs[member.run_dir]
        return job if until is None else dataclasses.replace(job, until=str(until))

    def make(self, member: Member) -> Experiment:
        return _made(self.loaded, self.jobs[member.run_dir])

    def start(self, member: Member, experiment: Experiment, until: Until | None) -> Run:
        job = self.jobs[member.run_dir]
        show.say(f"{job.run_dir}: together with others")
        return self.loaded.run(experiment, **_options(job), **({} if until is None else {"until": until}))

    def alone(self, member: Member, until: Until | None) -> Result | Exception:
        show.say(f"[{list(self.jobs).index(member.run_dir) + 1}/{len(self.jobs)}] {member.run_dir}")
        return _trained(self.loaded, self.job(member, until))

    def code_of(self, member: Member, result: Result | Exception) -> int:
        return _code_of(self.jobs[member.run_dir], result)


def _made(loaded: Loaded, job: Job) -> Experiment:
    until = run_command.until_of({"until": job.until} if job.until is not None else {})
    return run_command.adapted(loaded.make(job.plain), job.arguments, until)


def _options(job: Job) -> dict[str, Any]:
    loggers = run_command.loggers_of(job.arguments)
    return {"run_dir": job.run_dir, "loggers": loggers, "strict": job.arguments.strict}


def _trained(loaded: Loaded, job: Job) -> Result | Exception:
    """Train one run alone; return its result, or the error that ended it."""
    try:
        return loaded.fit(_made(loaded, job), **_options(job))
    except Exception as error:
        return error


def _code_of(job: Job, result: Result | Exception) -> int:
    """Return the exit code of a run, and print the error that ended it; an error does not end the sweep."""
    if not isinstance(result, Exception):
        return int(result.exit_code)
    if isinstance(result, (PurestepError, UsageError)):
        print(f"{job.run_dir}: {result}", file=sys.stderr)
    else:
        print(f"{job.run_dir}:", file=sys.stderr)
        traceback.print_exception(result)
    return 1


def _train(job: Job) -> int:
    """Train one run in a worker process, and return its exit code."""
    return _code_of(job, _trained(load(job.arguments.file), job))


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
                    **({"how": row.how} if row.how else {}),
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
