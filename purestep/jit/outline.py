"""Repeated updates in a graph: one compiled function for all leaves whose update is the same computation.

An optimizer computes the same for every parameter, so a graph of fifty parameters holds an update fifty times, and
Inductor would schedule and write fifty kernels. `outlined` cuts the updates of small leaves out of the graph, each kind
once; `Outlined.run` runs the rest of the graph, then the update of each leaf. `backends` compiles the pieces.

Only elementwise operations are cut out, so the bits of an update do not depend on what it is compiled with.
"""

from __future__ import annotations

import collections
import dataclasses
import operator
from collections.abc import Callable, Hashable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from purestep import _torch
from purestep.jit._torch import TO_COPY, fake_like
from purestep.jit.trace import Traced

Run = Callable[[list[Tensor]], Sequence[Any]]
_FEW = 4  # each call of a kind costs microseconds, so what is repeated less stays in the graph
# Elements of a leaf. The gradients of all outlined leaves are in memory at once, before the first of them is used.
_SMALL = 2**18
COPY = torch.ops.aten.copy_.default
# Elementwise operators on lists of tensors; others reduce each tensor, or write into it.
_FOREACH = frozenset(
    "abs add addcdiv addcmul ceil clamp_max clamp_min cos div erf exp expm1 floor lerp log log1p log2 maximum minimum "
    "mul neg pow reciprocal round rsqrt sigmoid sign sin sqrt sub tanh trunc".split()
)
_ELEMENTWISE = {COPY, torch.ops.aten.clone.default, TO_COPY}


@dataclasses.dataclass(frozen=True)
class Use:
    """One call of a kind: positions among all values, which are the inputs, then what the rest of the graph returns,
    then what the uses return.

    Attributes:
        kind: number of the kind.
        takes: positions of its arguments.
        last: those that no later use takes, which are dropped.
    """

    kind: int
    takes: tuple[int, ...]
    last: tuple[int, ...]


@dataclasses.dataclass(frozen=True)
class Outlined:
    """A graph in pieces.

    Attributes:
        rest: what is left of the graph; it takes all inputs.
        kinds: one graph for each kind of update.
        uses: its calls, after the rest.
        returns: positions of the results of the whole.
    """

    rest: Traced
    kinds: tuple[Traced, ...]
    uses: tuple[Use, ...]
    returns: tuple[int, ...]

    def run(self, rest: Run, kinds: Sequence[Run]) -> Run:
        """Return the function that runs the whole graph with compiled pieces."""
        calls = [(kinds[use.kind], use.takes, use.last) for use in self.uses]

        def run(tensors: list[Tensor]) -> Sequence[Any]:
            values: list[Any] = [*tensors, *rest(list(tensors))]
            tensors.clear()
            return called(calls, values, self.returns)

        return run


def called(
    calls: Sequence[tuple[Run, tuple[int, ...], tuple[int, ...]]], values: list[Any], returns: Sequence[int]
) -> list[Any]:
    """Run compiled pieces `(piece, takes, last)` in order, add what they return to the values, and return some."""
    for piece, takes, last in calls:
        given = [values[i] for i in takes]
        for i in last:
            values[i] = None
        values.extend(piece(given))
    return [values[i] for i in returns]


def outlined(traced: Traced) -> Outlined | None:
    """Cut repeated updates out of a graph; None if there are none, or the graph is not one of CPU tensors alone."""
    nodes = list(_one_by_one(traced.graph.graph).nodes)
    if any(node.op not in ("placeholder", "call_function", "output") for node in nodes):
        return None
    if any(fake.device.type != "cpu" for fake in traced.fakes):
        return None
    groups: dict[Hashable, list[_Update]] = collections.defaultdict(list)
    for update in _updates(nodes):
        groups[update.signature].append(update)
    kinds = [group for group in groups.values() if len(group) >= _FEW]
    return _cut(traced, nodes, kinds) if kinds else None


def _one_by_one(graph: fx.Graph) -> fx.Graph:
    """Return a copy in which an operator on a list of tensors is called once for each of them, with lists of one.

    Inductor computes every tensor of such a list for itself, so the bits are the same.
    """
    made, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    items: dict[tuple[fx.Node, Any], fx.Node] = {}
    for node in graph.nodes:
        if node.target is operator.getitem and node.args in items:
            copies[node] = items[node.args]
        elif node.op == "call_function" and _of_lists(node):
            for i in range(len(node.args[0])):
                args, kwargs = fx.map_arg((_ith(node.args, i), node.kwargs), copies.__getitem__)
                call = made.call_function(node.target, args, kwargs)
                call.meta = {**node.meta, "val": [node.meta["val"][i]]}
                item = items[node, i] = made.call_function(operator.getitem, (call, 0))
                item.meta = {**node.meta, "val": node.meta["val"][i]}
        elif node.op == "output":
            made.output(fx.map_arg(node.args[0], copies.__getitem__))
        else:
            copies[node] = made.node_copy(node, copies.__getitem__)
    return made


def _of_lists(node: fx.Node) -> bool:
    name = str(node.target)
    if not name.startswith("aten._foreach_") or name.removeprefix("aten._foreach_").split(".")[0] not in _FOREACH:
        return False
    return all(user.target is operator.getitem for user in node.users)


def _ith(args: Sequence[Any], i: int) -> tuple[Any, ...]:
    return tuple([arg[i]] if isinstance(arg, (list, tuple)) else arg for arg in args)


# --- finding updates --------------------------------------------------------------------------------------------------


class _Update:
    """Nodes that compute the new leaves of one parameter, in the order of the graph."""

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.nodes = nodes
        own = set(nodes)
        self.inputs = list(dict.fromkeys(x for node in nodes for x in node.all_input_nodes if x not in own))
        self.outputs = [node for node in nodes if any(user not in own for user in node.users)]

    @property
    def signature(self) -> Hashable:
        return signature_of(self.inputs, self.nodes, self.outputs)


def signature_of(inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Hashable:
    """Return what is the same for two parts of a graph that are the same computation."""
    position = {node: i for i, node in enumerate((*inputs, *nodes))}

    at: Callable[[fx.Node], Any] = lambda node: _Position(position[node])  # noqa: E731

    def named(argument: Any) -> str:
        return repr(fx.map_arg(argument, at))

    lines = [(str(n.target), named(n.args), named(n.kwargs), kind_of(n)) for n in nodes]
    return (*map(kind_of, inputs), *lines, *(position[node] for node in outputs))


@dataclasses.dataclass(frozen=True)
class _Position:
    at: int


def _updates(nodes: Sequence[fx.Node]) -> Iterator[_Update]:
    """Yield the groups of elementwise nodes that lead to results of the graph alone and share nothing but numbers."""
    tail: set[fx.Node] = set()
    for node in reversed(nodes):
        if _is_elementwise(node) and all(user in tail or user.op == "output" for user in node.users):
            tail.add(node)
    parent: dict[fx.Node, fx.Node] = {}

    def root(node: fx.Node) -> fx.Node:
        while (above := parent.setdefault(node, node)) is not node:
            parent[node] = parent[above]
            node = above
        return node

    writers = {node.args[0]: node for node in nodes if node.target is COPY}
    for node in nodes:
        for source in node.all_input_nodes if node in tail else ():
            # What reads an old leaf belongs to what writes it: then the order of the uses does not matter.
            if source in tail or (source in writers and _size(source) > 1):
                parent[root(node)] = root(source)
    groups: dict[fx.Node, list[fx.Node]] = collections.defaultdict(list)
    for node in nodes:
        if node in tail:
            groups[root(node)].append(node)
    leaves = {memory_of(node): node for node in nodes if node.op == "placeholder"}
    for group in groups.values():
        update, own = _Update(group), set(group)
        # What runs after the rest of the graph must not read what that has written, by itself or through a view.
        written = (writers[x] for x in update.inputs if x in writers)
        views = (x for x in update.inputs if x.op != "placeholder" and memory_of(x) in leaves)
        if all(writer in own for writer in written) and not any(views):
            yield update


def _is_elementwise(node: fx.Node) -> bool:
    target = node.target
    if target is operator.getitem:
        source = node.args[0]
        return isinstance(source, fx.Node) and _of_lists(source) and _is_elementwise(source)
    if not isinstance(target, _torch.OpOverload):
        return False
    if target not in _ELEMENTWISE and torch.Tag.pointwise not in target.tags and not _of_lists(node):
        return False
    size = _size(node)
    return 1 < size <= _SMALL and all(_size(x) in (1, size) for x in node.all_input_nodes)


def _value(node: fx.Node) -> Any:
    """Return the fake tensor of a node, also of one that returns a list of one tensor."""
    value = node.meta.get("val")
    return value[0] if isinstance(value, (list, tuple)) and len(value) == 1 else value


def _size(node: fx.Node) -> int:
    value = _value(node)
    return value.numel() if isinstance(value, Tensor) else 0


def memory_of(node: fx.Node) -> int:
    value = _value(node)
    return _torch.storage_id(value.untyped_storage()) if isinstance(value, Tensor) else 0


def kind_of(node: fx.Node) -> Hashable:
    value = _value(node)
    return (tuple(value.shape), value.stride(), value.dtype) if isinstance(value, Tensor) else None


# --- cutting them out -------------------------------------------------------------------------------------------------


def _cut(traced: Traced, nodes: Sequence[fx.Node], kinds: Sequence[Sequence[_Update]]) -> Outlined:
    gone = {node for group in kinds for update in group for node in update.nodes}
    placeholders = [node for node in nodes if node.op == "placeholder"]
    returned = list(nodes[-1].args[0])  # type: ignore[arg-type]
    asked = [x for group in kinds for update in group for x in update.inputs if x.op != "placeholder"]
    kept = list(dict.fromkeys([node for node in returned if node not in gone] + asked))
    rest = _graph(traced, placeholders, [n for n in nodes if n not in gone and n.op == "call_function"], kept)
    position = {node: i for i, node in enumerate((*placeholders, *kept))}
    calls = []
    for kind, group in enumerate(kinds):
        for update in group:
            calls.append((kind, tuple(position[x] for x in update.inputs)))
            for node in update.outputs:
                position[node] = len(position)
    returns = tuple(position[node] for node in returned)
    made = [part_of(traced, group[0].inputs, group[0].nodes, group[0].outputs) for group in kinds]
    return Outlined(dataclasses.replace(traced, graph=rest), tuple(made), with_last_uses(calls, returns), returns)


def with_last_uses(calls: Sequence[tuple[int, tuple[int, ...]]], returns: Sequence[int]) -> tuple[Use, ...]:
    """Return the uses for `(kind, takes)` in order."""
    later, uses = set(returns), []
    for kind, takes in reversed(calls):
        uses.append(Use(kind, takes, tuple(i for i in dict.fromkeys(takes) if i not in later)))
        later.update(takes)
    return tuple(reversed(uses))


def part_of(traced: Traced, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]) -> Traced:
    """Return a part of a graph as a graph of its own."""
    fakes = [fake_like(traced.mode, x.meta["val"]) for x in inputs]
    return dataclasses.replace(traced, graph=_graph(traced, inputs, nodes, outputs), fakes=fakes)


def _graph(
    traced: Traced, inputs: Sequence[fx.Node], nodes: Sequence[fx.Node], outputs: Sequence[fx.Node]
) -> fx.GraphModule:
    graph, copies = fx.Graph(), dict[fx.Node, fx.Node]()
    for node in inputs:
        copies[node] = graph.placeholder(node.name)
        copies[node].meta = dict(node.meta)
    for node in nodes:
        copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output([copies[node] for node in outputs])
    return fx.GraphModule(traced.graph, graph)
