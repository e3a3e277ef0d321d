"""Donation in a graph: the epilogue that writes the new state over the memory of the old one.

`epilogue` adds it, and returns where each leaf of the result comes from. The work of donation at every call is in
`donation`.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import torch
from torch import Tensor, fx

from purestep import _torch, tree
from purestep.errors import StepError, explain
from purestep.jit.trace import Traced

_copy = torch.ops.aten.copy_.default
_IDENTITIES = {torch.ops.aten.clone.default, torch.ops.aten.detach.default, torch.ops.aten.alias.default}


@dataclasses.dataclass(frozen=True)
class Layout:
    """Where the leaves of a result come from.

    Attributes:
        picks: for each leaf of the result, its position among (outputs of the graph, leaves of the arguments,
            constants).
        constants: leaves that are not tensors.
        state_leaves: number of leaves of the first argument, if the result starts with a state of the same structure,
            shapes and dtypes; else 0.
        alone: whether that state is the whole result, rather than the first item of a tuple.
    """

    picks: tuple[int, ...]
    constants: tuple[Any, ...]
    state_leaves: int
    alone: bool


def epilogue(traced: Traced, first: object, leaf_count: int, *, donate: bool, name: str) -> Layout:
    """Drop outputs that are inputs, add the epilogue of a donating function, and return where the results come from.

    Args:
        traced: changed in place.
        first: the first argument.
        leaf_count: number of leaves of all arguments.
        donate: whether to write the state of the result over `first`.
        name: of the function, for errors.

    Raises:
        StepError: the function donates, and does not return a state of the same structure, shapes and dtypes.
    """
    inputs, end, returned = traced.nodes()
    state_leaves, alone = _state_like(traced, first)
    if donate and not state_leaves:
        raise StepError(_not_a_state(traced, first, name))
    slot_of = {leaf: i for i, leaf in enumerate(traced.takes)}
    donated = {_memory(inputs[slot_of[leaf]]) for leaf in range(state_leaves) if leaf in slot_of} if donate else set()
    outputs: list[fx.Node] = []
    copies: list[tuple[fx.Node, fx.Node]] = []
    kept: list[fx.Node] = []
    sources: list[tuple[str, int]] = []
    nodes = iter(returned)
    constants: list[Any] = []
    for position, leaf in enumerate(traced.leaves):
        if leaf is not None:
            sources.append(("constant", len(constants)))
            constants.append(leaf)
            continue
        node = next(nodes)
        root = _root(node)
        if donate and position < state_leaves:
            own = inputs[slot_of[position]]
            # A leaf that the function returned unchanged needs no copy.
            if root is not own:
                if _memory(node) in donated:
                    # The new leaf is another leaf of the old state, or a view of one. Another copy of the epilogue may
                    # overwrite that leaf first, so its value is cloned before all copies.
                    node = _cloned(traced, end, node)
                    kept.append(node)
                copies.append((own, node))
            # In either case the result is in the memory of the donated leaf.
            sources.append(("input", position))
        elif root.op == "placeholder" and _memory(root) not in donated:
            sources.append(("input", traced.takes[inputs.index(root)]))
        else:
            sources.append(("output", len(outputs)))
            outputs.append(node)
    if donate:
        # A metric may be a parameter before or after the update; at the end both memories hold the new state.
        written = {_memory(node) for _, node in copies} | donated
        outputs = [_cloned(traced, end, node) if _memory(node) in written else node for node in outputs]
    with traced.graph.graph.inserting_before(end):
        for own, node in copies:
            copy = traced.graph.graph.call_function(_copy, (own, node))
            copy.meta["val"] = own.meta["val"]
    # The clones are returned, because Inductor drops a clone of an input that is no output.
    end.args = (outputs + kept,)
    traced.graph.graph.eliminate_dead_code()
    traced.graph.recompile()
    count = len(outputs) + len(kept)
    offset = {"output": 0, "input": count, "constant": count + leaf_count}
    picks = tuple(offset[kind] + index for kind, index in sources)
    return Layout(picks, tuple(constants), state_leaves, alone)


def _memory(node: fx.Node) -> int:
    return _torch.storage_id(node.meta["val"].untyped_storage())


def _root(node: fx.Node) -> fx.Node:
    """Return the source of a chain of copies that keep the layout: in a functional graph all have the same value."""
    while node.target in _IDENTITIES and not node.kwargs:
        source = node.args[0]
        if not isinstance(source, fx.Node) or source.meta["val"].stride() != node.meta["val"].stride():
            break
        node = source
    return node


def _cloned(traced: Traced, end: fx.Node, node: fx.Node) -> fx.Node:
    with traced.graph.graph.inserting_before(end):
        clone = traced.graph.graph.call_function(torch.ops.aten.clone.default, (node,))
    with traced.mode:
        clone.meta["val"] = node.meta["val"].clone()
    return clone


# --- find the state in the result -------------------------------------------------------------------------------------


def _candidates(result: object) -> list[tuple[Any, bool]]:
    return ([(result[0], False)] if isinstance(result, tuple) and result else []) + [(result, True)]


def _state_like(traced: Traced, first: object) -> tuple[int, bool]:
    """Return the leaf count of a returned state that fits the first argument, and whether it is the whole result."""
    leaves, structure = tree.flatten(first)
    for value, alone in _candidates(traced.result):
        found, other = tree.flatten(value)
        if other == structure and leaves and all(_fits(a, b) for a, b in zip(leaves, found, strict=True)):
            return len(leaves), alone
    return 0, False


def _fits(old: object, new: object) -> bool:
    if not isinstance(old, Tensor) or not isinstance(new, Tensor):
        return type(old) is type(new) and bool(old == new)
    same = old.shape == new.shape and old.dtype == new.dtype and old.device == new.device
    return (
        same and (old.is_contiguous() == new.is_contiguous()) and (old.is_contiguous() or old.stride() == new.stride())
    )


def _not_a_state(traced: Traced, first: object, name: str) -> str:
    value = _candidates(traced.result)[0][0]
    before = dict(zip(tree.paths(first, "state"), tree.leaves(first), strict=True))
    after = dict(zip(tree.paths(value, "state"), tree.leaves(value), strict=True))
    where = "; ".join(f"{p} is missing" for p in before if p not in after)
    where = where or "; ".join(f"{p} is new" for p in after if p not in before)
    for path, leaf in before.items():
        if not where and not _fits(leaf, after[path]):
            where = f"{path} was {_layout(leaf)} and comes back as {_layout(after[path])}"
    return explain(
        "a donating function returns a state like the one it was given, first",
        where=f"{name}: {where or 'other node types'}",
        why="each new leaf is written into the memory of the old one at the same path",
        instead="return state.replace(...), {'loss': loss}",
    )


def _layout(leaf: object) -> str:
    text = tree.describe(leaf)
    return (
        f"{text} of strides {tuple(leaf.stride())}" if isinstance(leaf, Tensor) and not leaf.is_contiguous() else text
    )
