"""What the background thread of a save does: pack, hash, write, commit, and only then delete what is not kept.

It owns the order of those steps. `store` gives it the copies to write and the function that writes arrays.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from purestep import tree
from purestep.snapshot import disk
from purestep.snapshot.codec import JSON, Encoded, from_text
from purestep.snapshot.index import Index
from purestep.snapshot.keep import Keep
from purestep.snapshot.manifest import Manifest, dump, now
from purestep.snapshot.pack import materialize, pack
from purestep.snapshot.staging import Copies

STATE = "parts/0/state"
WriteArrays = Callable[[Path, Mapping[str, np.ndarray]], None]
_SLACK = 1 << 20  # bytes of manifest and directories, besides the arrays


@dataclass(frozen=True)
class Request:
    """One save: everything that is fixed when `save` returns. `copies` waits for the bytes of the leaves."""

    step: int
    encoded: Encoded
    copies: Copies
    metrics: Mapping[str, float]
    info: Mapping[str, JSON]
    environment: Mapping[str, JSON]
    keep: Keep


def write(root: Path, request: Request, write_arrays: WriteArrays, *, clean: bool) -> None:
    """Write a snapshot durably. On return it is committed; on an error no trace of it is left.

    Args:
        root: the directory of snapshots; made when missing.
        request: what to write.
        write_arrays: writes flat arrays into a directory that does not exist yet.
        clean: whether to remove what dead writers left.
    """
    contents = request.copies()
    disk.make_root(root)
    if clean:
        disk.clean(root)
    disk.check_space(root, sum(content.nbytes for content in contents) + _SLACK)
    temporary = disk.begin(root, str(request.step))
    try:
        own = [leaf for leaf in request.encoded.leaves if leaf.has_bytes]
        with ThreadPoolExecutor(1, thread_name_prefix="purestep-digest") as pool:
            digest = pool.submit(_digest, request.encoded, contents)  # a core of its own while the disk is busy
            packed = pack(own, contents)
            if packed.arrays:
                (temporary / STATE).parent.mkdir(parents=True)
                write_arrays(temporary / STATE, packed.arrays)
                disk.fsync_tree(temporary / STATE)
        made = Manifest(
            step=request.step,
            metrics=request.metrics,
            info=request.info,
            digest=digest.result(),
            created=now(),
            environment=request.environment,
            keep=repr(request.keep),
            structure=request.encoded.structure,
            leaves=request.encoded.leaves,
            pieces=packed.pieces,
        )
        disk.write(temporary, dump(made))
        _commit(temporary, root / str(request.step))
    except BaseException:
        disk.abandon(temporary)
        raise


def preserve(index: Index, policy: Keep) -> None:
    """Delete what a policy does not select. The newest snapshot always stays: a run resumes from it."""
    records = index.records()
    chosen = policy.select(records) | {step for step, _ in records[-1:]}
    for step, _ in records:
        if step not in chosen:
            disk.remove(index.root / str(step))


def _commit(temporary: Path, final: Path) -> None:
    if not final.exists() and not final.is_symlink():
        disk.commit(temporary, final, synced=temporary / STATE)
        return
    # `save` has refused every step that is listed: this is a damaged snapshot of ours, or something of another owner.
    if not final.is_symlink() and any((final / part).exists() for part in ("meta", "parts")):
        aside = disk.set_aside(final)
        disk.commit(temporary, final, synced=temporary / STATE)
        disk.abandon(aside)
        return
    number = 1
    while (stray := final.with_name(f"{final.name}.stray-{number}")).exists():
        number += 1
    final.rename(stray)
    disk.commit(temporary, final, synced=temporary / STATE)


def _digest(encoded: Encoded, contents: list[np.ndarray]) -> str:
    remaining = iter(contents)
    values: list[Any] = []
    for leaf in encoded.leaves:
        if leaf.text is not None:
            values.append(from_text(leaf.kind, leaf.text))
        elif leaf.alias is not None:
            values.append(values[leaf.alias])
        else:
            values.append(materialize(leaf, next(remaining)))
    return tree.digest_leaves((leaf.path, value) for leaf, value in zip(encoded.leaves, values, strict=True))
