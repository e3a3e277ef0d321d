"""The remote copy of a run's directory: where the run begins by it, when it is brought up to date, what is said of it.

`saving` owns one; `remote.Mirror` copies. Rank 0 alone has a mirror, and the others are told what came of it.
"""

from __future__ import annotations

import contextlib
import json
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from purestep import snapshot
from purestep.errors import ConfigError, SaveFailed, explain
from purestep.loop import origin
from purestep.loop.events import Copied, CopyLost, Event
from purestep.loop.ranks import Ranks
from purestep.loop.resume import Resume
from purestep.remote import Mirror, Remote

# So long at most a run that ends on an error waits for its last files to be copied.
_AFTER_ERROR_SECONDS = 10.0
_GOES_ON = "  training goes on, and the copy is tried again; ps.Remote(url, on_error='stop') ends a run instead"
_AT_END = "  the run directory is complete; ps.Remote(url).push(run_dir) copies it later"


class Copying:
    """What keeps the remote copy of one run.

    Args:
        remote: where; None for no copy.
        run_dir: the run directory.
        keep: preservation policy of the store.
        ranks: the processes of the run.
    """

    def __init__(self, remote: Remote | None, run_dir: Path | None, keep: snapshot.Keep, ranks: Ranks) -> None:
        self._remote, self._run_dir = remote, run_dir
        self._ranks = ranks
        self.mirror: Mirror | None = None
        if remote is not None and run_dir is not None and ranks.first:
            self.mirror = remote.mirror(run_dir, keep)
        self._following = False  # the same on every rank: whether there may be something to tell
        self._begun = self._given_up = False

    # --- the beginning ------------------------------------------------------------------------------------------------

    def fetch(self, store: snapshot.Store | None, resume: Resume) -> None:
        """Bring snapshots and record here where this run directory is behind its copy. Every rank calls it.

        Raises:
            ConfigError: the copy is of another run, or `resume` refuses any.
            SnapshotError: the place does not answer, or no copy is intact.
        """
        if self._remote is not None and store is not None:
            store.ranks.together(lambda: self._fetch(store.root, resume))

    def _fetch(self, root: Path, resume: Resume) -> None:
        if self.mirror is None:
            return
        there = self.mirror.steps()
        if not there:
            return
        self._check_same(self.mirror)
        here = snapshot.Store(root).steps()
        if resume == "never":
            if here:
                return  # the snapshots here are refused all the same
            raise ConfigError(
                explain(
                    "resume='never', but there are snapshots of an earlier run in the remote copy",
                    where=f"{self._url}: {', '.join(map(str, there))}",
                    instead="another url, or resume='auto' to continue; delete the copy to give the run up",
                )
            )
        if isinstance(resume, int):
            if resume in there and resume not in here:
                self.mirror.pull(resume)
        elif not here or max(there) > max(here):
            self.mirror.pull(None)

    def _check_same(self, mirror: Mirror) -> None:
        """Refuse the copy of another run: it would be overwritten."""
        told = mirror.read(origin.FILE)
        with contextlib.suppress(OSError):
            here = _first_start((mirror.run_dir / origin.FILE).read_bytes())
            there = None if told is None else _first_start(told)
            if here is not None and there is not None and here != there:
                raise ConfigError(
                    explain(
                        "the remote copy is of another run than the run directory",
                        where=f"{mirror.run_dir}, {self._url}",
                        why="they were started at different times",
                        instead="a url of its own for each run; or an empty run_dir= to continue the run of the copy",
                    )
                )

    @property
    def _url(self) -> str:
        return "" if self._remote is None else self._remote.url

    def begin(self) -> None:
        """Begin to copy what is here and not there."""
        self._following = self._remote is not None
        self._begun = True
        if self.mirror is not None:
            self.mirror.start()

    # --- while it goes on ---------------------------------------------------------------------------------------------

    def follow(self) -> None:
        """Note, on every rank, that there is a new snapshot to be copied."""
        self._following = self._remote is not None

    def events(self, store: snapshot.Store) -> Iterator[Event]:
        """Tell what was copied, or lost, since the last time. Every rank calls it, and gets the same."""
        if self._following:
            yield from self._told(store.ranks.from_first(lambda: self.mirror.report() if self.mirror else None))

    def finish(self, store: snapshot.Store, patience: float) -> Iterator[Event]:
        """Wait until the last snapshot is copied, so many seconds at most."""
        if not self._following:
            return

        def report() -> Any:
            if self.mirror is None:
                return None
            if self.mirror.wait(patience):
                return self.mirror.report()
            lost = "the grace period is over, and the remote copy is not up to date"
            return {**self.mirror.report(), "lost": lost, "given_up": True}

        yield from self._told(store.ranks.from_first(report))

    def _told(self, told: Any) -> Iterator[Event]:
        self._following = told["busy"]
        self._given_up = told.get("given_up", False)
        for step in told["copied"]:
            yield Copied(step)
        if told["lost"] is None:
            return
        if self._remote is not None and self._remote.on_error == "stop":
            raise SaveFailed(told["lost"])
        if self._ranks.first:
            warnings.warn(f"{told['lost']}\n{_GOES_ON}", stacklevel=2)
        yield CopyLost(told["lost"])

    # --- the end ------------------------------------------------------------------------------------------------------

    def close(self, patience: float, error: BaseException | None) -> None:
        """Copy what was written last: the end of the log, and why the run ended.

        Args:
            patience: seconds to wait at most.
            error: that ends the run, and matters more than one of the copy, which it gets as a note; None without one.

        Raises:
            SaveFailed: that failed, and the run is to stop by it.
        """
        if self.mirror is None or self._given_up or not self._begun:
            return
        lost = self.mirror.close(patience if error is None else min(patience, _AFTER_ERROR_SECONDS))
        if lost is None:
            return
        if error is not None:
            error.add_note(f"{lost}\n{_AT_END}")
        elif self._remote is not None and self._remote.on_error == "stop":
            raise SaveFailed(lost)
        else:
            warnings.warn(f"{lost}\n{_AT_END}", stacklevel=2)


def _first_start(content: bytes) -> object:
    """Return when a run was started first, which tells runs apart; None where `run.json` does not say so."""
    with contextlib.suppress(ValueError, KeyError, IndexError, TypeError, RecursionError):
        return json.loads(content)["starts"][0]["time"]
    return None
