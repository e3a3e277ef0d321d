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

from purestep import transforms
from purestep.jit._torch import node_of, track, untracked
from purestep.jit.repeats import Repeats
from purestep.random.philox import philox

Words = Sequence[Any]


def as_node(counter: Words, key: Words) -> tuple[Any, ...]:
    """Add one node for a call of `philox` to the graph that is being traced, and return its four fake tensors.

    Under `vmap` it is one node for all members of the batch. Where an argument is no tensor of the trace, the
    operations are traced.
    """
    words = (*counter, *key)
    numbers = tuple(None if isinstance(word, Tensor) else word for word in words)
    tensors = [word for word in words if isinstance(word, Tensor)]
    if transforms.active():
        found: tuple[Any, ...] = _Batched.apply(numbers, *tensors)
        return found
    return _node(numbers, tensors)


def _node(numbers: Sequence[int | None], tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    nodes = [node_of(tensor) for tensor in tensors]
    if any(node is None for node in nodes):
        given = _filled(numbers, tensors)
        return philox(given[:4], given[4:])
    words = _filled(numbers, nodes)
    graph = next(node for node in nodes if node is not None).graph
    like = _like(tensors)
    node = graph.call_function(philox, (words[:4], words[4:]))
    node.meta["val"] = (like,) * 4
    return tuple(track(graph.call_function(operator.getitem, (node, i)), like) for i in range(4))


def _filled(numbers: Sequence[int | None], rest: Sequence[Any]) -> tuple[Any, ...]:
    """Return the six words: numbers, and in place of each None the next of the rest."""
    following = iter(rest)
    return tuple(next(following) if number is None else number for number in numbers)


class _Batched(torch.autograd.Function):
    """A block under a transform. The words broadcast, so a batch is one more dim in front."""

    @staticmethod
    def forward(numbers: Sequence[int | None], *tensors: Tensor) -> tuple[Tensor, ...]:
        return _node(numbers, tensors)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        ctx.mark_non_differentiable(*output)

    @staticmethod
    def vmap(info: Any, dims: Sequence[Any], numbers: Sequence[int | None], *tensors: Tensor) -> Any:
        _, *places = dims
        rank = max(x.ndim - (place is not None) for x, place in zip(tensors, places, strict=True))
        moved = [x if p is None else _in_front(x, p, rank) for x, p in zip(tensors, places, strict=True)]
        return _Batched.apply(numbers, *moved), (0,) * 4


def _in_front(x: Tensor, dim: int, rank: int) -> Tensor:
    """Return a tensor with a dim moved to the front of `rank` others."""
    x = x.movedim(dim, 0)
    return x.reshape(x.shape[0], *(1,) * (rank + 1 - x.ndim), *x.shape[1:])


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
