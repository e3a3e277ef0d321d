"""Which states were given away: by a donating call, to the step that it calls, on this thread.

A state that was given away may be written over by the step, once it says that it has no more use for it. Nothing here
writes or marks anything: `optim.blocks` writes, and `jit.give` makes the consumed state unusable.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Iterable, Iterator, Sequence
from typing import Any, TypeVar

from torch import Tensor

from purestep import tree

T = TypeVar("T")
_local = threading.local()


class Given:
    """The states of one call.

    Attributes:
        nodes: the states, by identity.
        taken: whether the step began to write over one of them.
    """

    def __init__(self, nodes: Sequence[Any]) -> None:
        self.nodes = list(nodes)
        self.taken = False


@contextlib.contextmanager
def giving(nodes: Sequence[Any]) -> Iterator[Given]:
    """Give states away for the duration of a `with` block."""
    before = getattr(_local, "given", None)
    _local.given = Given(nodes)
    try:
        yield _local.given
    finally:
        _local.given = before


def offered(state: Any) -> bool:
    """Tell whether a state was given away."""
    found = getattr(_local, "given", None)
    return found is not None and any(node is state for node in found.nodes)


def take(state: Any) -> bool:
    """Tell whether a state was given away, and note that it is about to be written over."""
    if not offered(state):
        return False
    _local.given.taken = True
    return True


def also(state: Any, view: Any) -> None:
    """Give another view of a state away, if the state was."""
    if offered(state):
        _local.given.nodes.append(view)


def memory(tensors: Iterable[Tensor]) -> frozenset[int]:
    """Return where the memory of tensors is."""
    return frozenset(x.untyped_storage().data_ptr() for x in tensors)


def apart(value: T, places: frozenset[int]) -> T:
    """Return a tree with copies in place of the tensors that lie in some memory, which is about to be written over."""
    if not places:
        return value
    return tree.map(lambda x: x.clone() if shares(x, places) else x, value)


def shares(leaf: Any, places: frozenset[int]) -> bool:
    """Tell whether a leaf is a tensor that lies in some memory."""
    return isinstance(leaf, Tensor) and leaf.untyped_storage().data_ptr() in places
