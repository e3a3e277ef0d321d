"""The fault harness: run a training in separate processes, inject a fault, run it again, compare the bits.

`check_faults` takes a function or a script and returns a table: fault, times injected, runs that ended with the digest
of the undisturbed run, snapshots lost (0). `injections` has the faults; `zygote` forks the processes, which run `child`
and are patched by `shims`.
"""

from __future__ import annotations

import contextlib
import dataclasses
import inspect
import queue
import re
import sys
import tempfile
import time
import zlib
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from purestep.arguments import checked
from purestep.errors import ConfigError, explain
from purestep.testing import injections
from purestep.testing.lane import Job, Lane, Straight
from purestep.testing.trial import Fault, Trial
from purestep.testing.zygote import Zygotes

FAULTS: Mapping[str, Fault] = {fault.name: fault for fault in injections.ALL}


@dataclasses.dataclass(frozen=True)
class Row:
    """The results of one fault.

    Attributes:
        fault: name of the fault.
        injected: number of times it was injected.
        runs: number of disturbed runs that then finished.
        right: number of these runs with the digest of the undisturbed run and no partly written files.
        lost: number of snapshots that were durable before a fault and unreadable after it.
        problems: descriptions of failures.
        phases: number of moments of a save at which the fault was injected, and of all moments; None for other faults.
        why_not: why the fault cannot be injected on this machine; "" if it was.
    """

    fault: str
    injected: int
    runs: int
    right: int
    lost: int
    problems: tuple[str, ...] = ()
    phases: tuple[int, int] | None = None
    why_not: str = ""

    @property
    def ok(self) -> bool:
        """Whether the fault was injected at all intended moments without a failure."""
        everywhere = self.phases is None or self.phases[0] == self.phases[1]
        harmless = self.right == self.runs and not self.lost and not self.problems
        return self.injected > 0 and self.runs > 0 and everywhere and harmless

    def __str__(self) -> str:
        """The note of the row beside its numbers."""
        if self.why_not:
            return f"not here: {self.why_not}"
        if not self.ok:
            return "FAILED"
        return "" if self.phases is None else f"at all {self.phases[1]} moments of a save"


@dataclasses.dataclass(frozen=True)
class Report:
    """The table of `check_faults`."""

    rows: tuple[Row, ...]
    digest: str
    seconds: float

    @property
    def ok(self) -> bool:
        """Whether no fault that can be injected on this machine caused a failure."""
        return all(row.ok for row in self.rows if not row.why_not)

    def __str__(self) -> str:
        head = ("fault", "injected", "right digest", "data lost", "")
        cells = [
            (r.fault, *(("-",) * 3 if r.why_not else (str(r.injected), f"{r.right} of {r.runs}", str(r.lost))), str(r))
            for r in self.rows
        ]
        total = [sum(getattr(r, name) for r in self.rows) for name in ("injected", "right", "runs", "lost")]
        all_of = f"{total[1]} of {total[2]}"
        cells.append(("all", str(total[0]), all_of, str(total[3]), "" if self.ok else "FAILED"))
        widths = [max(len(row[i]) for row in (head, *cells)) for i in range(4)]
        lines = [
            "  ".join(
                [row[0].ljust(widths[0]), *(c.rjust(w) for c, w in zip(row[1:4], widths[1:], strict=True)), row[4]]
            )
            for row in (head, *cells)
        ]
        lines = [line.rstrip() for line in lines]
        lines.insert(1, "-" * max(map(len, lines)))
        lines += [f"\n{row.fault}: {problem}" for row in self.rows for problem in row.problems]
        return "\n".join([*lines, f"digest of the undisturbed run {self.digest}, {self.seconds:.0f} s"])


@checked(ConfigError, failed=True)
def check_faults(
    target: Callable[[Path], Any] | str | Path,
    *,
    args: Sequence[str] = ("{run_dir}",),
    with_workers: Callable[[Path], Any] | str | Path | None = None,
    faults: Sequence[str] | None = None,
    times: Mapping[str, int] | None = None,
    seed: int = 0,
    directory: str | Path | None = None,
    jobs: int = 1,
    progress: Callable[[Row], None] | None = None,
) -> Report:
    """Prove that a training survives faults: inject many, run it again each time, and compare the bits.

    The training must be quick (a second, not a minute), because it runs several hundred times, and deterministic:
    `ps.fit(..., run_dir=run_dir)` with a `snapshots` callback that fires several times.

    Faults of the disk use the operating system: file size limits, permissions, system calls that the kernel refuses
    (Linux), and, for root on Linux, small file systems that are mounted in the directory of the runs and unmounted
    again. The table names the faults that this machine cannot inject.

    Args:
        target: a function at the top level of a module, called with the run directory, which returns the `Result` (or
            an exit code); or the path of a script, which gets `args`.
        args: arguments of a script; `{run_dir}` is replaced by the run directory.
        with_workers: the same training with worker processes; without it the fault that kills a worker is left out.
        faults: names from `FAULTS`; all by default.
        times: number of injections of each fault; by default that of the fault.
        seed: seed of the random moments.
        directory: directory of the runs; a temporary one by default.
        jobs: number of faults tried in parallel.
        progress: called with each complete row of the table.

    Returns:
        Report: prints as the table; `report.ok` is whether every run ended with the right digest.

    Raises:
        ConfigError: an unknown fault, or a target that cannot be run in another process.
        AssertionError: the undisturbed training fails, or has other bits the second time.
    """
    unknown = [name for name in faults or () if name not in FAULTS]
    if unknown:
        raise ConfigError(
            explain(f"there is no fault {unknown[0]!r}", where=f"faults={faults!r}", why=", ".join(FAULTS))
        )
    chosen = [FAULTS[name] for name in faults] if faults is not None else list(FAULTS.values())
    job, other = _job(target, args), None if with_workers is None else _job(with_workers, args)
    if isinstance(jobs, bool) or not isinstance(jobs, int) or jobs < 1:
        raise ConfigError(
            explain("faults are tried one at a time, or several", where=f"jobs={jobs!r}", instead="jobs=2")
        )
    began = time.monotonic()
    with tempfile.TemporaryDirectory(prefix="purestep-faults-") as temporary, contextlib.ExitStack() as stack:
        root = Path(directory or temporary).absolute()
        zygotes = [stack.enter_context(Zygotes()) for _ in range(jobs)]
        straight = Straight.of(zygotes[0], job, root / "straight")
        worked = None if other is None else Straight.of(zygotes[0], other, root / "straight-with-workers")
        bases = {fault: worked if fault.needs_workers else straight for fault in chosen}
        rows = _rows({fault: base for fault, base in bases.items() if base}, zygotes, root, seed, times or {}, progress)
    return Report(rows, straight.digest, time.monotonic() - began)


def _rows(
    bases: Mapping[Fault, Straight],
    zygotes: Sequence[Zygotes],
    root: Path,
    seed: int,
    times: Mapping[str, int],
    progress: Callable[[Row], None] | None,
) -> tuple[Row, ...]:
    """Yield the row of each fault; as many faults run in parallel as there are zygotes."""
    free: queue.SimpleQueue[Zygotes] = queue.SimpleQueue()
    for zygote in zygotes:
        free.put(zygote)

    def row(fault: Fault) -> Row:
        zygote = free.get()
        try:
            base = dataclasses.replace(bases[fault], zygotes=zygote)
            return _row(fault, base, root, seed, times.get(fault.name, fault.times))
        finally:
            free.put(zygote)

    with ThreadPoolExecutor(len(zygotes)) as pool:
        tried = [pool.submit(row, fault) for fault in bases]
        for done in as_completed(tried):
            if progress is not None:
                progress(done.result())
    return tuple(one.result() for one in tried)


def _row(fault: Fault, base: Straight, root: Path, seed: int, times: int) -> Row:
    if why_not := fault.why_not():
        return Row(fault.name, 0, 0, 0, 0, why_not=why_not)
    lanes: list[Lane] = []
    name = re.sub(r"\W+", "-", fault.name).strip("-")

    def lane() -> Lane:
        made = Lane(base, root / f"{name}-{len(lanes)}", logged=fault.logged)
        lanes.append(made)
        return made

    with contextlib.ExitStack() as stack:
        trial = Trial(lane, base, zlib.crc32(f"{seed} {fault.name}".encode()), times, stack)
        fault.inject(trial)
    problems = tuple(problem for one in lanes for problem in one.problems)
    return Row(
        fault.name,
        sum(one.injected for one in lanes),
        len(lanes),
        sum(one.right for one in lanes),
        sum(one.lost for one in lanes),
        problems[:5],
        trial.reached,
    )


def _job(target: object, args: Sequence[str]) -> Job:
    if isinstance(target, (str, Path)):
        return Job(Path(target).absolute(), None, tuple(args))
    name, module = getattr(target, "__qualname__", ""), sys.modules.get(getattr(target, "__module__", ""))
    file = getattr(module, "__file__", None)
    if not name.isidentifier() or file is None or not inspect.isfunction(target):
        raise ConfigError(
            explain(
                "the training is run in processes of its own, so it has to be found by name",
                where=f"target={target!r}",
                instead="def train(run_dir): ...   # at the top level of a file, or the path of a script",
            )
        )
    return Job(Path(file).absolute(), name, ("{run_dir}",))
