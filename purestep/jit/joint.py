"""The forward and the backward pass of a function as two graphs, and what the first saves for the second.

`joint` traces both passes into one graph and cuts it: what the results need is the forward graph, the rest is the
backward graph. What is computed from parameters alone is computed in both, so that nothing but activations is saved
and parameters may be freed in between. `unit_pieces` compiles the halves.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Collection, Iterable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from purestep import _torch, tree
from purestep.jit.outline import part_of
from purestep.jit.trace import Traced, trace

Forward = Callable[[Sequence[Tensor]], Sequence[Tensor]]


@dataclasses.dataclass(frozen=True)
class Halves:
    """Two graphs, and what goes from one to the other.

    Attributes:
        forward: takes inputs; returns results, then what is saved of what it computed.
        backward: takes saved inputs, what the forward graph saved, and the gradients of the differentiable results;
            None where nothing is differentiated.
        takes: positions of the inputs that the forward graph takes: those that it uses.
        returned: positions, among what the function returns, of the results that the graph returns.
        differentiable: positions among those of the ones that have a gradient.
        views: positions of the results that share memory with something else that the forward graph computed.
        saved_inputs: positions of the inputs that the backward graph takes.
        saved: positions among what the forward graph returns of what the backward graph takes.
        gradients: positions of the inputs whose gradients the backward graph returns.
        strides: of the gradients that it takes.
    """

    forward: Traced
    backward: Traced | None
    takes: tuple[int, ...]
    returned: tuple[int, ...]
    differentiable: tuple[int, ...] = ()
    views: frozenset[int] = frozenset()
    saved_inputs: tuple[int, ...] = ()
    saved: tuple[int, ...] = ()
    gradients: tuple[int, ...] = ()
    strides: tuple[tuple[int, ...], ...] = ()


def joint(
    function: Forward,
    inputs: Sequence[Tensor],
    wanted: Sequence[bool],
    params: int,
    *,
    buffers: int = 0,
    paths: Callable[[], list[str]],
    static: Sequence[Any],
) -> Halves:
    """Trace a function of tensors and the backward pass of it.

    Args:
        function: takes and returns lists of tensors.
        inputs: tensors to trace it for; their values are not looked at.
        wanted: which of them are differentiated.
        params: how many of them, the first ones, are parameters.
        buffers: how many results, the last ones, are copies of inputs that the function may write into. Those that it
            leaves alone are not returned.
        paths: gives the printed path of each input, for errors.
        static: objects that the function uses, for errors.

    Raises:
        TraceError, RandomnessError: as of `trace`.
    """
    found: list[tuple[bool, ...]] = []

    def forward(given: Sequence[Tensor]) -> list[Tensor]:
        results = list(function(_leaves(given, wanted)))
        found.append(tuple([x.requires_grad for x in results]))
        return results

    alone = _traced(forward, (list(inputs),), paths, static)
    returned = _written(alone, buffers)
    differentiable = tuple([k for k, i in enumerate(returned) if found[-1][i]])
    if not differentiable:
        return _without_backward(alone, returned)
    fakes = tree.leaves(alone.result)
    with alone.mode:  # dense, where a result is expanded: its gradient differs from place to place
        tangents = [torch.empty_like(fakes[returned[k]]) for k in differentiable]
    with_gradient: list[int] = []

    def both(given: Sequence[Tensor], tangents: Sequence[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        leaves = _leaves(given, wanted)
        every = list(function(leaves))
        results = [every[i] for i in returned]
        asked = [i for i, want in enumerate(wanted) if want]
        grads = torch.autograd.grad(
            [results[k] for k in differentiable], [leaves[i] for i in asked], tangents, allow_unused=True
        )
        with_gradient[:] = [i for i, grad in zip(asked, grads, strict=True) if grad is not None]
        return results, [grad for grad in grads if grad is not None]

    def names() -> list[str]:
        return [*paths(), *(f"gradient of result {k}" for k in differentiable)]

    traced = _traced(both, (list(inputs), tangents), names, static)
    return _cut(traced, len(inputs), params, returned, differentiable, tuple(with_gradient))


def _leaves(given: Sequence[Tensor], wanted: Sequence[bool]) -> list[Tensor]:
    return [x.detach().requires_grad_() if want else x for x, want in zip(given, wanted, strict=True)]


def _traced(
    function: Callable[..., Any], args: tuple[Any, ...], paths: Callable[[], list[str]], static: Sequence[Any]
) -> Traced:
    leaves, structure = tree.flatten((args, {}))
    traced = trace(function, leaves, structure, paths=paths, static=static)
    for node in list(traced.graph.graph.nodes):
        if node.target is torch.ops.aten.detach.default:
            # In a graph that writes nothing it is its input: saved as such, that is known to autograd.
            node.replace_all_uses_with(node.args[0])
            traced.graph.graph.erase_node(node)
    return traced


def _written(traced: Traced, buffers: int) -> tuple[int, ...]:
    """Return the positions of all results but those of the last ones that are copies of inputs."""
    _, _, results = traced.nodes()
    first = len(results) - buffers
    return tuple([i for i, node in enumerate(results) if i < first or not _is_copy(node)])


def _is_copy(node: fx.Node) -> bool:
    source = node.args[0] if node.target is torch.ops.aten.clone.default else None
    return isinstance(source, fx.Node) and source.op == "placeholder"


def _without_backward(traced: Traced, returned: tuple[int, ...]) -> Halves:
    inputs, end, results = traced.nodes()
    end.args = ([results[i] for i in returned],)
    views = _own_memory(traced.graph.graph, inputs, traced.nodes()[2], ())
    forward, takes = _forward(traced, inputs, traced.nodes()[2])
    return Halves(forward, None, takes, returned, views=views)


# --- cutting ----------------------------------------------------------------------------------------------------------


def _cut(
    traced: Traced,
    count: int,
    params: int,
    positions: tuple[int, ...],
    differentiable: tuple[int, ...],
    gradients: tuple[int, ...],
) -> Halves:
    """Cut a graph of (inputs, gradients of results) -> (results, gradients of inputs) into its halves."""
    (placeholders, _, returned), results = traced.nodes(), len(positions)
    inputs, tangents = placeholders[:count], placeholders[count:]
    outs, grads = returned[:results], returned[results:]
    nodes = list(traced.graph.graph.nodes)
    first = _needed(outs, lambda node: True)
    # Results of an operator with several, such as the mean and the deviation of a norm, cost nothing.
    first |= {n for n in nodes if n.target is operator.getitem and n.args[0] in first}
    after, fixed = set(tangents), set(inputs[:params])
    for node in nodes:
        if node.op not in ("placeholder", "output"):
            if any(source in after for source in node.all_input_nodes):
                after.add(node)
            elif all(source in fixed for source in node.all_input_nodes):
                fixed.add(node)

    def is_computed(node: fx.Node) -> bool:
        return node.op != "placeholder" and (
            node in after or node in fixed or node not in first or not isinstance(node.meta.get("val"), Tensor)
        )

    second = _needed(grads, is_computed)
    computed = [n for n in nodes if n in second and is_computed(n)]
    taken = [n for n in nodes if n in second and not is_computed(n) and n not in tangents]
    saved_inputs = [n for n in taken if n.op == "placeholder"]
    saved = [n for n in taken if n.op != "placeholder"]
    views = _own_memory(traced.graph.graph, inputs, outs, saved)
    outs = traced.nodes()[2][:results]  # some are copies now
    extra = [n for n in saved if n not in outs]
    forward, takes = _forward(traced, inputs, [*outs, *extra])
    backward = _half(traced, [*saved_inputs, *saved, *tangents], computed, grads)
    position = {node: i for i, node in reversed(list(enumerate([*outs, *extra])))}
    return Halves(
        forward,
        backward,
        takes,
        positions,
        differentiable,
        views,
        tuple(inputs.index(n) for n in saved_inputs),
        tuple(position[n] for n in saved),
        gradients,
        tuple(tuple(n.meta["val"].stride()) for n in tangents),
    )


def _needed(wanted: Iterable[fx.Node], through: Callable[[fx.Node], bool]) -> set[fx.Node]:
    """Return the wanted nodes and what they are computed from, looked for behind some nodes only."""
    found: set[fx.Node] = set()
    pending = list(wanted)
    while pending:
        node = pending.pop()
        if node not in found:
            found.add(node)
            if through(node):
                pending.extend(node.all_input_nodes)
    return found


def _own_memory(
    graph: fx.Graph, inputs: Sequence[fx.Node], outs: Sequence[fx.Node], saved: Collection[fx.Node]
) -> frozenset[int]:
    """Copy results that lie in the memory of an input, of a saved tensor or of another result, and return the positions
    of the others that are views.

    The caller may write into a result. It would then write into those, and autograd would not see that.
    """
    end = next(iter(reversed(graph.nodes)))
    memory: dict[int, int] = {}
    for node in graph.nodes:
        if isinstance(node.meta.get("val"), Tensor):
            memory[_memory(node)] = memory.get(_memory(node), 0) + 1
    # A saved tensor that is itself a result is known to autograd, which notices a write into it.
    used = {_memory(n) for n in inputs} | {_memory(n) for n in saved if n not in outs}
    views: set[int] = set()
    returned = list(end.args[0])
    for i, node in enumerate(outs):
        if _memory(node) in used:
            with graph.inserting_before(end):
                returned[i] = graph.call_function(torch.ops.aten.clone.default, (node,))
            returned[i].meta["val"] = torch.empty_like(node.meta["val"])
        else:
            used.add(_memory(node))
            if memory[_memory(node)] > 1 and node not in saved:
                views.add(i)
    end.args = (returned,)
    return frozenset(views)


def _memory(node: fx.Node) -> int:
    return _torch.storage_id(node.meta["val"].untyped_storage())


def _forward(traced: Traced, inputs: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> tuple[Traced, tuple[int, ...]]:
    """Return the graph of some outputs, and the positions of the inputs that it takes."""
    needed = _needed(outputs, lambda node: True)
    takes = [i for i, node in enumerate(inputs) if node in needed]
    calls = [n for n in traced.graph.graph.nodes if n in needed and n.op != "placeholder"]
    return _half(traced, [inputs[i] for i in takes], calls, outputs), tuple(takes)


def _half(traced: Traced, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Traced:
    return dataclasses.replace(part_of(traced, inputs, nodes, outputs), takes=list(range(len(inputs))))
