"""Constants of a graph, put on the card once instead of copied there in every call.

`torch.tensor([...], device="cuda")` makes a tensor on the CPU and copies it. In a trace the first is a constant of the
graph and the second a node, for which the host would wait at each call; a CUDA graph cannot record it at all.
"""

from __future__ import annotations

import torch
from torch import Tensor, fx

from purestep.jit._torch import TO_COPY
from purestep.jit.trace import Traced

_LIFT = torch.ops.aten.lift_fresh_copy.default


def place(traced: Traced) -> None:
    """Give a graph the copies of its constants on other devices as constants of their own."""
    module = traced.graph
    copies = [(node, constant) for node in module.graph.nodes if (constant := _copied(module, node)) is not None]
    for node, constant in copies:
        name = f"{node.name}_constant"
        module.register_buffer(name, _moved(constant, node.meta["val"]))
        with module.graph.inserting_before(node):
            held = module.graph.get_attr(name)
            held.meta["val"] = node.meta["val"]
        node.target, node.args, node.kwargs = _LIFT, (held,), {}  # no output shares memory with the constant
    if copies:
        module.graph.eliminate_dead_code()
        module.recompile()


def _copied(module: fx.GraphModule, node: fx.Node) -> Tensor | None:
    """Return the constant that a node copies to another device."""
    if node.target is not TO_COPY:
        return None
    source = node.args[0]
    while isinstance(source, fx.Node) and source.target is _LIFT:
        source = source.args[0]
    if not isinstance(source, fx.Node) or source.op != "get_attr":
        return None
    constant = getattr(module, str(source.target), None)
    if not isinstance(constant, Tensor) or constant.device == node.meta["val"].device:
        return None
    return constant


def _moved(constant: Tensor, like: Tensor) -> Tensor:
    return constant.to(like.device, like.dtype)
