"""The small values of microbatches: metrics, weights and counters travel as bytes, and every rank adds them up itself.

They merge by rules of their own (a maximum, the last), so they are not summed on the way. Metrics that keep every
sample differ in size from rank to rank: they follow as pickles, after their lengths.
"""

from __future__ import annotations

import functools
import pickle
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from purestep import tree
from purestep.distributed import collectives
from purestep.metrics import Growing, Last, Max, Mean, Min, Sum
from purestep.microbatch import Accumulation, Partial, merge
from purestep.parallel.tree_reduce import Flat
from purestep.treesum import Node, TreeSum

_HEAD = 16  # bytes of what a rank tells of its batch


def exchange_small(
    nodes: Mapping[Node, Partial],
    owners: Sequence[Sequence[Node]],
    group: dist.ProcessGroup | None,
    pattern: Partial,
    sums: Accumulation,
) -> Callable[[], Partial]:
    """Begin to add up what all ranks hold, and return the function that waits and returns it, without its vector.

    Args:
        nodes: the parts of the tree that this rank holds.
        owners: those of each rank of the group.
        group: the ranks.
        pattern: a part of that structure, for a rank that holds none.
        sums: of the batch; its samples are the weight where there is no other, and it keeps what the others told.
    """
    whole = TreeSum(merge)
    if group is None:
        for node, part in nodes.items():
            whole.put(node, _without_vector(part, *_leaves(part)))
        return lambda: _weighing(whole.result(), sums.samples)
    growing, device = _growing(pattern), sums.state.step.device
    like, structure = _leaves(pattern, growing, device)
    flat = _bytes(tuple((x.shape, x.dtype, x.device) for x in like))
    held = [flat.pack(_leaves(nodes[node], growing, device)[0]) for own in owners for node in own if node in nodes]
    most = max(len(own) for own in owners)
    # The sizes of the batch go along, at no exchange of their own. On a GPU reading them would make the host wait.
    head = [torch.tensor(sums.told).view(torch.uint8)] if flat.on_cpu else []
    row = torch.cat([*head, *held, torch.zeros(flat.size * (most - len(held)), dtype=torch.uint8, device=flat.device)])
    pending = collectives.gather(row, group)
    kept = _gather_growing(nodes, owners, group, growing, row.device) if growing else None

    def result() -> Partial:
        rows = pending.wait()
        if flat.on_cpu:
            told = rows[:, :_HEAD].contiguous().view(torch.int64).tolist()
            sums.heard = dict(zip(dist.get_process_group_ranks(group), map(tuple, told), strict=True))
            rows = rows[:, _HEAD:]
        if not growing and (order := _level_order(pattern, owners)) is not None:
            if order != list(range(len(order))):
                parts = rows.unbind()  # not `rows[order]`: a card would wait for the indices
                rows = torch.stack([parts[rank] for rank in order])
            return _weighing(_by_level(pattern, flat.unpack_rows(rows), structure), sums.samples)
        found = {} if kept is None else kept()
        for own, packed in zip(owners, rows, strict=True):
            for node, values in zip(own, packed.split(flat.size), strict=False):
                part = _without_vector(pattern, flat.unpack(values), structure)
                if growing and node in found:
                    both = {**part.metrics, **found[node]}
                    part.metrics = {name: both[name] for name in pattern.metrics}
                whole.put(node, part)
        return _weighing(whole.result(), sums.samples)

    return result


def _level_order(pattern: Partial, owners: Sequence[Sequence[Node]]) -> list[int] | None:
    """Return the ranks in the order of the tree, where their parts can be added a level at a time; None elsewhere.

    That is so where each rank holds one part, all of one level, and metrics merge number by number: a thousand ranks
    are then ten rounds of additions, in the order in which they would be added one by one.
    """
    nodes = [node for own in owners for node in own]
    level = nodes[0][0] if nodes else 0
    if len(nodes) != len(owners) or not all(type(metric) in _BY_NUMBER for metric in pattern.metrics.values()):
        return None
    order = sorted(range(len(nodes)), key=nodes.__getitem__)
    return order if [nodes[rank] for rank in order] == [(level, place) for place in range(len(nodes))] else None


_BY_NUMBER = {Mean, Sum, Min, Max, Last}


def _by_level(pattern: Partial, leaves: Sequence[Tensor], structure: tree.Structure) -> Partial:
    """Return the sum of parts whose small values are the rows of some tensors, a level of the tree at once."""
    while len(leaves[0]) > 1 if leaves else False:
        even, rest = len(leaves[0]) // 2 * 2, len(leaves[0]) % 2
        first, second = (
            _without_vector(pattern, [leaf[start:even:2] for leaf in leaves], structure) for start in (0, 1)
        )
        merged = _leaves(merge(first, second))[0]
        leaves = [torch.cat([a, b[even:]]) for a, b in zip(merged, leaves, strict=True)] if rest else merged
    return _without_vector(pattern, [leaf[0] for leaf in leaves], structure)


def _leaves(
    part: Partial, left_out: frozenset[str] = frozenset(), device: torch.device | None = None
) -> tuple[list[Tensor], Any]:
    """Return the small values of a part as tensors, on a device, from which they are sent; and their structure."""
    weight = part.weight if isinstance(part.weight, Tensor) else None
    metrics = {name: metric for name, metric in part.metrics.items() if name not in left_out}
    leaves, structure = tree.flatten((weight, part.kept, metrics))
    return [_tensor(x, device) for x in leaves], structure


def _tensor(leaf: Any, device: torch.device | None = None) -> Tensor:
    """Numbers become tensors on one process as on many, so that nothing depends on how many there are.

    A metric that was made of a number is on the CPU, and travels with those that are on the card.
    """
    if not isinstance(leaf, Tensor):
        return torch.full((), leaf, dtype=_wide(leaf), device=device)
    return leaf if device is None or leaf.device == device else leaf.to(device, non_blocking=True)


def _wide(number: Any) -> torch.dtype:
    return torch.float64 if isinstance(number, float) else torch.int64


def _without_vector(like: Partial, leaves: Sequence[Tensor], structure: tree.Structure) -> Partial:
    weight, kept, metrics = tree.unflatten(structure, leaves)
    return Partial([], like.weight if weight is None else weight, kept, metrics)


def _weighing(part: Partial, samples: int) -> Partial:
    if isinstance(part.weight, int):
        part.weight = samples
    return part


# --- metrics that keep every sample -----------------------------------------------------------------------------------


def _growing(part: Partial) -> frozenset[str]:
    """The names of the metrics whose tensors differ in size from rank to rank; every rank finds the same."""
    return frozenset(name for name, m in part.metrics.items() if isinstance(m, Growing) and m.grows)


def _gather_growing(
    nodes: Mapping[Node, Partial],
    owners: Sequence[Sequence[Node]],
    group: dist.ProcessGroup,
    names: frozenset[str],
    device: torch.device,
) -> Callable[[], dict[Node, dict[str, Any]]]:
    """Begin to exchange such metrics; the function that is returned waits, and gives them by part of the tree."""
    mine = [
        {name: tree.map(lambda x: _tensor(x).cpu(), nodes[node].metrics[name]) for name in sorted(names)}
        for own in owners
        for node in own
        if node in nodes
    ]
    data = torch.frombuffer(bytearray(pickle.dumps(mine)), dtype=torch.uint8)
    lengths = collectives.numbers(len(data), group, device)
    filling = torch.zeros(max(lengths) - len(data), dtype=torch.uint8)
    pending = collectives.gather(torch.cat([data, filling]).to(device), group)

    def result() -> dict[Node, dict[str, Any]]:
        found: dict[Node, dict[str, Any]] = {}
        for own, row, length in zip(owners, pending.wait().cpu(), lengths, strict=True):
            theirs = pickle.loads(row[:length].numpy().tobytes())
            found |= {
                node: tree.map(lambda x: x.to(device), metrics) for node, metrics in zip(own, theirs, strict=False)
            }
        return found

    return result


class _Bytes:
    """Small tensors of several dtypes as bytes, the widest first: each begins at a multiple of its size."""

    def __init__(self, like: Sequence[Tensor], device: torch.device | None) -> None:
        self.order = sorted(range(len(like)), key=lambda i: -like[i].element_size())
        self.flat = Flat([like[i] for i in self.order])
        self.lengths = [sum(n) * d.itemsize for n, d in zip(self.flat.lengths, self.flat.dtypes, strict=True)]
        self.size = sum(self.lengths) + -sum(self.lengths) % 8
        self.device = device
        self.on_cpu = device is None or device.type == "cpu"
        self.filling = torch.zeros(self.size - sum(self.lengths), dtype=torch.uint8, device=device)

    def pack(self, values: Sequence[Tensor]) -> Tensor:
        pieces = [x.view(torch.uint8) for x in self.flat.pack([values[i] for i in self.order])]
        return torch.cat([*pieces, self.filling])

    def unpack(self, packed: Tensor) -> list[Tensor]:
        pieces = packed[: sum(self.lengths)].split(self.lengths)
        flats = [piece.view(dtype) for piece, dtype in zip(pieces, self.flat.dtypes, strict=True)]
        return self._ordered(self.flat.unpack(flats))

    def unpack_rows(self, packed: Tensor) -> list[Tensor]:
        """Return the values of many parts, `[m, size]` bytes, with the parts as first dim."""
        pieces = packed[:, : sum(self.lengths)].split(self.lengths, dim=1)
        flats = [piece.contiguous().view(dtype) for piece, dtype in zip(pieces, self.flat.dtypes, strict=True)]
        return self._ordered(self.flat.unpack_rows(flats, len(packed)))

    def _ordered(self, values: Sequence[Tensor]) -> list[Tensor]:
        found: list[Any] = [None] * len(self.order)
        for i, value in zip(self.order, values, strict=True):
            found[i] = value
        return found


@functools.lru_cache(maxsize=256)
def _bytes(kinds: tuple[tuple[torch.Size, torch.dtype, torch.device], ...]) -> _Bytes:
    """Return the layout of some leaves, made once for each list of kinds."""
    like = [torch.empty(shape, dtype=dtype, device="meta") for shape, dtype, _ in kinds]
    return _Bytes(like, kinds[0][2] if kinds else None)
