"""Layouts in a graph: what was recorded on the strides of fake tensors holds on those that tensors turn out to have.

An operator may lay out its result otherwise than its fake counterpart says, and compilers choose layouts of their own.
`trace` lets `settle` rewrite what depends on them.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from purestep.jit._torch import UNSAFE_VIEW

aten = torch.ops.aten


def settle(graph: fx.GraphModule) -> None:
    """Rewrite a functional graph so that its values do not depend on the strides of what lies between.

    `view`, which refuses strides, becomes `reshape`, which is a view where it can be one; what is viewed by strides is
    laid out first as it was when that was recorded.
    """
    for node in list(graph.graph.nodes):
        if node.target in (aten.view.default, UNSAFE_VIEW):
            node.target = aten.reshape.default
        elif node.target is aten.as_strided.default and isinstance(source := node.args[0], fx.Node):
            value = source.meta.get("val")
            if source.op == "placeholder" or not isinstance(value, Tensor) or not _is_dense(value):
                continue
            with graph.graph.inserting_before(node):
                laid = graph.graph.call_function(laid_out, (source, tuple(value.stride())))
            laid.meta["val"] = value
            node.replace_input_with(source, laid)


def _is_dense(x: Tensor) -> bool:
    """Tell whether strides are those of a permuted contiguous tensor."""
    order = _order(x.stride())
    return x.permute(order).is_contiguous()


def _order(strides: Sequence[int]) -> list[int]:
    return sorted(range(len(strides)), key=lambda dim: -strides[dim])


def laid_out(x: Tensor, strides: Sequence[int]) -> Tensor:
    """Return a tensor with these strides, those of a permuted contiguous one: itself, if it has them."""
    if x.stride() == tuple(strides):
        return x
    order = _order(strides)
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
