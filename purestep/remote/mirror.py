"""`Mirror`: keeps the copy of one run directory up to date, in a thread of its own, while the run goes on.

It compares what is on the disk with what is there, and copies what a policy selects and is missing; so an outage is
made up for by the next comparison. A copy is deleted only when the newest snapshot on the disk is there, too.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from purestep.errors import SnapshotError, explain
from purestep.remote import copies as copies_
from purestep.remote import pull
from purestep.remote.copies import Copy, RunFiles
from purestep.remote.files import Files
from purestep.snapshot.listing import DIRECTORY, Entry, Index
from purestep.snapshot.retention import Keep
from purestep.snapshot.writer import Follower

# A comparison that failed is made again after so many seconds, or with the next snapshot.
RETRY_SECONDS = 30.0
# The lock is of this machine; the services of these two keep their own copy of what is in their directories.
EXCLUDED = (DIRECTORY, "lock", "lock.lease", "wandb", "mlruns")


class Mirror(Follower):
    """The copy of one run directory. It follows a `Store`, on the rank that commits.

    Args:
        connect: opens the place, given an event that is set when the run gives up.
        run_dir: the run directory, which has one writer.
        keep_here: preservation policy of the store.
        keep_there: that of the copy.
    """

    def __init__(self, connect: Callable[[threading.Event], Files], run_dir: Path, keep_here: Keep, keep_there: Keep):
        self.run_dir = run_dir
        self._connect, self._keep_here, self._keep_there = connect, keep_here, keep_there
        self._index = Index(run_dir / DIRECTORY)
        self._halted = threading.Event()
        self._files: Files | None = None
        self._copies: list[Copy] | None = None  # what is there; None where that is not known
        self._record: RunFiles | None = None
        self._state = threading.Lock()  # guards what follows, which both threads use
        self._thread: threading.Thread | None = None
        self._again = False
        self._reading: Path | None = None
        self._waiting: Path | None = None
        self._copied: list[int] = []
        self._lost: str | None = None
        self._failed_at: float | None = None

    @property
    def files(self) -> Files:
        if self._files is None:
            self._files = self._connect(self._halted)
        return self._files

    # --- the beginning of a run ---------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the steps of the copies.

        Raises:
            Unreachable: the place does not answer.
        """
        if self._copies is None:
            self._copies = copies_.listed(self.files)
        return sorted(copies_.current(self._copies))

    def read(self, name: str) -> bytes | None:
        """Return the content of a file of the run directory as it is there; None where there is none."""
        content = (self._told().files or {}).get(name)
        return None if content is None else self.files.read(f"{copies_.RECORD}/{content.name}")

    def pull(self, step: int | None) -> list[int]:
        """Bring a snapshot and the record here, and what the policy of the store selects besides; see `pull.pull`."""
        self.steps()
        return pull.pull(self.files, self._copies or [], self._told(), self.run_dir, self._keep_here, step=step)

    def _told(self) -> RunFiles:
        if self._record is None:
            self._record = copies_.record(self.files)
        return self._record

    # --- following a store --------------------------------------------------------------------------------------------

    def became_durable(self, directory: Path) -> None:
        """Copy a new snapshot as soon as the one before it is copied."""
        with self._state:
            self._waiting = directory
        self.start()

    def holds(self, directory: Path) -> bool:
        """Tell whether a snapshot is being copied, or is the next to be."""
        with self._state:
            return directory in (self._reading, self._waiting)

    def start(self) -> None:
        """Compare and copy, in the background; once more where that is going on."""
        with self._state:
            self._again, self._failed_at = True, None
            if self._thread is None:
                # A daemon: a process that exits does not wait for a place that does not answer. What it interrupts is
                # not listed there.
                self._thread = threading.Thread(target=self._work, name="purestep-remote", daemon=True)
                self._thread.start()

    def report(self) -> dict[str, Any]:
        """Return what has happened since the last report, as JSON: steps copied, a failure, whether more may come."""
        with self._state:
            due = self._failed_at is not None and time.monotonic() - self._failed_at >= RETRY_SECONDS
        if due:
            self.start()
        with self._state:
            told = {"copied": self._copied, "lost": self._lost}
            self._copied, self._lost = [], None
            return {**told, "busy": self._thread is not None or self._failed_at is not None}

    def wait(self, seconds: float) -> bool:
        """Wait until the thread is done, so many seconds at most; tell whether it is."""
        with self._state:
            thread = self._thread
        if thread is not None:
            thread.join(min(seconds, threading.TIMEOUT_MAX))
        return thread is None or not thread.is_alive()

    def close(self, seconds: float) -> str | None:
        """Copy what the run has written last, and end; return what went wrong, None for nothing."""
        self.start()
        if not self.wait(seconds):
            self._halted.set()
            return explain("the remote copy was given up", where=self.files.url, why=f"{seconds:.0f} s were not enough")
        return self.report()["lost"]

    # --- the thread ---------------------------------------------------------------------------------------------------

    def _work(self) -> None:
        while True:
            with self._state:
                if not self._again:
                    self._thread = None
                    return
                self._again = False
            try:
                self.update()
            except Exception as error:
                self._copies = self._record = None  # what is there now is not known
                with self._state:
                    self._lost, self._failed_at = _lost(error, self.run_dir), time.monotonic()
                    self._waiting = self._thread = None
                    return

    def update(self, *, prune: bool = True) -> None:
        """Copy what is missing there, the newest snapshot first, and delete what the policy does not select."""
        fresh = self._copies is None
        self.steps()
        if prune and fresh:
            copies_.remove_incomplete(self.files, self._copies or [])
        while True:
            # Before the snapshots: a copy of a snapshot never knows more than the copy of the log.
            self._record = copies_.upload_record(self.files, self.run_dir, self._told(), EXCLUDED)
            entry = self._next()
            if entry is None:
                break
            self._upload(entry)
        if prune:
            self._prune()

    def _upload(self, entry: Entry) -> None:
        copies = self._copies = self._copies or []
        with self._state:
            self._reading = entry.path
        try:
            copies.append(copies_.upload(self.files, entry.path, [copy.name for copy in copies]))
        except FileNotFoundError:
            # The writer has deleted it, as the policy wants; else it is the place that is missing.
            if entry.path.exists():
                raise
            return
        finally:
            with self._state:
                self._waiting = None if self._waiting == entry.path else self._waiting
                self._reading = None
        copies.sort(key=lambda copy: (copy.header.step, copy.revision))
        with self._state:
            self._copied.append(entry.step)

    def _selected(self) -> tuple[dict[int, Entry], set[int]]:
        """Return the snapshots on the disk, and the steps that are to be there."""
        here = {entry.step: entry for entry in self._index.entries() if entry.header is not None}
        newest = max(here, default=-1)
        known = {step: metrics for step, metrics in copies_.records(self._copies or []) if step <= newest}
        known |= {step: entry.header.metrics for step, entry in here.items() if entry.header is not None}
        return here, self._keep_there.select(sorted(known.items())) | {newest}

    def _is_there(self, entry: Entry) -> bool:
        copy = copies_.current(self._copies or []).get(entry.step)
        header = entry.header
        return copy is not None and header is not None and _same(copy, header.digest, header.created)

    def _next(self) -> Entry | None:
        here, selected = self._selected()
        missing = [step for step, entry in here.items() if step in selected and not self._is_there(entry)]
        return here[max(missing)] if missing else None

    def _prune(self) -> None:
        here, selected = self._selected()
        if not here or not self._is_there(here[max(here)]):
            return
        valid, before = copies_.current(self._copies or []), len(self._copies or [])
        for copy in list(self._copies or []):
            # Copies of later steps are of a history that the run has gone back from.
            if copy.header.step not in selected or valid[copy.header.step] is not copy:
                copies_.remove(self.files, copy.name)
                (self._copies or []).remove(copy)
        if len(self._copies or []) < before:
            copies_.remove_unused_bases(self.files, self._copies or [])


def _same(copy: Copy, digest: str, created: float) -> bool:
    return copy.header.digest == digest and copy.header.created == created


def _lost(error: Exception, run_dir: Path) -> str:
    if isinstance(error, SnapshotError):
        return str(error)
    why = f"{type(error).__name__}: {str(error)[:300]}"
    return explain("the remote copy could not be brought up to date", where=str(run_dir), why=why)
