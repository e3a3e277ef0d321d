"""Messages between the ranks of one save, in the background: small files in its temporary directory.

A background thread must not launch collectives, because those of the training thread would be matched with them. Every
file carries the token of the save, appears complete or not at all, and is removed before the snapshot is committed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from pathlib import Path

from purestep.errors import PurestepError, SnapshotError, explain
from purestep.snapshot import durable_directories
from purestep.snapshot.codec import JSON
from purestep.snapshot.manifest import seal, unseal
from purestep.snapshot.processes import Ranks

_DIRECTORY = "ranks"
_FIRST_WAIT, _LONGEST_WAIT = 0.002, 0.1  # seconds between two polls
_HURRY = 10.0  # seconds to wait for other ranks once this process ends on an error


class Abandoned(PurestepError):
    """Another rank has abandoned this save, and reports the reason itself."""


def make_temporary(root: Path, step: int, token: str, ranks: Ranks, *, parents: bool = True) -> Path:
    """Make the temporary directory of a save durably, on rank 0; return its path on any rank.

    Rank 0 makes it before the others get the token, so that no rank can make it again after rank 0 has abandoned it.

    Args:
        root: the directory of snapshots.
        step: of the save.
        token: unique to this save.
        ranks: this process among the others.
        parents: whether missing parent directories of the root may be made; else one that is missing is an error.
    """
    temporary = durable_directories.temporary_path(root, str(step), token)
    if ranks.rank == 0 and not temporary.exists():
        durable_directories.make_root(root, parents=parents)
        try:
            durable_directories.begin(root, str(step), token)
            (temporary / "parts").mkdir()
            if ranks.size > 1:
                (temporary / _DIRECTORY).mkdir()
        except OSError:
            durable_directories.abandon(temporary)
            raise
    return temporary


class Messages:
    """One rank's messages in a save. With one rank it writes no file and waits for nothing.

    Args:
        temporary: the directory that all ranks of the save write into.
        step: of the save, for error messages.
        ranks: this process among the others.
        hurry: set when this process ends on an error, so that the others may have died.
    """

    def __init__(self, temporary: Path, step: int, ranks: Ranks, hurry: threading.Event) -> None:
        self.temporary, self.step, self.ranks, self.hurry = temporary, step, ranks, hurry
        self.directory = temporary / _DIRECTORY
        self.token = temporary.name

    def open(self) -> None:
        """Make the directory of this rank's messages; an error if rank 0 has abandoned the save already."""
        if self.ranks.size > 1:
            # Not `parents=True`: a rank must not bring a directory back to life that rank 0 has removed.
            (self.directory / str(self.ranks.rank)).mkdir()

    def send(self, name: str, body: JSON) -> None:
        """Write a message for the other ranks, durably."""
        if self.ranks.size > 1:
            path = self.directory / str(self.ranks.rank) / name
            unfinished = path.with_name(f"{name}.new")
            unfinished.write_bytes(seal({"token": self.token, "body": body}))
            # Synced before the rename: on a network file system another host may see the name before the bytes.
            durable_directories.fsync(unfinished)
            os.rename(unfinished, path)

    def receive(self, ranks: list[int], name: str) -> dict[int, JSON]:
        """Wait for a message of each of some ranks, and return the messages by rank.

        Raises:
            Abandoned: a rank has failed.
            SnapshotError: a rank has not sent its message in time; the error names it and the step.
        """
        start, pause = time.monotonic(), _FIRST_WAIT
        received: dict[int, JSON] = {}
        while True:
            for rank in [rank for rank in ranks if rank not in received]:
                path = self.directory / str(rank) / name
                # A message is looked for first: a rank may send it and fail afterwards, and its message still counts.
                if path.exists():
                    received[rank] = self._read(path)
                elif path.parent.with_suffix(".failed").exists() or not self.temporary.exists():
                    raise Abandoned(f"rank {rank} gave up the save of step {self.step}")
            missing = [rank for rank in ranks if rank not in received]
            if not missing:
                return received
            # Read in each round: the process may begin to end on an error while this thread waits.
            limit = min(_HURRY, self.ranks.timeout) if self.hurry.is_set() else self.ranks.timeout
            if time.monotonic() - start >= limit:
                raise SnapshotError(self._late(missing, time.monotonic() - start))
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT)

    def _read(self, path: Path) -> JSON:
        content = unseal(path.read_bytes(), str(path))
        if content["token"] != self.token:
            raise SnapshotError(explain("a message belongs to another save", where=str(path)))
        return content["body"]

    def _late(self, missing: list[int], seconds: float) -> str:
        names = "rank " + ", ".join(str(rank) for rank in missing)
        return explain(
            f"{names} did not write its shards of step {self.step} within {seconds:.0f} s",
            where=f"rank {self.ranks.rank} of {self.ranks.size} waited in {self.directory}",
            why="it has died, is slower than that, or does not see this directory",
            instead="Ranks(..., timeout=) if it is slow; all ranks write to one shared file system",
        )

    def is_abandoned(self) -> bool:
        """Tell whether rank 0 has abandoned this save."""
        return self.ranks.rank > 0 and not self.directory.exists()

    def close(self) -> None:
        """Remove the messages of all ranks."""
        shutil.rmtree(self.directory, ignore_errors=True)

    def abandon(self) -> None:
        """Signal to the other ranks that this rank has failed: by a rename, which works on a full disk too."""
        if self.ranks.rank == 0:
            # Renamed at once, so that the others see it end; removing all its files may take long.
            with contextlib.suppress(OSError):
                durable_directories.abandon(durable_directories.rename_to_temporary(self.temporary))
            durable_directories.abandon(self.temporary)
        elif self.ranks.size > 1:
            messages = self.directory / str(self.ranks.rank)
            with contextlib.suppress(OSError):
                os.rename(messages, messages.with_suffix(".failed"))
