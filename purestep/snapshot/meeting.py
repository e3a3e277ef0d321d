"""How the ranks of one save follow each other in the background: through small files in its temporary directory.

A background thread must not use collectives, because the training of its process does. Every file carries a token of
the save, appears whole or not at all, and is gone before the snapshot is committed.
"""

from __future__ import annotations

import contextlib
import os
import shutil
import threading
import time
from pathlib import Path

from purestep.errors import PurestepError, SnapshotError, explain
from purestep.snapshot import disk
from purestep.snapshot.codec import JSON
from purestep.snapshot.manifest import seal, unseal
from purestep.snapshot.ranks import Ranks

_PLACE = "ranks"
_FIRST_WAIT, _LONGEST_WAIT = 0.002, 0.1  # seconds between two looks
_HURRY = 10.0  # seconds left to other ranks once this process is ending on an error


class GaveUp(PurestepError):
    """Another rank has given this save up; the reason is its own to tell."""


def convene(root: Path, step: int, token: str, ranks: Ranks, *, parents: bool = True) -> Path:
    """Make the temporary directory of a save durably, on rank 0; return its path on any rank.

    Rank 0 does it before the others learn of the token, so that none of them can make it anew after it was given up.
    Without `parents` the directory that holds the root must be there still.
    """
    temporary = disk.temporary_path(root, str(step), token)
    if ranks.rank == 0 and not temporary.exists():
        disk.make_root(root, parents=parents)
        try:
            disk.begin(root, str(step), token)
            (temporary / "parts").mkdir()
            if ranks.size > 1:
                (temporary / _PLACE).mkdir()
        except OSError:
            disk.abandon(temporary)
            raise
    return temporary


class Meeting:
    """One rank's side of a save. With one rank it writes no file and waits for nothing.

    Args:
        temporary: the directory that all ranks of the save write into.
        step: of the save, for messages.
        ranks: this process among the others.
        hurry: set when this process is ending on an error: the others may be gone.
    """

    def __init__(self, temporary: Path, step: int, ranks: Ranks, hurry: threading.Event) -> None:
        self.temporary, self.step, self.ranks, self.hurry = temporary, step, ranks, hurry
        self.place = temporary / _PLACE
        self.token = temporary.name

    def begin(self) -> None:
        """Take this rank's place, which is not there any more when rank 0 has given up already."""
        if self.ranks.size > 1:
            (self.place / str(self.ranks.rank)).mkdir()

    def tell(self, name: str, body: JSON) -> None:
        """Leave a value for the others, durably."""
        if self.ranks.size > 1:
            path = self.place / str(self.ranks.rank) / name
            unfinished = path.with_name(f"{name}.new")
            unfinished.write_bytes(seal({"token": self.token, "body": body}))
            disk.fsync(unfinished)
            os.rename(unfinished, path)

    def hear(self, ranks: list[int], name: str) -> dict[int, JSON]:
        """Wait until each of some ranks has left a value, and return them by rank.

        Raises:
            GaveUp: a rank has failed.
            SnapshotError: a rank has not left its value in time; the message names it and the step.
        """
        begun, pause, found = time.monotonic(), _FIRST_WAIT, {}
        while True:
            for rank in [rank for rank in ranks if rank not in found]:
                path = self.place / str(rank) / name
                if path.exists():
                    found[rank] = self._opened(path)
                elif path.parent.with_suffix(".failed").exists() or not self.temporary.exists():
                    raise GaveUp(f"rank {rank} gave up the save of step {self.step}")
            missing = [rank for rank in ranks if rank not in found]
            if not missing:
                return found
            limit = min(_HURRY, self.ranks.timeout) if self.hurry.is_set() else self.ranks.timeout
            if time.monotonic() - begun >= limit:
                raise SnapshotError(self._late(missing, time.monotonic() - begun))
            time.sleep(pause)
            pause = min(2 * pause, _LONGEST_WAIT)

    def _opened(self, path: Path) -> JSON:
        content = unseal(path.read_bytes(), str(path))
        if content["token"] != self.token:
            raise SnapshotError(explain("a rank has written into the save of another", where=str(path)))
        return content["body"]

    def _late(self, missing: list[int], seconds: float) -> str:
        names = "rank " + ", ".join(str(rank) for rank in missing)
        return explain(
            f"{names} did not write its part of step {self.step} within {seconds:.0f} s",
            where=f"rank {self.ranks.rank} of {self.ranks.size} waited in {self.place}",
            why="it has died, is slower than that, or does not see this directory",
            instead="Ranks(..., timeout=) if it is slow; all ranks write to one shared file system",
        )

    def is_over(self) -> bool:
        """Tell whether rank 0 has given this save up."""
        return self.ranks.rank > 0 and not self.place.exists()

    def end(self) -> None:
        """Remove what the ranks left each other."""
        shutil.rmtree(self.place, ignore_errors=True)

    def give_up(self) -> None:
        """Let the others know that this rank has failed; a rename needs no space on the disk."""
        if self.ranks.rank == 0:
            with contextlib.suppress(OSError):
                disk.abandon(disk.set_aside(self.temporary))
            disk.abandon(self.temporary)
        elif self.ranks.size > 1:
            mine = self.place / str(self.ranks.rank)
            with contextlib.suppress(OSError):
                os.rename(mine, mine.with_suffix(".failed"))
