"""One directory of snapshots: asynchronous saves, durable commits, verified restores, policies.

One process writes it, or several that call it together and come to the same answers. Orbax writes the arrays (see
`arrays`); commit, manifest, checksums, listing and deletion are ours. The loop calls it; it knows nothing of training.
"""

from __future__ import annotations

import contextlib
import threading
import warnings
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

from purestep.arguments import Location, checked
from purestep.errors import SaveFailed, SnapshotError, TreeError, explain
from purestep.snapshot import arrays, disk, keep, reader, space, writer
from purestep.snapshot.arguments import checked_metrics, checked_step, frozen_json
from purestep.snapshot.background import Background
from purestep.snapshot.codec import JSON, Encoded, encode
from purestep.snapshot.digest import Scope, size
from purestep.snapshot.index import Entry, Index, listed
from purestep.snapshot.manifest import Manifest, environment, read_manifest
from purestep.snapshot.meeting import GaveUp, convene
from purestep.snapshot.ranks import Ranks
from purestep.snapshot.reader import Restored
from purestep.snapshot.shards import owned
from purestep.snapshot.staging import Staging

_ALONE = Ranks()
_LATEST = keep.latest(1)
_EMPTY: Mapping[str, Any] = {}


@checked(SnapshotError)
class Store:
    """A directory of snapshots, written by one process or by all ranks of a job.

    `save` copies the tree and returns; a thread writes it. A snapshot is in the list from the moment it is durable, and
    only then are those deleted that it replaces or that the preservation policy does not select. So from the first
    durable snapshot on there is always a whole one of the newest durable step, whatever is called and whenever the
    process is stopped or the disk fails; at worst one more than asked is on disk. A process that exits without `close`
    finishes the save in flight first; one that is killed leaves a temporary directory, which the first save of the
    next writer removes.

    With `ranks`, every rank calls every method, in the same order, on one shared file system: each writes the parts of
    split tensors that it owns, rank 0 commits, and all get the same answers and the same errors.

    Args:
        root: the directory; the first save makes it.
        keep: which snapshots to preserve, see `latest`, `best`, `every_steps`, `all_`.
        verify: whether `restore` checks the checksum of every leaf; "digest" for the digests of the tree, too.
        ranks: the processes that write it together; this one alone by default.

    Example:
        >>> import tempfile, torch
        >>> with tempfile.TemporaryDirectory() as root, Store(root, keep=keep.latest(2)) as store:
        ...     for step in (10, 20, 30):
        ...         store.save(step, {"w": torch.full((2,), float(step)), "n": step}, metrics={"loss": 1 / step})
        ...     store.wait()
        ...     store.steps(), store.best("loss"), store.restore().value
        ([20, 30], 30, {'w': tensor([30., 30.]), 'n': 30})
    """

    def __init__(
        self, root: Location, *, keep: keep.Keep = _LATEST, verify: reader.Verify = True, ranks: Ranks = _ALONE
    ) -> None:
        reader.check_verify(verify)
        self.root = Path(root).absolute()
        self.keep = keep
        self.verify = verify
        self.ranks = ranks
        self._index = Index(self.root)
        self._staging = Staging()
        self._background = Background()
        self._hurry = threading.Event()
        self._saving: int | None = None  # the step of a save whose end the ranks have not agreed on yet
        self._durable: list[int] = []
        self._failure: SaveFailed | None = None
        self._cleaned = self._warned = self._closed = False
        self._checked = False  # whether the root was there; if what holds it goes away, no save makes it anew

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
        replace: bool = False,
    ) -> None:
        """Copy a tree and begin to write it in the background.

        Waits for the save before it, so that there is never more than one copy. The value may be changed on return.

        Args:
            step: a whole number above every step that is stored, unless `replace`.
            value: a pytree of tensors, numpy arrays, numbers, strings and bytes.
            metrics: numbers that `best` ranks by.
            info: anything JSON, given back by `restore`.
            digests: parts of the tree that the manifest has digests of their own of, by name.
            replace: whether snapshots of this step and of later ones give way to this one. They stay until it is
                durable, and if it fails.

        Raises:
            SaveFailed: the *previous* save failed; this one has been started all the same.
            SnapshotError: `step` is not above the latest and `replace` is False, `info` is no JSON, or the store is
                closed.
            TreeError: a leaf cannot be stored.
        """
        self._background.settle()  # the buffers are free again
        request, refused = None, None
        try:
            request = self._request(checked_step(step), value, metrics, info, digests)
        except (SnapshotError, TreeError) as error:
            refused = error
        latest = self._index.steps()[-1:] if self.ranks.rank == 0 else None
        token = disk.unique()
        temporary = self._convene(request, token)
        said = self.ranks.exchange([self._report(), token, latest, request and request.step])
        self._conclude([report for report, *_ in said])
        numbers = [number for *_, number in said]
        if refused is None and None not in numbers:  # else the rank that could not make a request says why
            refused = None if replace else self._past(numbers[0], said[0][2])
            if len(set(numbers)) > 1:
                refused = SnapshotError(explain("ranks save different steps", where=f"by rank: {numbers}"))
        try:
            self.ranks.agree(refused)
        except (SnapshotError, TreeError):
            if temporary is not None:
                disk.abandon(temporary)
            raise
        if request is not None:
            self._start(request, said[0][1])
        self._raise_failure()  # only now: a save that reports another one is not skipped

    def _request(
        self,
        step: int,
        value: Any,
        metrics: Mapping[str, float],
        info: Mapping[str, JSON],
        digests: Mapping[str, Scope],
    ) -> writer.Request:
        if self._closed:
            raise SnapshotError(explain("the store is closed", where=str(self.root), instead="make a new Store"))
        encoded = encode(value)
        return writer.Request(
            step=step,
            encoded=encoded,
            parts=owned(encoded, self.ranks),
            metrics=checked_metrics(metrics),
            info=frozen_json(info),
            environment=environment(),
            keep=self.keep,
            ranks=self.ranks,
            hurry=self._hurry,
            digests=dict(digests),
            parents=not self._checked,
        )

    def _convene(self, request: writer.Request | None, token: str) -> Path | None:
        if self.ranks.size == 1 or request is None:
            return None
        with contextlib.suppress(OSError):  # which the thread that writes meets again, and tells
            return convene(self.root, request.step, token, self.ranks, parents=request.parents)
        return None

    def _start(self, request: writer.Request, token: str) -> None:
        self._warn_of_shortage(request.encoded)
        copies = self._staging.copy([part.value for part in request.parts])
        clean, self._saving = not self._cleaned, request.step

        def work() -> None:
            writer.write(self.root, request, token, copies, clean=clean)
            if self.ranks.rank == 0:
                writer.preserve(self._index, self.keep, request.step)

        self._background.start(f"purestep-save-{request.step}", work)

    def _past(self, step: int, latest: list[int]) -> SnapshotError | None:
        if not latest or step > latest[0]:
            return None
        return SnapshotError(
            explain(
                f"step {step} is not after the latest snapshot, of step {latest[0]}",
                where=str(self.root),
                why="snapshots are in the order of their steps, or the latest would not be the newest",
                instead=f"store.save({step}, ..., replace=True), to go back on purpose; or use another directory",
            )
        )

    def clean(self) -> None:
        """Remove what writers that died left half-written, or could not delete any more; only the one writer may.

        What a higher revision of the same step has replaced goes too, because no save may follow that would do it.
        """
        disk.clean(self.root)
        for entry in self._index.superseded():
            with contextlib.suppress(OSError):
                disk.remove(entry.path)

    # --- how a save ended ---------------------------------------------------------------------------------------------

    def _report(self) -> JSON:
        """Return what this rank knows of the save in flight, for the others."""
        job = self._background.job
        if self._saving is None or job is None or not job.ended:
            return None
        if job.failure is None:
            return {}
        text = f"{type(job.failure).__name__}: {str(job.failure)[:500]}"
        return {"text": text, "own": not isinstance(job.failure, GaveUp), "have": listed(self._index.steps())}

    def _conclude(self, reports: list[JSON]) -> None:
        """Note how a save ended, once it has on every rank: as rank 0 says, which commits."""
        if self._saving is None or None in reports:
            return
        step, self._saving = self._saving, None
        self._cleaned = not reports[0]
        if not reports[0]:
            self._durable.append(step)
            return
        failed = [(rank, report) for rank, report in enumerate(reports) if report]
        own = [(rank, report) for rank, report in failed if report["own"]] or failed
        have = reports[0]["have"]
        failure = SaveFailed(
            explain(
                f"the save of step {step} failed",
                where=str(self.root / str(step)),
                why="\n".join(f"rank {rank}: {r['text']}" if self.ranks.size > 1 else r["text"] for rank, r in own),
                instead="free space or mend the directory, and save again; "
                + (f"snapshots on disk, untouched: {have}" if have else "there is no earlier snapshot"),
            )
        )
        failure.__cause__ = self._background.job.failure if self._background.job else None
        self._failure = failure

    def _raise_failure(self) -> None:
        failure, self._failure = self._failure, None
        if failure is not None:
            raise failure

    def _settle(self) -> None:
        self._background.settle()
        if self._saving is not None:
            self._conclude(self.ranks.exchange(self._report()))

    def busy(self, timeout: float = 0.0) -> bool:
        """Tell whether a save is still in flight, after waiting so many seconds at most."""
        return self._background.busy(timeout)

    def wait(self) -> None:
        """Wait until the save in flight is durable and the policy has been applied.

        Raises:
            SaveFailed: it did not become durable; nothing of it is left on disk.
        """
        self._settle()
        self._raise_failure()

    def poll(self) -> list[int]:
        """Return the steps that became durable since the last poll, without waiting.

        Ranks exchange a value only while a save is in flight.

        Raises:
            SaveFailed: a save failed; raised once for each failure.
        """
        if self._saving is not None:
            self._conclude(self.ranks.exchange(self._report()))
        self._raise_failure()
        steps, self._durable = self._durable, []
        return steps

    def close(self) -> None:
        """Wait for the save in flight, and give back the memory of the copies.

        Raises:
            SaveFailed: the save did not become durable.
        """
        self._settle()
        self._closed = True
        self._staging.clear()
        self._raise_failure()

    def __enter__(self) -> Store:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.ranks.size > 1:
            self._hurry.set()  # other ranks may be gone, and cannot be asked how the save ended
            self._background.settle()
            self._saving = None
        try:
            self.close()
        except SaveFailed as failure:
            if error is None:
                raise
            error.add_note(str(failure))

    # --- before it matters --------------------------------------------------------------------------------------------

    def check(self, value: Any) -> None:
        """Check that snapshots of a tree can be stored here: every leaf, the directory, and the room on its disk.

        It makes the directory, writes a small file and removes it. When there is room for the next snapshot but not for
        as many as will be kept, it warns.

        Raises:
            TreeError: a leaf cannot be stored.
            SnapshotError: the directory cannot be made or written, or the next snapshot does not fit.
        """

        def work() -> Encoded:
            encoded = encode(value)
            owned(encoded, self.ranks)
            space.check_writable(self.root)
            if self.ranks.rank == 0:
                space.check_fits(self.root, _nbytes(encoded))
            return encoded

        self._warn_of_shortage(self.ranks.together(work))
        self._checked = True

    def _warn_of_shortage(self, encoded: Encoded) -> None:
        if self.ranks.rank:
            return
        text = space.shortage(self.root, _nbytes(encoded), self.keep, len(self._index.steps()))
        if text is not None and not self._warned:
            warnings.warn(text, RuntimeWarning, stacklevel=4)
        self._warned = text is not None

    # --- what is stored -----------------------------------------------------------------------------------------------

    def steps(self) -> list[int]:
        """Return the steps of the snapshots on disk, in order. A save in flight is not among them."""
        return list(self.ranks.from_first(self._index.steps))

    def latest(self) -> int | None:
        """Return the step of the newest snapshot, None when there is none."""
        return max(self.steps(), default=None)

    def best(self, metric: str, mode: keep.Mode = "min") -> int | None:
        """Return the step with the best value of a metric; None when no snapshot has it. NaN is never best."""
        ranked = self.ranks.from_first(lambda: keep.ranking(self._index.records(), metric, mode)[:1])
        return next(iter(ranked), None)

    def delete_after(self, step: int) -> None:
        """Delete every snapshot after a step, newest first: going back in time on purpose.

        Raises:
            SnapshotError: no snapshot of the step or of an earlier one is whole, so that none would be left. Nothing
                has been deleted then.
        """
        self._background.settle()

        def work() -> None:
            entries = self._index.revisions() if self.ranks.rank == 0 else []
            later = [entry for entry in entries if entry.step > step]
            if later and not self._has_whole([entry for entry in entries if entry.step <= step]):
                raise SnapshotError(
                    explain(
                        f"no snapshot of step {step} or before is whole, so none would be left",
                        where=f"{self.root}: {listed(self._index.steps())}",
                        instead="a later step; or delete the directory, to give all of it up",
                    )
                )
            for entry in reversed(later):
                disk.remove(entry.path)

        self.ranks.together(work)

    def _has_whole(self, entries: list[Entry]) -> bool:
        for entry in reversed(entries):
            with contextlib.suppress(SnapshotError):
                reader.check(entry.path, arrays.read_arrays)
                return True
        return False

    def read_manifest(self, step: int) -> Manifest:
        """Return all that the snapshot of a step says about itself, without reading arrays.

        Raises:
            CorruptSnapshot: a file of it is missing or is not what was written.
            SnapshotError: there is no snapshot of that step.
        """

        def work() -> Manifest:
            return read_manifest(reader.find(self._index, step).path)

        found: Manifest = self.ranks.together(work)
        return found

    def restore(
        self, like: Any = ..., *, step: int | None = None, fallback: bool = True, verify: reader.Verify | None = None
    ) -> Restored:
        """Read a snapshot back, verified.

        Args:
            like: a template: a pytree of the stored structure whose tensors give shape, dtype and device (fake and meta
                tensors mean the CPU) and whose nodes give classes and static fields. `...` anywhere in it, or as all of
                it, takes what is stored. Values of Python leaves come from the snapshot. A tensor that is split over
                ranks is split in the same way again, however it was when it was saved; each rank reads its own part.
            step: which one; the newest by default.
            verify: whether to check the checksum of every leaf; the store's own by default. "digest" also computes the
                digests of the tree that was read, and compares them with those of the manifest.
            fallback: whether an older snapshot is used, with a warning, when the newest cannot be read. A step that is
                asked for by number is never replaced by another.

        Raises:
            TemplateMismatch: the snapshot is intact and not of that structure; it never falls back.
            CorruptSnapshot: bytes are missing or changed; the message names the leaf, and the earlier snapshots.
            SnapshotError: there is no snapshot.
        """
        self._background.settle()
        return reader.restore(
            *(self._index, like, arrays.read_arrays),
            step=step,
            fallback=fallback,
            verify=self.verify if verify is None else verify,
            ranks=self.ranks,
        )


def _nbytes(encoded: Encoded) -> int:
    return sum(size(leaf) for leaf in encoded.leaves if leaf.has_bytes)
