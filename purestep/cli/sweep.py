"""`purestep sweep`: an experiment under every combination of settings, each in a run directory of its own.

A run that reached its end is not started again, so the same command continues a sweep; one that was interrupted is
resumed from its last snapshot. Workers run one after the other in processes that have imported torch once.
"""

from __future__ import annotations

import argparse
import contextlib
import copy
import dataclasses
import itertools
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
from purestep.cli.load import load
from purestep.cli.usage import UsageError
from purestep.errors import PurestepError
from purestep.record.summary import is_run, summarize

Axes = Mapping[str, Sequence[str]]
_INTERRUPTED = {130: "SIGINT", 143: "SIGTERM"}
_ERROR = re.compile(r"[A-Za-z_.]*(Error|Exception|Interrupt|Exit)\b")


@dataclasses.dataclass(frozen=True)
class Job:
    """One run of a sweep, as a worker process gets it.

    Attributes:
        values: of the settings that the sweep changes, as text.
        plain: all settings, as JSON.
        until: an end of the run that is no setting, None where there is none.
        run_dir: of the run.
        arguments: of the command.
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
    if len({job.run_dir for job in jobs}) < len(jobs):
        raise UsageError("two runs of the sweep have the same settings", "each value once")
    # Every error of settings comes before the first run.
    for job in jobs:
        checked = copy.copy(settings)
        checked.plain = dict(job.plain)
        checked.check()
    run_command.until_of({"until": jobs[0].until} if jobs[0].until else {})
    todo = [job for job in jobs if not is_done(job.run_dir)]
    show.say(f"{len(jobs)} runs in {root}, {len(jobs) - len(todo)} of them done")
    code = _in_turn(todo) if arguments.jobs == 1 or len(todo) < 2 else _side_by_side(todo, arguments.jobs)
    return _report(jobs, arguments) or code


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
    """Return the values in a text: parted by commas outside of brackets, `a..b` for whole numbers.

    Args:
        text: of a flag.
        is_list: whether one value is a list itself: then each is in brackets.

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
    several = [name for name, values in axes.items() if len(values) > 1] or list(axes)
    for combination in itertools.product(*axes.values()):
        values = dict(zip(axes, combination, strict=True))
        one = copy.copy(settings)
        one.plain = copy.deepcopy(settings.plain)
        until = None if "until" in settings else values.get("until")
        one.read_flags([(name, text) for name, text in values.items() if name != "until" or until is None])
        shown = {name: values[name] for name in several}
        yield Job(shown, one.plain, until, root / name_of(shown), arguments)


def name_of(values: Mapping[str, str]) -> str:
    """Return the name of the directory of a run: the settings that differ.

    Examples:
        >>> name_of({"lr": "1e-3", "optimizer": "lion(1e-4)"})
        'lr=1e-3,optimizer=lion(1e-4)'
    """
    text = ",".join(f"{name}={value}" for name, value in values.items())
    return re.sub(r"[^\w.,=()+-]+", "_", text)[:200] or "run"


def is_done(run_dir: Path) -> bool:
    """Tell whether a run reached its end: it was neither interrupted, nor ended by an error."""
    if not is_run(run_dir):
        return False
    row = summarize(run_dir, run_dir.name)
    unfinished = row.why in ("not finished", "not started", *_INTERRUPTED.values())
    return not (unfinished or row.damage or _ERROR.match(row.why))


# --- the runs ---------------------------------------------------------------------------------------------------------


def _train(job: Job) -> int:
    """Train one run, and return its exit code; an error ends it alone."""
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
        if found in _INTERRUPTED:
            break
    return code


def _side_by_side(jobs: Sequence[Job], workers: int) -> int:
    """Train in worker processes. A signal reaches the runs that are going on, which save; no other is started."""
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
    """Prepare a worker: Ctrl-C on the terminal reaches it through the parent alone, and it draws no bar."""
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


def _report(jobs: Sequence[Job], arguments: argparse.Namespace) -> int:
    """Print the table; return 1 where a run did not reach its end."""
    rows = [(job, summarize(job.run_dir, job.run_dir.name) if is_run(job.run_dir) else None) for job in jobs]
    if arguments.json:
        show.as_json(
            [
                {
                    "run_dir": str(job.run_dir),
                    "values": dict(job.values),
                    "why": "not started" if row is None else row.why,
                    "batches": None if row is None else row.batches,
                    "metrics": {} if row is None else dict(row.metrics),
                    "digest": "" if row is None else row.digest,
                }
                for job, row in rows
            ]
        )
    else:
        metrics = list(dict.fromkeys(name for _, row in rows if row is not None for name in row.metrics))
        head = [*jobs[0].values, "why it ended", "batches", *metrics, "digest"]
        show.table(
            head,
            [
                [*job.values.values(), "not started", *[None] * (len(metrics) + 2)]
                if row is None
                else [*job.values.values(), row.why, row.batches, *map(row.metrics.get, metrics), row.digest[:8]]
                for job, row in rows
            ],
        )
    return int(not all(is_done(job.run_dir) for job in jobs))
