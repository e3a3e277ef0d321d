"""Layouts in a graph: a graph traced on fake tensors stays correct when real tensors have other strides.

An operator may return other strides than its fake version predicts, and compilers choose layouts of their own. `trace`
calls `settle`, which rewrites the nodes that depend on strides.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, fx

from purestep.jit._torch import UNSAFE_VIEW

aten = torch.ops.aten


def settle(graph: fx.GraphModule) -> None:
    """Rewrite a functional graph so that its values do not depend on the strides of intermediate tensors.

    `view`, which fails on some strides, becomes `reshape`, which then copies. The input of `as_strided` is first copied
    to the strides that it had in the trace, unless it has them.
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
    """Tell whether a tensor is a permutation of a contiguous one."""
    order = _order(x.stride())
    return x.permute(order).is_contiguous()


def _order(strides: Sequence[int]) -> list[int]:
    return sorted(range(len(strides)), key=lambda dim: -strides[dim])


def laid_out(x: Tensor, strides: Sequence[int]) -> Tensor:
    """Return a tensor with the given strides, copied unless it has them. They must be those of a dense tensor."""
    if x.stride() == tuple(strides):
        return x
    order = _order(strides)
    back = sorted(range(len(order)), key=order.__getitem__)
    return x.permute(order).clone(memory_format=torch.contiguous_format).permute(back)
