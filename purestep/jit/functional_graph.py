"""In-place operations of a traced graph become operations that return new tensors.

`functionalized` rewrites the graph in place if later nodes use the written tensors as a whole, as in-place activations,
counters and running statistics are used. Graphs that write through views are traced once more through
`torch.func.functionalize`, which takes as long as the first trace.
"""

from __future__ import annotations

import dataclasses
import operator
from collections import defaultdict
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, fx

from purestep import _torch
from purestep.jit._torch import batch_norm_functional, batch_norm_legit, make_fx, overload_of
from purestep.jit.errors import is_writer, written

if TYPE_CHECKING:
    from purestep.jit._torch import FakeTensorMode

aten = torch.ops.aten


def functionalized(graph: fx.GraphModule, mode: FakeTensorMode, fakes: list[Tensor], table: dict[Any, Any]) -> Any:
    """Return a graph with the same results and no in-place operations.

    Args:
        graph: writes into none of its inputs; may be changed in place.
        mode: the mode of the fake tensors.
        fakes: the fake inputs.
        table: decompositions for `make_fx`.
    """
    if _in_place(graph, mode):
        return graph
    with mode:
        return make_fx(torch.func.functionalize(graph), table)(*fakes)


@dataclasses.dataclass(frozen=True)
class _Write:
    """An in-place node, and the functional operator that replaces it.

    Attributes:
        node: the in-place node.
        operator: the functional operator: returns the new value, or a tuple that ends with the new values.
        value: the result of the operator on fake tensors.
        memory: ids of the storages that the node writes into.
    """

    node: fx.Node
    operator: _torch.OpOverload
    value: Any
    memory: tuple[int, ...]

    def written(self) -> tuple[Tensor, ...]:
        """Return the new values of the tensors that the node writes into."""
        return self.value[-len(self.memory) :] if isinstance(self.value, tuple) else (self.value,)


def _in_place(graph: fx.GraphModule, mode: FakeTensorMode) -> bool:
    """Rewrite a graph in place, or return False and leave it unchanged."""
    position = {node: i for i, node in enumerate(graph.graph.nodes)}
    aliases: dict[int, list[fx.Node]] = defaultdict(list)
    for node in position:
        if isinstance(node.meta.get("val"), Tensor):
            aliases[_memory(node)].append(node)
    writes = []
    for node in position:
        if is_writer(node):
            write = _write(node, mode)
            if write is None or not _used_whole(write, aliases, position):
                return False
            writes.append(write)
    for write in writes:
        results = _replaced(graph, write)
        for new, memory in zip(results, write.memory, strict=True):
            position[new] = position[write.node]
            # Views made after the write take the new value as their source already.
            for alias in [a for a in aliases[memory] if position[a] <= position[write.node]]:
                for user in list(alias.users):
                    if position.get(user, -1) > position[write.node]:
                        user.replace_input_with(alias, new)
            aliases[memory].append(new)
        graph.graph.erase_node(write.node)
    graph.graph.eliminate_dead_code()
    return True


def _memory(node: fx.Node) -> int:
    return _torch.storage_id(node.meta["val"].untyped_storage())


def _write(node: fx.Node, mode: FakeTensorMode) -> _Write | None:
    target = _counterpart(node.target)
    if target is None:
        return None
    args, kwargs = fx.node.map_arg((node.args, node.kwargs), lambda n: n.meta["val"])
    with mode, torch.no_grad():
        value = target(*args, **kwargs)
    targets = list(written(node))
    write = _Write(node, target, value, tuple(_memory(t) for t in targets))
    news, olds = write.written(), [t.meta["val"] for t in targets]
    same = all(new.shape == old.shape and new.dtype == old.dtype for new, old in zip(news, olds, strict=True))
    return write if same else None


def _counterpart(target: Any) -> _torch.OpOverload | None:
    if target is batch_norm_legit.default:
        return batch_norm_functional
    name = _torch.schema_of(target).name.removeprefix("aten::")
    packet = getattr(aten, name[:-1], None) if name.endswith("_") and not name.startswith("_") else None
    return None if packet is None else getattr(packet, overload_of(target), None)


def _used_whole(write: _Write, aliases: dict[int, list[fx.Node]], position: dict[fx.Node, int]) -> bool:
    """Tell whether every alias that is read after the write has the layout of the written tensor."""
    for target in written(write.node):
        layout = _layout(target)
        for alias in aliases[_memory(target)]:
            later = any(position[user] > position[write.node] for user in alias.users)
            if position[alias] <= position[write.node] and later and _layout(alias) != layout:
                return False
    return True


def _layout(node: fx.Node) -> tuple[Any, ...]:
    x = node.meta["val"]
    return x.shape, x.stride(), x.storage_offset(), x.dtype


def _replaced(graph: fx.GraphModule, write: _Write) -> list[fx.Node]:
    """Insert the functional operator before the node, and return the nodes of the new values."""
    node = write.node
    with graph.graph.inserting_before(node):
        new = graph.graph.call_function(write.operator, node.args, node.kwargs)
        new.meta["val"] = write.value
        if not isinstance(write.value, tuple):
            return [new]
        node.replace_all_uses_with(new)
        results = []
        for i in range(len(write.value) - len(write.memory), len(write.value)):
            item = graph.graph.call_function(operator.getitem, (new, i))
            item.meta["val"] = write.value[i]
            results.append(item)
    return results
