"""Which part of an optimizer state belongs to some parameters, or to some rows of one: by name, without their values.

Owns `Block`. `kernels.sliced` updates a state by rows, `scope` by tensors where an update needs those in full.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass
from typing import Any

import torch

from purestep import tree
from purestep.tree import Structure

# Of a long tensor, the part that is one slice, and of short ones what is gathered into one block.
PART = 4


@dataclass(frozen=True)
class Block:
    """Some parameters, or some rows of one, and what of the state belongs to them.

    Attributes:
        names: of the parameters.
        rows: of the one parameter; None for whole ones.
        structure: of the state without the other parameters.
        leaves: for each leaf of that structure, its number among all, and whether it is a parameter's own.
    """

    names: tuple[str, ...]
    rows: slice | None
    structure: Structure
    leaves: tuple[tuple[int, bool], ...]


@functools.lru_cache(maxsize=32)
def rows_of(
    structure: Structure, shapes: tuple[Any, ...], leaf_shapes: tuple[Any, ...], limits: tuple[int, ...], whole: bool
) -> list[Block] | None:
    """Cut long parameters along dim 0, unless `whole`, and gather short ones; None when the state cannot be cut so."""
    cutter = _Cutter(tree.unflatten(structure, range(structure.num_leaves)), dict(shapes), leaf_shapes)
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
    except _Uncuttable:
        return None
    return blocks


@functools.lru_cache(maxsize=32)
def tensors_of(structure: Structure, shapes: tuple[Any, ...], leaf_shapes: tuple[Any, ...]) -> list[Block] | None:
    """Give each parameter a block of its own; None when the state cannot be separated so."""
    numbered = tree.unflatten(structure, range(structure.num_leaves))
    cutter = _Cutter(numbered, dict(shapes), leaf_shapes, by_rows=False)
    try:
        return [cutter.block((name,)) for name, _ in shapes]
    except _Uncuttable:
        return None


class _Uncuttable(Exception):
    """The state holds tensors of parameters otherwise than in dicts by name and shape, or a node of unknown kind."""


class _Cutter:
    """Cuts a state, given as a tree of the numbers of its leaves.

    To be cut by rows, what is under the name of a parameter must be like it. By names alone it may have any shape, the
    norms of the rows or a flag, but then all parameters must have theirs.
    """

    def __init__(
        self, numbered: Any, shapes: dict[str, Any], leaf_shapes: tuple[Any, ...], *, by_rows: bool = True
    ) -> None:
        self.numbered, self.shapes, self.leaf_shapes, self.by_rows = numbered, shapes, leaf_shapes, by_rows
        self.own: set[int] = set()

    def block(self, names: tuple[str, ...], rows: slice | None = None) -> Block:
        """Return the block of some parameters."""
        numbers, structure = tree.flatten(self._cut(self.numbered, frozenset(names)))
        return Block(names, rows, structure, tuple((i, i in self.own) for i in numbers))

    def _cut(self, node: Any, names: frozenset[str]) -> Any:
        if type(node) is int and self.leaf_shapes[node] and self.leaf_shapes[node] in self.shapes.values():
            raise _Uncuttable  # a tensor like a parameter that is under no name: its parameter is unknown
        if node is None or type(node) is int:
            return node
        if type(node) is dict:
            if node and node.keys() <= self.shapes.keys():
                return self._cut_column(node, names)
            return {key: self._cut(value, names) for key, value in node.items()}
        if type(node) in (list, tuple) and node:
            raise _Uncuttable  # what is kept by position, say one tensor a parameter, would meet other parameters
        if tree.node_name(type(node)) is None:
            raise _Uncuttable
        data, _ = tree.node_fields(type(node))
        return tree.replaced(node, **{field: self._cut(getattr(node, field), names) for field in data})

    def _cut_column(self, column: dict[str, Any], names: frozenset[str]) -> dict[str, Any]:
        if not self.by_rows and column.keys() != self.shapes.keys():
            raise _Uncuttable
        for name, number in column.items():
            if type(number) is not int or (self.by_rows and self.leaf_shapes[number] != self.shapes[name]):
                raise _Uncuttable
            self.own.add(number)
        return {name: number for name, number in column.items() if name in names}
