"""The snapshots of a run: the place and its lock, when to take one, and what is said when the disk is slow or fails.

`run` performs `Save` through it and yields the events that come of it. The store writes; this room knows patience.
"""

from __future__ import annotations

import contextlib
import math
import time
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from purestep import snapshot, tree
from purestep.errors import SaveFailed, SnapshotError, explain
from purestep.loop import resume
from purestep.loop.copying import Copying
from purestep.loop.events import Callback, Event, LoopState, Saved, SaveLost
from purestep.loop.identity import Identity, conditions
from purestep.loop.lock import Lock, refuse_link
from purestep.loop.ranks import Ranks
from purestep.loop.roles import SnapshotPolicy
from purestep.loop.signals import Signals
from purestep.remote import Remote
from purestep.state import TrainState
from purestep.trainable import frozen_names

# A snapshot that is due waits so long at most for the one before it; on a slower disk it is left out.
SLOW_DISK_SECONDS = 30.0
_GOES_ON = "  training goes on, and the next snapshot is tried as planned; on_save_error='stop' ends a run instead"
# Of the train state, and of the whole run without what the clock says: both are equal for equal runs.
DIGESTS = {
    "state": snapshot.Scope(under=".train"),
    "run": snapshot.Scope(without=(".elapsed", ".status.boundary")),
}

OnSaveError = Literal["continue", "stop"]


def base_of(loop: LoopState) -> snapshot.Base:
    """Return the frozen parameters of a run: they live in the buffers of train states, and snapshots share them."""
    states = [(path, state) for path, state in tree.find(loop.train, TrainState, ".train") if state.model is not None]
    paths = [f"{path}.buffers[{name!r}]" for path, state in states for name in frozen_names(state)]
    return snapshot.Base(frozenset(paths), f"{states[0][0]}.buffers" if len(states) == 1 else ".train")


class Saving:
    """What takes the snapshots of one run.

    Args:
        run_dir: where they go, under `snapshots`; None for none.
        callbacks: say which are kept.
        ranks: the processes that write them together.
        signals: since when a signal waits for the end.
        on_save_error: whether a snapshot that could not be written ends the run.
        grace: seconds between a signal and the end of the run; None for no bound.
        remote: where the run directory is copied to; None for nowhere.

    Attributes:
        store: open from `open` on, None without a run directory.
        on_save_error: as given.
        unsaved: whether the last snapshot was not durable when the run ended.
    """

    def __init__(
        self,
        run_dir: Path | None,
        callbacks: Sequence[Callback],
        ranks: Ranks,
        signals: Signals,
        *,
        on_save_error: OnSaveError = "continue",
        grace: float | None = None,
        remote: Remote | None = None,
    ) -> None:
        self._run_dir, self._keep = run_dir, _keep(callbacks)
        self._copying = Copying(remote, run_dir, self._keep, ranks)
        self._ranks, self._signals = ranks, signals
        self.on_save_error, self._grace = on_save_error, grace
        self.store: snapshot.Store | None = None
        self._lock: Lock | None = None
        self._saved: tuple[object, ...] | None = None
        self._identity: Mapping[str, Any] = {}  # rank 0 writes it
        self._base = snapshot.Base()
        self._device = "cpu"
        self._skipped = 0
        self._abandoned = self.unsaved = False

    # --- the place ----------------------------------------------------------------------------------------------------

    def open(self, stack: contextlib.ExitStack) -> None:
        """Lock the run directory and open its store until the stack ends.

        Raises:
            SnapshotError: the directory cannot be made.
            ConfigError: another run holds it.
        """
        if self._run_dir is None:
            return
        root = resume.store_root(self._run_dir)
        if self._ranks.first:
            with _explained(self._run_dir):
                self._run_dir.mkdir(parents=True, exist_ok=True)
                self._lock = stack.enter_context(Lock(self._run_dir))
            refuse_link(root)
        follower = self._copying.mirror
        self.store = snapshot.Store(root, keep=self._keep, ranks=self._ranks.for_store(), follower=follower)
        if self._ranks.first:
            self.store.clean()
        stack.push(self._leave)

    def _leave(self, *error: Any) -> None:
        if self.store is None:
            return
        if not self._abandoned:
            try:
                self.store.__exit__(*error)
            finally:
                self._copying.close(self.grace_left(), error[1])
        elif self._lock is not None:
            self._lock.keep_while(self.store.busy)

    def fetch(self, where: resume.Resume) -> None:
        """Bring here what the remote copy of the run directory has and this one does not; see `Copying.fetch`."""
        self._copying.fetch(self.store, where)

    def begin(self, loop: LoopState, at: int | None, identity: Identity) -> None:
        """Check that snapshots of a run can be written here; it begins at the snapshot `at`, or at none."""
        if self.store is not None:
            self._base = base_of(loop)
            self.store.check(loop, base=self._base)
            self._identity = identity.plain if self._ranks.first else {}
            self._copying.begin()
        self._device = identity.device
        self._saved = None if at is None else _position(loop)

    # --- taking them --------------------------------------------------------------------------------------------------

    def save(self, loop: LoopState, step: Any, loader: Callable[[], Any], flush: Callable[[], None]) -> Iterator[Event]:
        """Take a snapshot, unless there is one of this position.

        Args:
            loop: the run.
            step: what its bits depend on is noted of it.
            loader: returns what the data source needs to be opened here again.
            flush: makes the log durable, which a snapshot must not be ahead of.
        """
        if self.store is None or self._saved == _position(loop):
            return
        position = _position(loop)
        loop = loop.replace(cursor=loop.cursor.replace(loader=loader()))
        if self._ranks.alone and self.store.busy(self._patience(loop)):
            yield self._behind(loop)
            return
        if (moved := self._moved()) is not None:
            self.unsaved = loop.status.stop is not None
            yield self._lost(SaveFailed(moved))
            return
        number = loop.cursor.batches
        info: dict[str, Any] = {"epoch": loop.cursor.epoch, "batch": loop.cursor.batch}
        info |= {
            "step": conditions(step, self._device),
            "identity": self._identity,
            "updates": resume.applied_steps(loop),
            "stop": loop.status.stop,
        }
        flush()
        try:
            # There may be one of this position, with an evaluation that was cut off: it gives way to this one. So do
            # those of a future that the run has gone back from, or that could not be read.
            self.store.save(
                *(number, loop), metrics=loop.status.metrics, info=info, digests=DIGESTS, base=self._base, replace=True
            )
            self._saved = position
        except SaveFailed as error:
            yield self._lost(error)

    def durable(self) -> Iterator[Event]:
        """Tell which snapshots have become durable, or were lost, since the last time."""
        if self.store is None:
            return
        try:
            for number in self.store.poll():
                self._copying.follow()
                yield Saved(number)
        except SaveFailed as error:
            yield self._lost(error)
        yield from self._copying.events(self.store)

    def _moved(self) -> str | None:
        """Return, on every rank, what became of the run directory since it was locked; None while it is there."""
        if self.store is None:
            return None
        found: str | None = self.store.ranks.from_first(lambda: None if self._lock is None else self._lock.trouble())
        return found

    def is_reachable(self) -> bool:
        """Tell, on the rank that locked it, whether the run directory can be written to.

        It was not moved, and its disk has not kept the run waiting until the grace period was over.
        """
        return not self._abandoned and (self._lock is None or self._lock.trouble() is None)

    def finish(self, loop: LoopState) -> Iterator[Event]:
        """Wait for the last snapshot, within the grace period after a signal."""
        if self.store is None:
            return
        if self._ranks.alone and self.store.busy(self._patience(loop)):
            self._abandoned = self.unsaved = True
            yield SaveLost(
                f"the grace period of {self._grace:g} s is over, and the last snapshot is still being written"
            )
            return
        try:
            self.store.wait()
        except SaveFailed as error:
            self.unsaved = True
            yield self._lost(error)
        yield from self.durable()
        yield from self._copying.finish(self.store, self.grace_left())

    # --- patience, and words ------------------------------------------------------------------------------------------

    def grace_left(self) -> float:
        """How many seconds are left of the grace period; without a signal, or without a period, no end is near."""
        if self._signals.since is None or self._grace is None:
            return math.inf
        return max(0.0, self._grace - (time.monotonic() - self._signals.since))

    def _patience(self, loop: LoopState) -> float:
        """How many seconds to wait for the disk: a bound while training, the grace period after a signal."""
        return min(self.grace_left(), SLOW_DISK_SECONDS if loop.status.stop is None else math.inf)

    def _behind(self, loop: LoopState) -> SaveLost:
        """The disk is still busy with the snapshot before: leave this one out, and say so once."""
        self._skipped += 1
        text = f"the disk is slower than the snapshots: that of batch {loop.cursor.batches} is left out"
        if self._skipped == 1:
            warnings.warn(f"{text}; the next is tried as planned", stacklevel=2)
        return SaveLost(text)

    def _lost(self, error: SaveFailed) -> SaveLost:
        if (moved := self._moved()) is not None and str(error) != moved:
            cause, error = error, SaveFailed(moved)
            error.__cause__ = cause
        if self.on_save_error == "stop":
            raise error
        self._saved = None
        if self._ranks.first:
            warnings.warn(f"{error}\n{_GOES_ON}", stacklevel=2)
        return SaveLost(str(error))


@contextlib.contextmanager
def _explained(run_dir: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise SnapshotError(
            explain(
                "the run directory cannot be made or written",
                where=str(run_dir),
                why=f"{type(error).__name__}: {error}",
                instead="mend it (a file in its place? permissions? mounted read-only? full?), or choose another "
                "run_dir=",
            )
        ) from error


def _position(loop: LoopState) -> tuple[object, ...]:
    """What tells two loop states of one run apart: a snapshot of the same position is not taken twice.

    Why the run stops is not among it, because a resumed run asks anew. Which evaluations are pending is: their rows,
    and what callbacks made of them, are in the later snapshot only.
    """
    return loop.cursor.batches, loop.cursor.epoch, loop.status.due


def _keep(callbacks: Sequence[Callback]) -> snapshot.Keep:
    policies = [c.preserves() for c in callbacks if isinstance(c, SnapshotPolicy)]
    keep = policies[0] if policies else snapshot.latest(1)
    for other in policies[1:]:
        keep = keep | other
    return keep
