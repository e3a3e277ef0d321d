"""Donation: which states a call may write over, and where their memory lies.

A donating step donates its state for the time of one call, on this thread. The update writes over the memory of a
donated state once the step says that it reads the state no more. Nothing here writes: `optim.kernels.sliced` does, and
so does the epilogue of a compiled graph. Eager and compiled donation share the rest: giving each leaf memory of its
own, moving other values out of the memory that is written over, and making the consumed state unusable.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from purestep import _cells, tree

T = TypeVar("T")
_PLAIN = {Tensor}


class Donation:
    """The states that are donated to one call.

    Attributes:
        states: the states, by identity.
        memory: addresses of the storages that an update of them writes over; empty where it writes over none.
        written: whether the step began to write over them.
    """

    def __init__(self, states: Sequence[object], memory: frozenset[int]) -> None:
        self.states, self.memory = list(states), memory
        self.written = False


class _Local(threading.local):
    donation: Donation | None = None


_local = _Local()


@contextlib.contextmanager
def donating(states: Sequence[object], memory: frozenset[int]) -> Iterator[Donation]:
    """Donate states for the duration of a `with` block."""
    before = _local.donation
    _local.donation = donation = Donation(states, memory)
    try:
        yield donation
    finally:
        _local.donation = before


def donation_of(state: object) -> Donation | None:
    """Return the donation that a state is part of; None for a state that its caller goes on using."""
    donation = _local.donation
    if donation is None or not any(donated is state for donated in donation.states):
        return None
    return donation


def also_donated(state: object, view: object) -> None:
    """Donate another view of a state (its local shards), if the state is donated: it has the same memory."""
    donation = donation_of(state)
    if donation is not None:
        donation.states.append(view)


# --- memory -----------------------------------------------------------------------------------------------------------


def memory_of(leaves: Iterable[object]) -> frozenset[int]:
    """Return the addresses of the storages of the tensors among some leaves. Empty tensors and meta tensors have none.

    Examples:
        >>> x = torch.ones(4)
        >>> memory_of([x[:2], x[2:], torch.ones(0)]) == {x.data_ptr()}
        True
    """
    return frozenset(_starts([x for x in leaves if isinstance(x, Tensor)]))


def _starts(tensors: Sequence[Tensor]) -> list[int]:
    """Return the addresses of the storages of some tensors; those without memory are left out."""
    if set(map(type, tensors)) <= _PLAIN and set(map(Tensor.storage_offset, tensors)) <= {0}:
        return [start for start in map(Tensor.data_ptr, tensors) if start]  # several times as fast
    return [start for x in tensors if x.numel() and (start := x.untyped_storage().data_ptr())]


def lies_in(leaf: object, memory: frozenset[int]) -> bool:
    """Tell whether a leaf is a tensor of some memory."""
    return isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in memory


def leaves_apart(leaves: Sequence[T], memory: frozenset[int]) -> list[T]:
    """Return leaves with copies in place of the tensors of some memory, which is about to be written over."""
    return [x.detach().clone() if isinstance(x, Tensor) and lies_in(x, memory) else x for x in leaves]  # type: ignore[misc]


def apart(value: T, memory: frozenset[int]) -> T:
    """Return a tree with copies in place of the tensors of some memory, which is about to be written over."""
    if not memory or memory.isdisjoint(_starts([x for x in tree.leaves(value) if isinstance(x, Tensor)])):
        return value
    leaves, structure = tree.flatten(value)
    return tree.unflatten(structure, leaves_apart(leaves, memory))


def unaliased(leaves: Sequence[Any], state_leaves: int) -> list[Any]:
    """Return leaves with copies in place of those that share memory with a leaf of the state, or with themselves.

    A state may hold one tensor twice (an average that starts as the parameters); as a value that is no different from
    two tensors, so a donated state gets two.

    Args:
        leaves: those of the state, and others after them.
        state_leaves: how many are the state's.
    """
    if set(map(type, leaves)) <= _PLAIN and all(map(Tensor.is_contiguous, leaves)):
        starts = _starts(leaves)
        if len(set(starts)) == len(starts):
            return list(leaves)
    owned: set[int] = set()
    result = list(leaves)
    for i, leaf in enumerate(leaves):
        if not isinstance(leaf, Tensor) or not leaf.numel():
            continue
        start = leaf.untyped_storage().data_ptr()
        overlaps = i < state_leaves and _overlaps_itself(leaf)
        if start in owned or overlaps:
            result[i] = leaf.detach().clone(
                memory_format=torch.contiguous_format if overlaps else torch.preserve_format
            )
        elif i < state_leaves:
            owned.add(start)
    return result


def _overlaps_itself(leaf: Tensor) -> bool:
    """Tell whether several elements have one address, as `expand` makes them."""
    return any(step == 0 and size > 1 for size, step in zip(leaf.shape, leaf.stride(), strict=True))


# --- after the call ---------------------------------------------------------------------------------------------------


def consume(value: object, by: str, kept: Sequence[object] = ()) -> None:
    """Make the outermost nodes of a donated value unusable. Plain dicts, lists and tuples stay, what they hold is
    consumed.

    Args:
        value: what was donated.
        by: who wrote over it.
        kept: nodes that stay usable, because the step returned them as they are.
    """
    place = _cells.place()
    for node in nodes(value):
        if not any(node is other for other in kept):
            tree.consume(node, by, place)


def nodes(value: object) -> list[object]:
    """Return the outermost nodes of a value that can be made unusable."""
    if tree.node_name(type(value)):
        return [value]
    if isinstance(value, dict):
        return [node for child in value.values() for node in nodes(child)]
    if isinstance(value, (list, tuple)):
        return [node for child in value for node in nodes(child)]
    return []


def copied(value: Any) -> Any:
    """Return a tree with tensors of its own, which stay as they are when a step donates those of `value`."""
    return tree.map(lambda leaf: leaf.clone() if isinstance(leaf, Tensor) else leaf, value)
