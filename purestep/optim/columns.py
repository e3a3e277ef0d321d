"""The parts of an optimizer state that belong to given parameters, or to rows of one, found by name without values.

Owns `Block`. `kernels.sliced` updates a state by rows, `scope` by tensors if an update needs full tensors.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from purestep import tree
from purestep.tree import Structure

# Elements of one slice of a long tensor, and of one block of short tensors.
PART = 4


@dataclass(frozen=True)
class Block:
    """Some parameters, or some rows of one, and their part of the state.

    Attributes:
        names: names of the parameters.
        rows: rows of the one parameter; None for full parameters.
        structure: structure of the state without the other parameters.
        leaves: for each leaf of that structure, its index among all leaves, and whether it belongs to one parameter.
    """

    names: tuple[str, ...]
    rows: slice | None
    structure: Structure
    leaves: tuple[tuple[int, bool], ...]


@functools.lru_cache(maxsize=32)
def rows_of(
    structure: Structure, shapes: tuple[Any, ...], leaf_shapes: tuple[Any, ...], limits: tuple[int, ...], whole: bool
) -> list[Block] | None:
    """Slice long parameters along dim 0, unless `whole`, and group short ones; None if the state cannot be sliced."""
    cutter = _Selector(tree.unflatten(structure, range(structure.num_leaves)), dict(shapes), leaf_shapes)
    blocks: list[Block] = []
    short: list[str] = []
    gathered = 0
    try:
        for (name, shape), limit in zip(shapes, limits, strict=True):
            count = torch.Size(shape).numel()
            if count > limit and shape and shape[0] > 1:
                step = shape[0] if whole else max(1, limit * shape[0] // (PART * count))
                blocks += [cutter.block((name,), slice(at, at + step)) for at in range(0, shape[0], step)]
                continue
            short.append(name)
            gathered += count
            if PART * gathered >= limit:
                blocks.append(cutter.block(tuple(short)))
                short, gathered = [], 0
        if short:
            blocks.append(cutter.block(tuple(short)))
    except _Inseparable:
        return None
    return blocks


@functools.lru_cache(maxsize=32)
def tensors_of(
    structure: Structure, shapes: tuple[Any, ...], leaf_shapes: tuple[Any, ...], counts: tuple[int, ...], limit: int
) -> list[Block] | None:
    """Group parameters, all rows of each, until a block has `limit` elements, of which each has a count; None if the
    state cannot be separated by parameters."""
    numbered = tree.unflatten(structure, range(structure.num_leaves))
    cutter = _Selector(numbered, dict(shapes), leaf_shapes, by_rows=False)
    blocks: list[Block] = []
    names: list[str] = []
    gathered = 0
    try:
        for (name, _), count in zip(shapes, counts, strict=True):
            names.append(name)
            gathered += count
            if gathered >= limit or name == shapes[-1][0]:
                blocks.append(cutter.block(tuple(names)))
                names, gathered = [], 0
    except _Inseparable:
        return None
    return blocks


class _Inseparable(Exception):
    """The state holds tensors of parameters outside of dicts by name and shape, or an unknown kind of node."""


class _Selector:
    """Selects parts of a state, given as a tree of leaf indices.

    To slice by rows, a leaf under the name of a parameter must have the parameter's shape. To separate by names alone,
    it may have any shape, such as the norms of the rows or a flag, but every parameter must have one.
    """

    def __init__(
        self, numbered: Any, shapes: dict[str, Any], leaf_shapes: tuple[Any, ...], *, by_rows: bool = True
    ) -> None:
        self.numbered, self.shapes, self.leaf_shapes, self.by_rows = numbered, shapes, leaf_shapes, by_rows
        self.own: set[int] = set()

    def block(self, names: tuple[str, ...], rows: slice | None = None) -> Block:
        """Return the block of the named parameters."""
        numbers, structure = tree.flatten(self._cut(self.numbered, frozenset(names)))
        return Block(names, rows, structure, tuple((i, i in self.own) for i in numbers))

    def _cut(self, node: Any, names: frozenset[str]) -> Any:
        if type(node) is int and self.leaf_shapes[node] and self.leaf_shapes[node] in self.shapes.values():
            raise _Inseparable  # a tensor of a parameter's shape without a name: its parameter is unknown
        if node is None or type(node) is int:
            return node
        if type(node) is dict:
            if node and node.keys() <= self.shapes.keys():
                return self._cut_column(node, names)
            return {key: self._cut(value, names) for key, value in node.items()}
        if type(node) in (list, tuple) and node:
            raise _Inseparable  # a list by position, such as one tensor a parameter, cannot be matched to parameters
        if tree.node_name(type(node)) is None:
            raise _Inseparable
        data, _ = tree.node_fields(type(node))
        return tree.replaced(node, **{field: self._cut(getattr(node, field), names) for field in data})

    def _cut_column(self, column: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
        if not self.by_rows and column.keys() != self.shapes.keys():
            raise _Inseparable
        for name, number in column.items():
            if type(number) is not int or (self.by_rows and self.leaf_shapes[number] != self.shapes[name]):
                raise _Inseparable
            self.own.add(number)
        return {name: number for name, number in column.items() if name in names}
