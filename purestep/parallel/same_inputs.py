"""What the ranks pass to a step under a plan, compared: replicas that are given other values diverge without an error.

The first call compares the batch and the state by content. Later calls compare the size and the shapes of the batch,
which travel with the metrics of the step. Sources that slice batches for a run compare with `fingerprint`.
"""

from __future__ import annotations

import functools
import zlib
from collections.abc import Mapping

import torch
import torch.distributed as dist
from torch import Tensor

from purestep import tree
from purestep.bits import leaf_bytes
from purestep.distributed import control
from purestep.errors import RankError, TreeError, explain
from purestep.sharding.local_batches import LocalBatch
from purestep.sharding.placement import is_split, part_of, shard_of
from purestep.sharding.plan import Plan

SAME_STATE = "state = ps.init(model, tx, seed=0, plan=plan)   # the same seed and code on every rank"
SAME_DATA = "a loader that gives every rank the same batches in the same order; ps.data.batches does"
SAME_BATCH = (
    "step(state, batch)   # the same global batch on every rank: a loader without DistributedSampler\n"
    "or step(state, ps.sharding.LocalBatch(rows, samples=..., microbatches=...))   # this rank's rows of it"
)


def compare_first(plan: Plan, count: int, state: object, batch: object) -> None:
    """Compare the batch and the state of the first call of a step under a plan; every rank makes it.

    Args:
        plan: the plan.
        count: number of microbatches of the whole batch (V).
        state: as it is at rest.
        batch: the global batch, or this rank's LocalBatch, of which only the sizes can be compared.

    Raises:
        RankError: on every rank, with what differs and on which ranks.
    """
    once = _once(dist.group.WORLD, plan, count)
    if once.done:
        return
    control.agree_each({"the batch": fingerprint(batch)}, what="the first batch of a step", instead=SAME_BATCH)
    compare_states(state)
    once.done = True


class _Once:
    """Whether the ranks have compared their first call."""

    done = False


@functools.lru_cache(maxsize=64)
def _once(job: dist.ProcessGroup | None, plan: Plan, count: int) -> _Once:
    return _Once()


# --- batches ----------------------------------------------------------------------------------------------------------


def fingerprint(batch: object) -> str:
    """Return shapes and a hash of the content of a global batch; of a LocalBatch what all ranks have in common.

    Examples:
        >>> fingerprint({"x": torch.zeros(4, 2)}).partition("; content ")[0]
        "['x']: float32[4, 2]"
        >>> fingerprint(LocalBatch(torch.zeros(2), samples=4, microbatches=2))
        '4 samples in 2 microbatches'
    """
    if isinstance(batch, LocalBatch):
        return f"{batch.samples} samples in {batch.microbatches} microbatches"
    import xxhash

    content, shown = xxhash.xxh3_64(), []
    for path, leaf in zip(tree.paths(batch), tree.leaves(batch), strict=True):
        try:
            kind, data = leaf_bytes(path, leaf)
        except TreeError:
            continue  # an object that only the loss function understands
        shown.append(f"{path}: {kind}" if path else kind)
        content.update(f"{path} {kind} ".encode())
        content.update(data)
    return f"{', '.join(shown[:4])}{', ...' if len(shown) > 4 else ''}; content {content.hexdigest()}"


def sizes_of(batch: object, samples: int) -> tuple[int, int]:
    """Return the samples of a global batch and a number that stands for its shapes; 0 where a rank has its rows only.

    Examples:
        >>> sizes_of(torch.zeros(4, 2), 4) == sizes_of(torch.ones(4, 2), 4), sizes_of(torch.zeros(4, 3), 4)[0]
        (True, 4)
    """
    if isinstance(batch, LocalBatch):
        return samples, 0
    return samples, _shapes_number(tuple([(x.shape, x.dtype) for x in tree.leaves(batch) if isinstance(x, Tensor)]))


@functools.lru_cache(maxsize=256)
def _shapes_number(shapes: tuple[tuple[torch.Size, torch.dtype], ...]) -> int:
    return zlib.crc32(repr(shapes).encode()) | 1


def compare_sizes(heard: Mapping[int, tuple[int, int]]) -> None:
    """Refuse batches of other sizes or shapes on some of the ranks, once the exchanges of the step are over.

    Args:
        heard: by rank, what `sizes_of` returned there.

    Raises:
        RankError: on every rank, with the samples by rank.
    """
    if len(set(heard.values())) > 1:
        texts = {
            rank: f"{n} samples" + (f", shapes {shapes:x}" if shapes else "") for rank, (n, shapes) in heard.items()
        }
        control.refuse_different({"the size of the batch": texts}, instead=SAME_BATCH)


# --- states -----------------------------------------------------------------------------------------------------------


def compare_states(state: object) -> None:
    """Compare the leaves that are whole on every rank, and the parts that several ranks hold; every rank calls it.

    Raises:
        RankError: on every rank, with the first leaves that differ.
    """
    import xxhash

    whole, parts, places = xxhash.xxh3_128(), xxhash.xxh3_128(), []
    hashes = []
    for path, leaf in zip(tree.paths(state, "state"), tree.leaves(state), strict=True):
        split = is_split(leaf)
        kind, content = leaf_bytes(path, part_of(leaf))
        target = parts if split else whole
        target.update(f"{path} {kind} ".encode())
        target.update(content)
        if split:
            places.append((path, kind, shard_of(leaf)))
        else:
            hashes.append((path, kind, xxhash.xxh3_64_hexdigest(content)))
    found = control.gather((whole.hexdigest(), _hash_of(places), parts.hexdigest()), what="the state")
    if len({w for w, _, _ in found}) > 1:
        everything = control.gather(hashes, what="the leaves of the state")
        control.agree_each(_differing(everything, hashes), what="the state", instead=SAME_STATE)
    held: dict[str, tuple[int, str]] = {}
    for number, (_, where, content) in enumerate(found):
        other, same = held.setdefault(where, (number, content))
        if same != content:
            raise RankError(
                explain(
                    "ranks that hold the same part of the state hold different values",
                    where=f"ranks {other} and {number}",
                    instead=SAME_STATE,
                )
            )


def _hash_of(value: object) -> str:
    """Return a short hash of the repr of a value."""
    import xxhash

    return str(xxhash.xxh3_64_hexdigest(repr(value).encode()))


def _differing(everything: list[list[tuple[str, str, str]]], mine: list[tuple[str, str, str]]) -> dict[str, str]:
    """The leaves of this rank that are not the same on every rank, at most a few of them."""
    others = [{path: (kind, content) for path, kind, content in entries} for entries in everything]
    paths = [p for p, *_ in everything[0] if len({repr(o.get(p)) for o in others}) > 1]
    own = {path: f"{kind} {content}" for path, kind, content in mine}
    return {path: own.get(path, "nothing") for path in paths[:4]} or {"the structure of the state": str(len(own))}
