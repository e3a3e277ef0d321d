"""What the background thread of a save does: pack, hash, write, meet the other ranks, commit, and then delete.

It owns the order of those steps: nothing is deleted, moved or written over before what replaces it is durable. `store`
gives it the copies to write.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from purestep.snapshot import arrays, digest, disk, space
from purestep.snapshot.codec import JSON, Encoded
from purestep.snapshot.digest import STATE
from purestep.snapshot.index import Index, directory_name, next_revision
from purestep.snapshot.keep import Keep
from purestep.snapshot.manifest import Manifest, dump, now
from purestep.snapshot.meeting import GaveUp, Meeting, convene
from purestep.snapshot.pack import Piece, checksums, pack, sealed
from purestep.snapshot.ranks import Ranks
from purestep.snapshot.shards import Owned
from purestep.snapshot.staging import Copies

_WRITTEN, _DIGESTED = "written", "digested"


@dataclass(frozen=True)
class Request:
    """One save: all that is fixed before it begins but the bytes of its parts."""

    step: int
    encoded: Encoded
    parts: list[Owned]
    metrics: Mapping[str, float]
    info: Mapping[str, JSON]
    environment: Mapping[str, JSON]
    keep: Keep
    ranks: Ranks = field(default_factory=Ranks)
    hurry: threading.Event = field(default_factory=threading.Event)
    digests: Mapping[str, digest.Scope] = field(default_factory=dict)
    parents: bool = True  # whether what holds the root may be made


def write(root: Path, request: Request, token: str, copies: Copies, *, clean: bool) -> None:
    """Write this rank's part of a snapshot durably; on rank 0 it is committed on return.

    On an error no trace of the snapshot is left once rank 0 has seen it.

    Args:
        root: the directory of snapshots; made when missing.
        request: what to write.
        token: what the ranks of this save have agreed on, and no other save has.
        copies: waits for the bytes of the parts, and returns uint8[nbytes] of each.
        clean: whether to remove what dead writers left.
    """
    contents = copies()
    temporary = convene(root, request.step, token, request.ranks, parents=request.parents)
    meeting = Meeting(temporary, request.step, request.ranks, request.hurry)
    try:
        if clean and request.ranks.rank == 0:
            disk.clean(root)
        meeting.begin()
        space.check_room(root, sum(content.nbytes for content in contents))
        own, rows = _write_part(temporary, request, contents)
        pieces, rows = _meet(meeting, request, own, rows)
        if request.ranks.rank:
            return
        meeting.end()
        disk.write(temporary, dump(_manifest(request, pieces, rows)))
        final = root / directory_name(request.step, next_revision(root, request.step))
        disk.commit(temporary, final, synced=temporary / "parts")  # each rank has forced its own to the disk
    except BaseException as error:
        over = meeting.is_over()
        meeting.give_up()
        if over:
            raise GaveUp(f"rank 0 gave up the save of step {request.step}") from error
        raise


def _write_part(
    temporary: Path, request: Request, contents: list[np.ndarray]
) -> tuple[list[Piece], dict[int, digest.Row]]:
    rank = request.ranks.rank

    def hashed() -> tuple[list[str], dict[int, digest.Row]]:
        return checksums(contents), digest.rows_of(request.parts, contents)

    with ThreadPoolExecutor(1, thread_name_prefix="purestep-hash") as pool:
        hashing = pool.submit(hashed)  # while the disk is busy
        packed = pack(request.parts, contents, rank=rank)
        if packed.arrays:
            state = temporary / STATE.format(rank)
            state.parent.mkdir()
            arrays.write_arrays(state, packed.arrays)
            disk.fsync_tree(state)
            disk.fsync(state.parent)
            disk.fsync(state.parent.parent)
        sums, rows = hashing.result()
        return sealed(packed.pieces, sums), rows


def _meet(
    meeting: Meeting, request: Request, own: list[Piece], rows: dict[int, digest.Row]
) -> tuple[list[Piece], dict[int, digest.Row]]:
    """Return all pieces and rows on rank 0; other ranks do their share and need to know nothing."""
    ranks, leaves = meeting.ranks, request.encoded.leaves
    if ranks.size == 1:
        return own, rows
    meeting.tell(_WRITTEN, {"pieces": [list(piece) for piece in own], "rows": digest.to_json(rows)})
    if ranks.rank and not any(digest.is_shared(leaves, piece) for piece in own):
        return own, rows
    heard = meeting.hear([rank for rank in range(ranks.size) if rank != ranks.rank], _WRITTEN)
    for body in heard.values():
        own = own + [Piece.from_json(row) for row in body["pieces"]]
        rows = digest.from_json(body["rows"]) | rows
    pieces = sorted(own)
    made = digest.Others(leaves, pieces, ranks.rank).rows(meeting.temporary, arrays.read_arrays)
    if ranks.rank:
        meeting.tell(_DIGESTED, digest.to_json(made))
        return pieces, rows | made
    # All that share leaves: until they have told, they look into this directory.
    sharing = {piece.rank for piece in pieces if digest.is_shared(leaves, piece)} - {0}
    for answer in meeting.hear(sorted(sharing), _DIGESTED).values():
        rows |= digest.from_json(answer)
    return pieces, rows | made


def _manifest(request: Request, pieces: list[Piece], rows: Mapping[int, digest.Row]) -> Manifest:
    return Manifest(
        step=request.step,
        metrics=request.metrics,
        info=request.info,
        digest=digest.total(request.encoded, rows),
        digests={name: digest.total(request.encoded, rows, scope) for name, scope in request.digests.items()},
        scopes=request.digests,
        created=now(),
        environment=request.environment,
        keep=repr(request.keep),
        structure=request.encoded.structure,
        leaves=request.encoded.leaves,
        pieces=pieces,
    )


def preserve(index: Index, policy: Keep, newest: int) -> None:
    """Delete what a durable snapshot has replaced, and what a policy does not select.

    Called only when the snapshot of the step `newest` is durable, because it is what the deleted ones are given up for.
    It always stays: a run resumes from it. What cannot be deleted now is tried again after the next save.

    Args:
        index: of the directory.
        policy: which to preserve.
        newest: the step that has just been saved. Later ones belong to a future that the run has gone back from.
    """
    for entry in [*index.superseded(), *(entry for entry in index.revisions() if entry.step > newest)]:
        _delete(entry.path)
    records = index.records()
    chosen = policy.select(records) | {newest}
    for entry in index.revisions():
        if entry.header is not None and entry.step not in chosen:
            _delete(entry.path)


def _delete(path: Path) -> None:
    with contextlib.suppress(OSError):
        disk.remove(path)
