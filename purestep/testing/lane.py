"""One run directory of the fault harness: a sequence of processes in it, and the checks after each.

Owns the checks: which snapshots are durable, that a run resumes from the newest of them, the final digest, and that no
partly written files stay.
"""

from __future__ import annotations

import contextlib
import dataclasses
import json
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from purestep.loop.resume import store_root
from purestep.snapshot.listing import Index
from purestep.testing import child, phases
from purestep.testing.zygote import Child, Zygotes

_HALVES = ("*.purestep-tmp-*", "*.partial")
_KILLED = -9
_LONG = 120.0  # seconds after which a process is taken to hang


@dataclasses.dataclass(frozen=True)
class Job:
    """The training: a function in a file, or the file as a script."""

    file: Path
    function: str | None
    args: tuple[str, ...]


@dataclasses.dataclass(frozen=True)
class Outcome:
    """The result of a process: its exit code (None if it hung), and its reported facts, in order."""

    code: int | None
    facts: Sequence[tuple[str, Any]]
    stderr: str

    def values(self, kind: str) -> list[Any]:
        """Return the reported values of one kind."""
        return [value for name, value in self.facts if name == kind]


@dataclasses.dataclass(frozen=True)
class Straight:
    """The undisturbed run, the reference of all comparisons.

    Attributes:
        digest: digest of its last snapshot.
        log: content of its `metrics.csv`; None without one.
        operations: its operations on the disk, in order; see `phases.fine`.
        seconds: its duration.
        batches: number of batches.
        nbytes: bytes of all its files.
    """

    zygotes: Zygotes
    job: Job
    digest: str
    log: bytes | None
    operations: tuple[str, ...]
    seconds: float
    batches: int
    nbytes: int = 0

    @classmethod
    def of(cls, zygotes: Zygotes, job: Job, place: Path) -> Straight:
        """Run the job twice.

        Raises:
            AssertionError: the job fails, takes no snapshot, or has other bits the second time.
        """
        found = []
        for number in (1, 2):
            lane = Lane(cls(zygotes, job, "", None, (), 60.0, 0), place.with_name(f"{place.name}-{number}"))
            began = time.monotonic()
            trace = {"do": "trace", "run_dir": str(lane.run_dir)}
            outcome = lane.go(trace, {"do": "count"}, verify=True)
            seconds, digests = time.monotonic() - began, outcome.values("digest")
            if outcome.code != 0 or not digests:
                raise AssertionError(
                    f"the undisturbed run failed with exit code {outcome.code}\n{outcome.stderr[-3000:]}"
                )
            operations, batches = tuple(outcome.values("os")), max(outcome.values("batches"), default=0)
            nbytes = sum(path.stat().st_size for path in lane.run_dir.rglob("*") if path.is_file())
            found.append(cls(zygotes, job, digests[0], lane.log(), operations, seconds, batches, nbytes))
        if found[0].digest != found[1].digest:
            raise AssertionError(
                "the undisturbed run gave other bits the second time, so nothing can be compared with it"
            )
        return found[1]

    @property
    def save_phases(self) -> tuple[str, ...]:
        """The distinct operations within saves."""
        return tuple(dict.fromkeys(name for name in self.operations if phases.in_save(name)))


class Lane:
    """A run directory, `run`, in a separate folder.

    Attributes:
        injected: number of faults that were injected.
        lost: number of durable snapshots from which a run did not resume after a fault.
        right: whether the run has ended with the right digest.
        problems: descriptions of failures.
    """

    def __init__(self, base: Straight, place: Path, *, logged: bool = True) -> None:
        self.base, self.place, self.logged = base, place, logged
        self.run_dir = place / "run"
        self.shadow = place.with_name(f"{place.name}.shadow")
        self.mend: Callable[[], None] = lambda: None  # repairs the disk after each process
        self.injected = self.lost = self._processes = 0
        self.right = False
        self._digest: str | None = None
        self.problems: list[str] = []
        place.mkdir(parents=True, exist_ok=True)

    # --- processes ----------------------------------------------------------------------------------------------------

    def begin(self, *shims: Mapping[str, Any], stdout: str = "", verify: bool = False) -> tuple[Child, Path]:
        """Start a process; return it and the file of its report.

        Args:
            shims: the faults to inject.
            stdout: "closed" from the start, "broken" (a pipe without a reader), or a path.
            verify: whether to read the last snapshot back after a successful end.
        """
        self._processes += 1
        report = self.place.with_name(f"{self.place.name}.report-{self._processes}")
        job, where = self.base.job, str(self.run_dir)
        order = {
            "file": str(job.file),
            "function": job.function,
            "argv": [arg.replace("{run_dir}", where) for arg in job.args],
            "report": str(report),
            "shims": shims,
            "stdout": stdout,
            "verify": where if verify else "",
        }
        with _stream(stdout) as stream:
            started = self.base.zygotes.popen(child.CODE, json.dumps(order), stdout=stream, preload=child.PRELOAD)
        return started, report

    def outcome(self, process: Child, report: Path) -> Outcome:
        """Wait for a process, and read its report."""
        code: int | None
        with process:
            try:
                _, error = process.communicate(_LONG)
                code = process.wait()
            except subprocess.TimeoutExpired:
                code, error = None, f"it did not end within {_LONG:g} seconds"
        outcome = Outcome(code, facts_of(report), error)
        report.unlink(missing_ok=True)
        return outcome

    def go(
        self,
        *shims: Mapping[str, Any],
        codes: Sequence[int] | None = None,
        kill_after: float | None = None,
        stdout: str = "",
        verify: bool = False,
        damaged: Sequence[int] = (),
    ) -> Outcome:
        """Run a process to its end, and check the snapshot from which it resumed.

        Args:
            shims: the faults to inject.
            codes: the expected exit codes.
            kill_after: seconds after which the process gets SIGKILL.
            stdout, verify: see `begin`.
            damaged: snapshots that the fault has damaged, so that a run may resume from the previous one.
        """
        before = self.durable()
        process, report = self.begin(*shims, stdout=stdout, verify=verify)
        if kill_after is not None:
            try:
                process.wait(kill_after)
            except subprocess.TimeoutExpired:
                process.kill()
        outcome = self.outcome(process, report)
        self.mend()
        # The process may have ended before it is killed.
        kills = outcome.values("injected").count("kill") + (kill_after is not None)
        self.injected += len(outcome.values("injected")) + (kill_after is not None)
        self.injected -= 0 if outcome.code == _KILLED else kills
        self._check_begin(outcome, before, damaged)
        self._digest = next(iter(outcome.values("digest")), None)
        if outcome.code is None or (codes is not None and outcome.code not in codes):
            self.problems.append(f"exit code {outcome.code}, not {codes}\n{outcome.stderr[-2000:]}")
        return outcome

    def _check_begin(self, outcome: Outcome, before: list[int], damaged: Sequence[int]) -> None:
        good = [step for step in before if step not in damaged]
        for at in outcome.values("resumed"):
            if (at is None and good) or (at is not None and good and at < good[-1]):
                self.lost += 1
                self.problems.append(f"resumed from {at}, and snapshots {before} were there\n{outcome.stderr[-2000:]}")
        gone = [step for step in good[-1:] if max(self.durable(), default=-1) < step]
        if gone:
            self.lost += 1
            self.problems.append(f"snapshot {gone[0]} has gone, and no later one is there")

    def end(self, *shims: Mapping[str, Any], damaged: Sequence[int] = ()) -> None:
        """Run the job undisturbed to its end, unless it has ended already, and compare."""
        if not self.complete:
            self.go(*shims, codes=(0,), verify=True, damaged=damaged)
        halves = [str(path) for pattern in _HALVES for path in self.run_dir.rglob(pattern)]
        halves += [str(entry.path) for entry in Index(store_root(self.run_dir)).superseded()]
        if halves:
            self.problems.append(f"half-written at the end: {halves}")
        if self.logged and self.log() != self.base.log:
            self.problems.append("metrics.csv differs from that of the undisturbed run")
        if self._digest != self.base.digest:
            self.problems.append(f"digest {self._digest}, not {self.base.digest}")
        self.right = self._digest == self.base.digest and not halves
        shutil.rmtree(self.run_dir, ignore_errors=True)
        shutil.rmtree(self.shadow, ignore_errors=True)
        with contextlib.suppress(OSError):
            self.place.rmdir()

    @property
    def complete(self) -> bool:
        """Whether a process has run the job to its end and read the last snapshot back."""
        return self._digest is not None

    # --- files on the disk ------------------------------------------------------------------------------------------

    def durable(self) -> list[int]:
        """Return the steps of the snapshots that are complete on the disk, in order."""
        return Index(store_root(self.run_dir)).steps()

    def log(self) -> bytes | None:
        """Return the content of `metrics.csv`, None when there is none."""
        path = self.run_dir / "metrics.csv"
        return path.read_bytes() if path.exists() else None


@contextlib.contextmanager
def _stream(stdout: str) -> Iterator[int]:
    """Yield the descriptor of a process's standard output, for `zygote`."""
    if stdout in ("", "closed"):
        yield subprocess.PIPE
        return
    if stdout == "broken":
        read, descriptor = os.pipe()
        os.close(read)
    else:
        descriptor = os.open(stdout, os.O_WRONLY)
    try:
        yield descriptor
    finally:
        os.close(descriptor)


def facts_of(report: Path) -> list[tuple[str, Any]]:
    """Return the facts that a process has reported so far."""
    try:
        text = report.read_text()
    except FileNotFoundError:
        return []
    return [tuple(json.loads(line)) for line in text.splitlines() if line.endswith("]")]
