"""One directory of snapshots: asynchronous saves, durable commits, verified restores, preservation policies.

One process writes it, or all ranks of a job, which call it together and get the same results. Orbax writes the arrays
(see `orbax_io`); this package commits, lists, verifies and deletes. The loop calls it; it knows nothing of training.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple

from purestep.arguments import Location, checked
from purestep.errors import SaveFailed, SnapshotError, TreeError, explain
from purestep.snapshot import base as base_
from purestep.snapshot import durable_directories, free_space, orbax_io, reader, retention, writer
from purestep.snapshot.arguments import checked_metrics, checked_step, frozen_json
from purestep.snapshot.background_thread import Background
from purestep.snapshot.codec import JSON, Encoded, encode
from purestep.snapshot.digest import KnownRows, Scope, size
from purestep.snapshot.header import Base
from purestep.snapshot.listing import Entry, Index, listed
from purestep.snapshot.manifest import Manifest, environment, read_manifest
from purestep.snapshot.processes import Ranks
from purestep.snapshot.rank_messages import Abandoned, make_temporary
from purestep.snapshot.reader import Restored
from purestep.snapshot.shards import owned
from purestep.snapshot.staging import Staging

_ONE_PROCESS = Ranks()
_LATEST = retention.latest(1)
_EMPTY: Mapping[str, Any] = {}
_NO_BASE = Base()


class _Message(NamedTuple):
    """What each rank sends to the others before a save begins; a list in JSON.

    Attributes:
        report: how the save before ended here, see `Store._report`.
        token: a unique name for the temporary directory; that of rank 0 is used.
        latest: the newest step on disk, as a list of at most one; None on other ranks than 0.
        step: that this rank wants to save; None if it refuses to.
    """

    report: JSON
    token: str
    latest: list[int] | None
    step: int | None


@checked(SnapshotError)
class Store:
    """A directory of snapshots, written by one process or by all ranks of a job.

    `save` copies the tree and returns; a thread writes it. A snapshot is listed as soon as it is durable. Only then are
    the snapshots deleted that it replaces, or that the preservation policy does not select. So from the first durable
    snapshot on, the directory always holds an intact one of the newest durable step, whichever methods are called and
    whenever the process is stopped or the disk fails; at worst it holds one more than the policy asks for. A process
    that exits without `close` finishes the save in flight first; one that is killed leaves a temporary directory, which
    the first save of the next writer removes.

    With `ranks`, every rank calls every method, in the same order, on one shared file system: each writes the shards
    that it owns, rank 0 commits, and all get the same results and the same errors.

    Args:
        root: the directory; the first save makes it.
        keep: which snapshots to preserve, see `latest`, `best`, `every_steps`, `all_`.
        verify: whether `restore` checks the checksum of every leaf; "digest" for the digests of the tree, too.
        ranks: the processes that write it together; only this process by default.
        follower: told of each durable snapshot, before older ones are deleted; None: there is no follower.

    Examples:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as root, Store(root, keep=retention.latest(2)) as store:
        ...     for step in (10, 20, 30):
        ...         store.save(step, {"w": torch.full((2,), float(step)), "n": step}, metrics={"loss": 1 / step})
        ...     store.wait()
        ...     store.steps(), store.best("loss"), store.restore().value
        ([20, 30], 30, {'w': tensor([30., 30.]), 'n': 30})
    """

    def __init__(
        self,
        root: Location,
        *,
        keep: retention.Keep = _LATEST,
        verify: reader.Verify = True,
        ranks: Ranks = _ONE_PROCESS,
        follower: writer.Follower | None = None,
    ) -> None:
        reader.check_verify(verify)
        self.root = Path(root).absolute()
        self.keep = keep
        self.verify = verify
        self.ranks = ranks
        self._follower = follower
        self._index = Index(self.root)
        self._staging = Staging()
        self._known = KnownRows()
        self._background = Background()
        self._hurry = threading.Event()  # set when this process ends on an error: a save then waits less for ranks
        self._saving: int | None = None  # the step of a save whose result the ranks have not exchanged yet
        self._durable: list[int] = []
        self._failure: SaveFailed | None = None
        self._cleaned = self._warned = self._closed = False
        # Whether `check` has found the root. If the directory that holds it is renamed or removed later, a save fails
        # and makes no second one at the old path.
        self._checked = False

    def __repr__(self) -> str:
        ranks = "" if self.ranks.size == 1 else f", ranks={self.ranks!r}"
        return f"Store({str(self.root)!r}, keep={self.keep!r}, verify={self.verify!r}{ranks})"

    # --- saving -------------------------------------------------------------------------------------------------------

    def save(
        self,
        step: int,
        value: Any,
        *,
        metrics: Mapping[str, float] = _EMPTY,
        info: Mapping[str, JSON] = _EMPTY,
        digests: Mapping[str, Scope] = _EMPTY,
        base: Base = _NO_BASE,
        replace: bool = False,
    ) -> None:
        """Copy a tree to the host and start to write it in the background.

        Waits for the save before it, so that there is never more than one copy. The value may be changed on return.

        Args:
            step: a whole number above every step that is stored, unless `replace`.
            value: a pytree of tensors, numpy arrays, numbers, strings and bytes.
            metrics: numbers by which `best` ranks the snapshots.
            info: any JSON value, which `restore` returns.
            digests: subtrees, by name, for which the manifest records a digest of their own.
            base: leaves that stay as they are, such as frozen weights. Their bytes are written once, under `base`
                beside the snapshots, and again where they have changed all the same; every snapshot has their digest.
            replace: whether this snapshot replaces those of the same step and of later ones. They are deleted once it
                is durable, and kept if it fails.

        Raises:
            SaveFailed: the *previous* save failed; this one has been started all the same.
            SnapshotError: `step` is not above the latest and `replace` is False, `info` is no JSON, or the store is
                closed.
            TreeError: a leaf cannot be stored.
        """
        self._background.join()  # the host buffers of the save before are free again
        request, refusal = None, None
        try:
            request = self._request(checked_step(step), value, metrics, info, digests, base)
        except (SnapshotError, TreeError) as error:
            refusal = error  # raised below, on every rank: the others are about to exchange messages with this one
        latest = self._index.steps()[-1:] if self.ranks.rank == 0 else None
        token = durable_directories.unique()
        temporary = self._make_temporary(request, token)
        message = _Message(self._report(), token, latest, None if request is None else request.step)
        messages = [_Message(*fields) for fields in self.ranks.exchange(list(message))]
        self._conclude([message.report for message in messages])
        steps = [message.step for message in messages]
        if refusal is None and steps[0] is not None and None not in steps:  # else the rank that refuses says why
            refusal = None if replace else self._not_after(steps[0], messages[0].latest or [])
            if len(set(steps)) > 1:
                refusal = SnapshotError(explain("ranks save different steps", where=f"by rank: {steps}"))
        try:
            self.ranks.raise_everywhere(refusal)
        except (SnapshotError, TreeError):
            if temporary is not None:
                durable_directories.abandon(temporary)
            raise
        if request is not None:
            self._start(request, messages[0].token)
        self._raise_failure()  # last, so that the failure of the save before does not prevent this one

    def _request(
        self,
        step: int,
        value: Any,
        metrics: Mapping[str, float],
        info: Mapping[str, JSON],
        digests: Mapping[str, Scope],
        base: Base,
    ) -> writer.Request:
        if self._closed:
            raise SnapshotError(explain("the store is closed", where=str(self.root), instead="make a new Store"))
        encoded = encode(value)
        # Everything that the writing thread uses is copied or frozen here, before the caller may change it.
        return writer.Request(
            step=step,
            encoded=encoded,
            shards=owned(encoded, self.ranks),
            metrics=checked_metrics(metrics),
            info=frozen_json(info),
            environment=environment(),
            keep=self.keep,
            ranks=self.ranks,
            hurry=self._hurry,
            digests=dict(digests),
            base=base,
            known=self._known,
            parents=not self._checked,
        )

    def _make_temporary(self, request: writer.Request | None, token: str) -> Path | None:
        """Make the temporary directory before the ranks exchange its token, see `make_temporary`."""
        if self.ranks.size == 1 or request is None:
            return None
        with contextlib.suppress(OSError):  # the writing thread tries again, and reports the error
            return make_temporary(self.root, request.step, token, self.ranks, parents=request.parents)
        return None

    def _start(self, request: writer.Request, token: str) -> None:
        self._warn_of_shortage(request.encoded, request.base)
        copies = self._staging.copy([shard.value for shard in request.shards])
        clean, self._saving = not self._cleaned, request.step

        def work() -> None:
            directory = writer.write(self.root, request, token, copies, clean=clean)
            # `write` has returned, so the new snapshot is durable: only now may older ones be deleted.
            if directory is None:
                return
            follower = self._follower
            if follower is None:
                writer.preserve(self._index, self.keep, request.step)
            else:
                follower.became_durable(directory)
                writer.preserve(self._index, self.keep, request.step, follower.holds)

        self._background.start(f"purestep-save-{request.step}", work)

    def _not_after(self, step: int, latest: list[int]) -> SnapshotError | None:
        if not latest or step > latest[0]:
            return None
        return SnapshotError(
            explain(
                f"step {step} is not after the latest snapshot, of step {latest[0]}",
                where=str(self.root),
                why="a run resumes from the snapshot of the highest step, which this one would not be",
                instead=f"store.save({step}, ..., replace=True), to go back on purpose; or use another directory",
            )
        )

    def clean(self) -> None:
        """Remove unfinished and half-deleted snapshots of dead writers. Only the one writer of the directory may.

        It also removes snapshots that a higher revision of the same step has replaced: the next save would do it, but
        there may be none.
        """
        durable_directories.clean(self.root)
        for entry in self._index.superseded():
            with contextlib.suppress(OSError):
                durable_directories.remove(entry.path)

    # --- the result of a save -----------------------------------------------------------------------------------------

    def _report(self) -> JSON:
        """Return the result of the save in flight on this rank: None before it ends, {} for success, else the error."""
        job = self._background.job
        if self._saving is None or job is None or not job.ended:
            return None
        if job.failure is None:
            return {}
        text = f"{type(job.failure).__name__}: {str(job.failure)[:500]}"
        return {"text": text, "own": not isinstance(job.failure, Abandoned), "have": listed(self._index.steps())}

    def _conclude(self, reports: list[JSON]) -> None:
        """Record the result of a save once it has ended on every rank. That of rank 0 counts, because it commits."""
        if self._saving is None or None in reports:
            return
        step, self._saving = self._saving, None
        self._cleaned = not reports[0]
        if not reports[0]:
            self._durable.append(step)
            return
        # Name the ranks that failed themselves; the others only stopped because of them.
        failed = [(rank, report) for rank, report in enumerate(reports) if report]
        causes = [(rank, report) for rank, report in failed if report["own"]] or failed
        present = reports[0]["have"]
        failure = SaveFailed(
            explain(
                f"the save of step {step} failed",
                where=str(self.root / str(step)),
                why="\n".join(f"rank {rank}: {r['text']}" if self.ranks.size > 1 else r["text"] for rank, r in causes),
                instead="free space or repair the directory, and save again; "
                + (f"snapshots on disk, untouched: {present}" if present else "there is no earlier snapshot"),
            )
        )
        failure.__cause__ = self._background.job.failure if self._background.job else None
        # Kept, not raised: the next call of `save`, `wait`, `poll` or `close` raises it in the caller's thread.
        self._failure = failure

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _join(self) -> None:
        self._background.join()
        if self._saving is not None:
            self._conclude(self.ranks.exchange(self._report()))

    def busy(self, timeout: float = 0.0) -> bool:
        """Tell whether a save is still in flight, after waiting for it `timeout` seconds at most."""
        return self._background.busy(timeout)

    def wait(self) -> None:
        """Wait until the save in flight is durable and the policy has been applied.

        Raises:
            SaveFailed: it did not become durable; nothing of it is left on disk.
        """
        self._join()
        self._raise_failure()

    def poll(self) -> list[int]:
        """Return the steps that became durable since the last poll, without waiting.

        Ranks exchange a value only while a save is in flight.

        Raises:
            SaveFailed: a save failed; raised once for each failure.
        """
        # All ranks start a save together, so `_saving` is set on all of them or on none: the exchange is collective.
        if self._saving is not None:
            self._conclude(self.ranks.exchange(self._report()))
        self._raise_failure()
        steps, self._durable = self._durable, []
        return steps

    def close(self) -> None:
        """Wait for the save in flight, free the host buffers of the copies, and remove what a failed save has left.

        Raises:
            SaveFailed: the save did not become durable.
        """
        self._join()
        self._closed = True
        self._staging.clear()
        durable_directories.retry(self.root)
        self._raise_failure()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.ranks.size > 1:
            # Other ranks may have died, so an exchange of results could wait for ever: each rank keeps its own.
            self._hurry.set()
            self._background.join()
            self._saving = None
        try:
            self.close()
        except SaveFailed as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    # --- before the first save ----------------------------------------------------------------------------------------

    def check(self, value: Any, *, base: Base = _NO_BASE) -> None:
        """Check that snapshots of a tree can be stored here: every leaf, the directory, and the free space on its disk.

        It makes the directory, writes a small file and removes it. If the next snapshot fits but not as many as the
        policy keeps, it warns.

        Args:
            value: the pytree that will be saved.
            base: as for `save`.

        Raises:
            TreeError: a leaf cannot be stored.
            SnapshotError: the directory cannot be made or written, or the next snapshot does not fit.
        """

        def check() -> Encoded:
            encoded = encode(value)
            owned(encoded, self.ranks)
            free_space.check_writable(self.root)
            if self.ranks.rank == 0:
                free_space.check_fits(self.root, sum(self._nbytes(encoded, base)))
            return encoded

        self._warn_of_shortage(self.ranks.together(check), base)
        self._checked = True

    def _nbytes(self, encoded: Encoded, base: Base) -> tuple[int, int]:
        """Return the bytes of one snapshot, and those of its base if it is still to be written."""
        sizes = [(size(leaf), leaf.path in base.paths) for leaf in encoded.leaves if leaf.has_bytes]
        own, once = (sum(nbytes for nbytes, of_base in sizes if of_base == which) for which in (False, True))
        return own, 0 if base_.is_any_stored(self.root) else once

    def _warn_of_shortage(self, encoded: Encoded, base: Base) -> None:
        if self.ranks.rank:
            return
        own, once = self._nbytes(encoded, base)
        text = free_space.shortage(self.root, own, self.keep, len(self._index.steps()), once=once)
        if text is not None and not self._warned:
            warnings.warn(text, RuntimeWarning, stacklevel=4)
        self._warned = text is not None

    # --- the stored snapshots -----------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the steps of the snapshots on disk, in order. A save in flight is not among them."""
        return list(self.ranks.from_first(self._index.steps))

    def latest(self) -> int | None:
        """Return the step of the newest snapshot, None when there is none."""
        return max(self.steps(), default=None)

    def best(self, metric: str, mode: retention.Mode = "min") -> int | None:
        """Return the step with the best value of a metric; None when no snapshot has it. NaN is never best."""
        ranked = self.ranks.from_first(lambda: retention.ranking(self._index.records(), metric, mode)[:1])
        return next(iter(ranked), None)

    def delete_after(self, step: int) -> None:
        """Delete every snapshot after a step, newest first, to go back to that step on purpose.

        Raises:
            SnapshotError: no snapshot of the step or of an earlier one is intact, so that none would be left. Nothing
                has been deleted then.
        """
        self._background.join()

        def delete() -> None:
            entries = self._index.revisions() if self.ranks.rank == 0 else []
            later = [entry for entry in entries if entry.step > step]
            if later and not self._has_intact([entry for entry in entries if entry.step <= step]):
                raise SnapshotError(
                    explain(
                        f"no snapshot of step {step} or before is intact, so none would be left",
                        where=f"{self.root}: {listed(self._index.steps())}",
                        instead="a later step; or delete the directory, to discard all of it",
                    )
                )
            # Newest first: stopped in between, the directory holds an unbroken history up to some step.
            for entry in reversed(later):
                durable_directories.remove(entry.path)

        self.ranks.together(delete)

    def _has_intact(self, entries: list[Entry]) -> bool:
        for entry in reversed(entries):
            with contextlib.suppress(SnapshotError):
                reader.check(entry.path, orbax_io.read_arrays)
                return True
        return False

    def read_manifest(self, step: int) -> Manifest:
        """Return the manifest of the snapshot of a step, without reading arrays.

        Raises:
            CorruptSnapshot: a file of it is missing or is not what was written.
            SnapshotError: there is no snapshot of that step.
        """

        return self.ranks.together(lambda: read_manifest(reader.find(self._index, step).path))

    def restore(
        self, like: Any = ..., *, step: int | None = None, fallback: bool = True, verify: reader.Verify | None = None
    ) -> Restored:
        """Read a snapshot back, verified.

        Args:
            like: a template: a pytree of the stored structure whose tensors give shape, dtype and device (fake and meta
                tensors mean the CPU) and whose nodes give classes and static fields. `...` in place of any subtree, or
                of the tree, takes what is stored. Values of Python leaves come from the snapshot. A tensor that is
                sharded in the template is sharded so again, however it was saved; each rank reads its own shard.
            step: which one; the newest by default.
            verify: whether to check the checksum of every leaf; that of the store by default. "digest" also computes
                the digests of the restored tree, and compares them with those of the manifest.
            fallback: whether an older snapshot is used, with a warning, when the newest cannot be read. A `step` is
                never replaced by another.

        Returns:
            The tree, with its step, metrics, info and digest.

        Raises:
            TemplateMismatch: the snapshot is intact and not of that structure; it never falls back.
            CorruptSnapshot: bytes are missing or changed; the message names the leaf, and the earlier snapshots.
            SnapshotError: there is no snapshot.
        """
        self._background.join()
        return reader.restore(
            *(self._index, like, orbax_io.read_arrays),
            step=step,
            fallback=fallback,
            verify=self.verify if verify is None else verify,
            ranks=self.ranks,
        )
