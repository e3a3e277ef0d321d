"""A pass over a graph before Inductor: 0-d intermediates are computed once.

Inductor computes 0-d intermediates anew wherever they are used, and on CPU inside the loop over elements: Adam's two
powers of the bias correction cost more there than everything else together. The pass makes Inductor store such numbers.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx


def hoist_scalars(graph: fx.GraphModule) -> int:
    """Move 0-d intermediates out of the loops over larger tensors that use them.

    Returns:
        The number of moved intermediates.
    """
    hoisted = 0
    for node in list(graph.graph.nodes):
        if node.op != "call_function" or not _is_number(node):
            continue
        wide = [user for user in node.users if user.op == "call_function" and not _is_number(user)]
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


def _is_number(node: fx.Node) -> bool:
    """Tell whether a node is one number that fills its storage, rather than an element of a larger tensor."""
    value = node.meta.get("val")
    if not isinstance(value, Tensor) or value.numel() != 1:
        return False
    return value.untyped_storage().nbytes() == value.element_size()
