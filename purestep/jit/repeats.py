"""Functions that are traced once for each signature; further calls copy their nodes.

A random draw is two hundred operations, a model has dozens of draws, and tracing an operation takes a thousand times as
long as copying a node. `random_nodes` uses `Repeats` where a compiler needs the operations.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Hashable, Sequence
from typing import Any

from torch import Tensor, fx

from purestep.jit._torch import node_of, track


@dataclasses.dataclass(frozen=True)
class _Recording:
    """The nodes that one call of a function added to a graph.

    Attributes:
        inputs: nodes of the tensor arguments.
        nodes: the added nodes, in order.
        outputs: nodes of the returned tensors.
        values: the returned tensors.
    """

    inputs: tuple[fx.Node, ...]
    nodes: tuple[fx.Node, ...]
    outputs: tuple[fx.Node, ...]
    values: tuple[Tensor, ...]


class Repeats:
    """The recordings of one trace, by signature."""

    def __init__(self) -> None:
        self.known: dict[Hashable, _Recording] = {}

    def __call__(self, function: Callable[..., Any], *words: Sequence[Any]) -> Any:
        """Call a function of tensors and numbers that returns a tuple of tensors, or copy an earlier call's nodes."""
        flat = [word for group in words for word in group]
        tensors = [word for word in flat if isinstance(word, Tensor)]
        nodes = [node_of(x) for x in tensors]
        if any(node is None for node in nodes):
            return function(*words)
        inputs = tuple(node for node in nodes if node is not None)
        signature = (function, tuple(map(len, words)), tuple(map(_signature, flat)), _pattern(inputs))
        known = self.known.get(signature)
        if known is not None:
            return _repeated(known, inputs)
        graph = inputs[0].graph
        last = next(iter(reversed(graph.nodes)))  # before 2.12 torch returns an iterable there
        out = function(*words)
        added = []
        for node in reversed(graph.nodes):
            if node is last:
                break
            added.append(node)
        outputs = [node_of(x) if isinstance(x, Tensor) else None for x in out]
        if all(node is not None for node in outputs) and all(node.op == "call_function" for node in added):
            recording = _Recording(inputs, tuple(reversed(added)), tuple(outputs), tuple(out))  # type: ignore[arg-type]
            self.known[signature] = recording
        return out


def _signature(word: Any) -> Hashable:
    if isinstance(word, Tensor):
        return word.shape, word.stride(), word.dtype, word.device, word.requires_grad
    return type(word), word


def _pattern(inputs: Sequence[fx.Node]) -> tuple[int, ...]:
    """Return for each input the position of its first occurrence: which arguments are the same tensor."""
    return tuple(inputs.index(node) for node in inputs)


def _repeated(known: _Recording, inputs: Sequence[fx.Node]) -> tuple[Tensor, ...]:
    graph = inputs[0].graph
    copies = dict(zip(known.inputs, inputs, strict=True))
    for node in known.nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    made: dict[fx.Node, Tensor] = {}
    for node, value in zip(known.outputs, known.values, strict=True):
        copy = copies[node]
        if node not in made:
            made[node] = track(copy, value)
    return tuple(made[node] for node in known.outputs)
