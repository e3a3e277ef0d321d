"""The background thread of a save: pack, hash, write, synchronize with the other ranks, commit, then delete.

It owns the order of these steps: no snapshot is deleted, moved or overwritten before the one that replaces it is
durable. `store` passes it the copies to write.
"""

from __future__ import annotations

import abc
import contextlib
import functools
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from purestep.snapshot import base as base_
from purestep.snapshot import digest, durable_directories, free_space, orbax_io
from purestep.snapshot.codec import JSON, Encoded
from purestep.snapshot.header import Base, StoredBase
from purestep.snapshot.listing import Index, directory_name, next_revision
from purestep.snapshot.manifest import Manifest, dump, now
from purestep.snapshot.packing import STATE, Piece, checksums, pack, with_checksums
from purestep.snapshot.processes import Ranks
from purestep.snapshot.rank_messages import Abandoned, Messages, make_temporary
from purestep.snapshot.retention import Keep
from purestep.snapshot.shards import OwnedShard
from purestep.snapshot.staging import Copies

_WRITTEN, _DIGESTED = "written", "digested"


@dataclass(frozen=True)
class Request:
    """One save: everything that is fixed before it starts, except the bytes of its shards."""

    step: int
    encoded: Encoded
    shards: list[OwnedShard]
    metrics: Mapping[str, float]
    info: Mapping[str, JSON]
    environment: Mapping[str, JSON]
    keep: Keep
    ranks: Ranks = field(default_factory=Ranks)
    hurry: threading.Event = field(default_factory=threading.Event)
    digests: Mapping[str, digest.Scope] = field(default_factory=dict)
    base: Base = field(default_factory=Base)  # which leaves are written once
    known: digest.KnownRows = field(default_factory=digest.KnownRows)  # of the base, from the save before
    parents: bool = True  # whether missing parent directories of the root may be made


class Follower(abc.ABC):
    """What copies the snapshots of a store elsewhere. Rank 0 calls it, in the thread that writes."""

    @abc.abstractmethod
    def became_durable(self, directory: Path) -> None:
        """Note that a snapshot can be copied: at once, and without waiting for the copy."""

    @abc.abstractmethod
    def holds(self, directory: Path) -> bool:
        """Tell whether a snapshot is still to be copied, so that it may not be deleted yet."""


def write(root: Path, request: Request, token: str, copies: Copies, *, clean: bool) -> Path | None:
    """Write this rank's shards of a snapshot durably; on rank 0 the snapshot is committed on return.

    After an error no file of the snapshot is left, once rank 0 has learned of it.

    Args:
        root: the directory of snapshots; made when missing.
        request: what to write.
        token: unique to this save, and the same on all its ranks.
        copies: waits for the bytes of the shards, and returns uint8[nbytes] of each.
        clean: whether to remove the files of dead writers.

    Returns:
        The directory of the snapshot on rank 0, None on other ranks.
    """
    contents = copies()
    temporary = make_temporary(root, request.step, token, request.ranks, parents=request.parents)
    messages = Messages(temporary, request.step, request.ranks, request.hurry)
    try:
        # Cleaning comes first, because it may free the space that this save needs.
        durable_directories.retry(root)
        if clean and request.ranks.rank == 0:
            durable_directories.clean(root)
        messages.open()
        pieces, rows = _write_shards(root, temporary, request, contents)
        pieces, rows = _exchange(messages, request, pieces, rows)
        request.known.end()
        if request.ranks.rank:
            return None
        messages.close()
        base_.close(temporary)
        # The manifest is written last, when the bytes of all ranks are on the disk; the rename in `commit` is the
        # instant at which the snapshot exists. Before it, whatever happens leaves a temporary directory only.
        durable_directories.write(temporary, dump(_manifest(request, pieces, rows)))
        final = root / directory_name(request.step, next_revision(root, request.step))
        durable_directories.commit(
            temporary, final, synced=temporary / "parts"
        )  # each rank has synchronized its shards already
        return final
    except BaseException as error:
        abandoned = messages.is_abandoned()  # asked first: what follows makes it true
        messages.abandon()
        if abandoned:
            raise Abandoned(f"rank 0 gave up the save of step {request.step}") from error
        raise


def _write_shards(
    root: Path, temporary: Path, request: Request, contents: list[np.ndarray]
) -> tuple[list[Piece], dict[int, digest.Row]]:
    pairs = list(zip(request.shards, contents, strict=True))
    base = [(shard, content) for shard, content in pairs if shard.leaf.path in request.base.paths]
    trained = [(shard, content) for shard, content in pairs if shard.leaf.path not in request.base.paths]
    with ThreadPoolExecutor(1, thread_name_prefix="purestep-hash") as pool:
        hashing = pool.submit(_hashed, *_apart(trained))  # runs while this thread waits for the disk
        part = _part_of_base(*_apart(base), request.ranks.rank)
        stored = part.is_stored(root)
        free_space.check_room(root, sum(content.nbytes for _, content in trained) + (0 if stored else part.nbytes))
        digesting = pool.submit(_rows_of_base, request.known, *_apart(base), part.pieces)
        pieces = _write_trained(temporary, request.ranks.rank, *_apart(trained))
        if not stored:
            part.write(root, temporary)
        sums, rows = hashing.result()
        return sorted([*with_checksums(pieces, sums), *part.pieces]), rows | digesting.result()


def _apart(pairs: list[tuple[OwnedShard, np.ndarray]]) -> tuple[list[OwnedShard], list[np.ndarray]]:
    return [shard for shard, _ in pairs], [content for _, content in pairs]


def _hashed(shards: list[OwnedShard], contents: list[np.ndarray]) -> tuple[list[str], dict[int, digest.Row]]:
    return checksums(contents), digest.rows_of(shards, contents)


def _part_of_base(shards: list[OwnedShard], contents: list[np.ndarray], rank: int) -> base_.Part:
    return base_.part_of(shards, contents, checksums(contents), rank)


def _rows_of_base(
    known: digest.KnownRows, shards: list[OwnedShard], contents: list[np.ndarray], pieces: list[Piece]
) -> dict[int, digest.Row]:
    rows = {}
    for shard, content, piece in zip(shards, contents, pieces, strict=True):
        if shard.is_full:
            sums = [(piece.box, piece.checksum)]
            rows[shard.index] = known.get(shard.leaf, sums, functools.partial(digest.row_of, shard.leaf, content))
    return rows


def _write_trained(temporary: Path, rank: int, shards: list[OwnedShard], contents: list[np.ndarray]) -> list[Piece]:
    packed = pack(shards, contents, rank=rank)
    if packed.arrays:
        state = temporary / STATE.format(rank)
        state.parent.mkdir()
        orbax_io.write_arrays(state, packed.arrays)
        # Orbax does not sync all that it writes: the files first, then the directories that name them.
        durable_directories.fsync_tree(state)
        durable_directories.fsync(state.parent)
        durable_directories.fsync(state.parent.parent)
    return packed.pieces


def _exchange(
    messages: Messages, request: Request, pieces: list[Piece], rows: dict[int, digest.Row]
) -> tuple[list[Piece], dict[int, digest.Row]]:
    """Return the pieces and rows of all ranks on rank 0; other ranks digest their leaves, and get what they know."""
    ranks, leaves = messages.ranks, request.encoded.leaves
    if ranks.size == 1:
        return pieces, rows
    messages.send(_WRITTEN, {"pieces": [list(piece) for piece in pieces], "rows": digest.to_json(rows)})
    # A rank without a shard of a long leaf has nothing to digest together with others: it is done, and does not wait.
    if ranks.rank and not any(digest.is_shared(leaves, piece) for piece in pieces):
        return pieces, rows
    received = messages.receive([rank for rank in range(ranks.size) if rank != ranks.rank], _WRITTEN)
    for body in received.values():
        pieces = pieces + [Piece.from_json(row) for row in body["pieces"]]
        rows = digest.from_json(body["rows"]) | rows
    pieces = sorted(pieces)
    base = {index for index, leaf in enumerate(leaves) if leaf.path in request.base.paths}
    sharded = digest.ShardedLeaves(leaves, pieces, ranks.rank)
    digested = sharded.rows(messages.temporary, orbax_io.read_arrays, request.known, base)
    if ranks.rank:
        messages.send(_DIGESTED, digest.to_json(digested))
        return pieces, rows | digested
    # Rank 0 waits for every rank that digests, also because they read this directory until they have sent their rows.
    sharing = {piece.rank for piece in pieces if digest.is_shared(leaves, piece)} - {0}
    for answer in messages.receive(sorted(sharing), _DIGESTED).values():
        rows |= digest.from_json(answer)
    return pieces, rows | digested


def _manifest(request: Request, pieces: list[Piece], rows: Mapping[int, digest.Row]) -> Manifest:
    parts = base_.parts_of(pieces)
    return Manifest(
        step=request.step,
        metrics=request.metrics,
        info=request.info,
        digest=digest.total(request.encoded, rows),
        digests={name: digest.total(request.encoded, rows, scope) for name, scope in request.digests.items()},
        scopes=request.digests,
        base=StoredBase(digest.total(request.encoded, rows, request.base), parts) if parts else StoredBase(),
        created=now(),
        environment=request.environment,
        keep=repr(request.keep),
        structure=request.encoded.structure,
        leaves=request.encoded.leaves,
        pieces=pieces,
    )


def preserve(index: Index, policy: Keep, newest: int, holds: Callable[[Path], bool] = lambda path: False) -> None:
    """Delete the snapshots that a durable one has replaced, and those that a policy does not select.

    Called only when the snapshot of the step `newest` is durable, because it replaces the deleted ones. It is never
    deleted itself: a run resumes from it. A deletion that fails is tried again after the next save.

    Args:
        index: of the directory.
        policy: which snapshots to preserve.
        newest: the step that has just been saved. Later steps are of a history that the run has gone back from.
        holds: whether a snapshot is still to be copied elsewhere; it is deleted after the next save then.
    """
    for entry in [*index.superseded(), *(entry for entry in index.revisions() if entry.step > newest)]:
        _delete(entry.path)
    records = index.records()
    selected = policy.select(records) | {newest}
    for entry in index.revisions():
        # A damaged snapshot stays: it costs space, but its arrays may be all that is left of its step.
        if entry.header is not None and entry.step not in selected and not holds(entry.path):
            _delete(entry.path)
    base_.remove_unused(index.root, [entry.header for entry in index.revisions()])


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        durable_directories.remove(path)
