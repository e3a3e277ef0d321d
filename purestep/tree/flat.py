"""Flat dicts of tensors (parameters, gradients, moments), whose structure is remembered by their keys.

A step flattens a dozen of them. optree looks at each leaf and sorts the keys every time; here the keys are looked up,
and one comparison in C shows that all values are tensors. The structures are optree's own.
"""

from __future__ import annotations

import operator
from collections.abc import Callable, Iterable
from typing import Any

import optree
import torch

_MOST = 256  # structures remembered; a program has a few
_TENSORS = {torch.Tensor}


class FlatDict:
    """What is remembered of the dicts with some keys in some order.

    Attributes:
        structure: optree's structure of them.
        leaves: returns the values of such a dict in the order of its sorted keys, a tuple.
    """

    __slots__ = ("_back", "_keys", "leaves", "structure")

    def __init__(self, keys: tuple[str, ...]) -> None:
        order: list[Any]
        order, self.structure = optree.tree_flatten(dict(zip(keys, range(len(keys)), strict=True)))  # type: ignore[arg-type]
        back = sorted(range(len(keys)), key=order.__getitem__)
        self._keys = keys
        self.leaves: Callable[[dict[str, Any]], tuple[Any, ...]] = operator.itemgetter(*(keys[i] for i in order))
        self._back = None if order == back == list(range(len(keys))) else operator.itemgetter(*back)

    def tree(self, leaves: Iterable[Any]) -> dict[str, Any]:
        """Return the dict of some leaves, with the keys in the order of the dicts that it was made for.

        Raises:
            ValueError: their number is another.
        """
        values = list(leaves)
        if len(values) != len(self._keys):
            raise ValueError(f"{len(values)} leaves for {len(self._keys)} keys")
        return dict(zip(self._keys, values if self._back is None else self._back(values), strict=True))


_by_keys: dict[tuple[Any, ...], FlatDict] = {}
_by_structure: dict[int, FlatDict] = {}  # by the id of a structure that is held by its entry


def flat_of(tree: dict[Any, Any]) -> FlatDict | None:
    """Return what is remembered of a dict; None for one that is not a flat dict of plain tensors, or has fewer than
    two."""
    if len(tree) < 2 or set(map(type, tree.values())) != _TENSORS:
        return None
    keys = tuple(tree)
    found = _by_keys.get(keys)
    if found is None and all(type(key) is str for key in keys):
        if len(_by_keys) >= _MOST:
            _by_keys.clear()
            _by_structure.clear()
        found = _by_keys[keys] = FlatDict(keys)
        _by_structure[id(found.structure)] = found
    return found


def flat_with(structure: optree.PyTreeSpec) -> FlatDict | None:
    """Return what is remembered of the dicts of a structure that `flat_of` made."""
    found = _by_structure.get(id(structure))
    return found if found is not None and found.structure is structure else None
