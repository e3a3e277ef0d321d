"""The random block function as one node of a traced graph.

A Philox block is two hundred operations and a model has dozens of draws, so a trace takes each block as one node:
`as_node` makes it. The graph calls the function itself when it runs operator by operator; for a compiler, `expanding`
replaces each node by its operations, those of equal blocks copied (`repeats`).
"""

from __future__ import annotations

import contextlib
import operator
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx
from torch.overrides import TorchFunctionMode

from purestep.jit._torch import node_of, track, untracked
from purestep.jit.repeats import Repeats
from purestep.random.philox import philox

Words = Sequence[Any]


def as_node(counter: Words, key: Words) -> tuple[Any, ...]:
    """Add one node for a call of `philox` to the graph that is being traced, and return its four fake tensors.

    Where an argument is no tensor of the trace, as inside a transform, the operations are traced.
    """
    tensors = [word for word in (*counter, *key) if isinstance(word, Tensor)]
    nodes = {id(word): node_of(word) for word in tensors}
    if any(node is None for node in nodes.values()):
        return philox(counter, key)

    def given(words: Words) -> tuple[Any, ...]:
        return tuple(nodes[id(word)] if isinstance(word, Tensor) else word for word in words)

    arguments = given(counter), given(key)
    graph = next(node for node in nodes.values() if node is not None).graph
    like = _like(tensors)
    node = graph.call_function(philox, arguments)
    node.meta["val"] = (like,) * 4
    return tuple(track(graph.call_function(operator.getitem, (node, i)), like) for i in range(4))


def _like(tensors: Sequence[Tensor]) -> Tensor:
    """Return a fake tensor of the layout that an elementwise operation of the tensors has."""
    with untracked():
        if all(x.is_contiguous() for x in tensors):
            shape = torch.broadcast_shapes(*(x.shape for x in tensors))
            return torch.empty(shape, dtype=torch.int64, device=tensors[0].device)
        found = tensors[0]
        for other in tensors[1:]:
            found = found ^ other
        return found


def holds_blocks(graph: fx.GraphModule) -> bool:
    """Tell whether a graph has such nodes."""
    return any(node.target is philox for node in graph.graph.nodes)


@contextlib.contextmanager
def expanding() -> Iterator[None]:
    """Replace the nodes of `philox` by its operations when a graph is traced in this `with` block."""
    with _Expanding():
        yield


class _Expanding(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.repeats = Repeats()

    def __torch_function__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is philox:
            return self.repeats(philox, *args)
        return func(*args, **kwargs) if kwargs else func(*args)
