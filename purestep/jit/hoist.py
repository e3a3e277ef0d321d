"""A pass over a graph before Inductor: numbers that many elements share are computed once.

Inductor computes 0-d intermediates anew wherever they are used, and on CPU inside the loop over elements: Adam's two
powers of the bias correction cost more there than everything else together. In a step of many models under `vmap` there
is one such number for each model. The pass makes Inductor store such numbers.

It runs for every device: the Triton code that Inductor writes for a card spreads a 0-d input over a block of elements
as it loads it, so each element would compute the powers in float64 there, too. No card has measured it yet.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

# A small tensor is stored if a user has that many elements for each of its own.
_SHARED = 16


def hoist_scalars(graph: fx.GraphModule) -> int:
    """Move 0-d intermediates, and small ones computed in float64, out of the loops over larger tensors that use them.

    Returns:
        The number of moved intermediates.
    """
    hoisted = 0
    double: set[fx.Node] = set()
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not _is_whole(node):
            continue
        if _is_double(node) or any(_is_double(x) or x in double for x in node.all_input_nodes if _same_size(x, node)):
            double.add(node)
        if not _is_number(node) and node not in double:
            continue
        wide = [user for user in node.users if user.op == "call_function" and _is_wide(user, node)]
        if not wide:
            continue
        with graph.graph.inserting_after(node):
            # as_strided makes Inductor store its input in memory; it has no other effect here.
            arguments = (node, list(node.meta["val"].shape), list(node.meta["val"].stride()))
            stored = graph.graph.call_function(torch.ops.aten.as_strided.default, arguments)
        stored.meta["val"] = node.meta["val"]
        for user in wide:
            user.replace_input_with(node, stored)
        hoisted += 1
    if hoisted:
        graph.recompile()
    return hoisted


def _is_whole(node: fx.Node) -> bool:
    """Tell whether a node is a tensor that fills its storage, rather than a part of a larger tensor."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.untyped_storage().nbytes() == value.element_size() * value.numel()


def _is_number(node: fx.Node) -> bool:
    return _is_whole(node) and node.meta["val"].numel() == 1


def _is_double(node: fx.Node) -> bool:
    """Tell whether a node is computed in float64, in which a step computes little but what depends on its count."""
    return node.op == "call_function" and _is_whole(node) and node.meta["val"].dtype == torch.float64


def _same_size(one: fx.Node, other: fx.Node) -> bool:
    return _is_whole(one) and one.meta["val"].numel() == other.meta["val"].numel()


def _is_wide(user: fx.Node, node: fx.Node) -> bool:
    """Tell whether a user computes many elements from each element of a node."""
    if _is_number(node):
        return not _is_number(user)
    value = user.meta.get("val")
    return isinstance(value, Tensor) and value.numel() >= _SHARED * node.meta["val"].numel()
