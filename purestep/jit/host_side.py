"""What the host computes of a compiled graph: keys of fused attention, and the next number of the step.

A kernel of a card that draws is seeded by the host, so `purestep::fused_attention` needs the words of its key there.
They follow from the key of the state and the number of the step, of which the host remembers the values
(`random.remembered`). `of` cuts their computation out of the graph, and the graph takes the keys as inputs on the CPU
instead; so a step waits for the card only where these values are not known. What the graph writes over the number of
the step is followed likewise.
"""

from __future__ import annotations

import dataclasses
import operator
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from purestep import _torch
from purestep.jit import errors
from purestep.jit._torch import fake_like
from purestep.jit.trace import Traced
from purestep.random import remembered
from purestep.random.card_attention import is_operator
from purestep.random.philox import philox

Run = Callable[[list[Tensor]], Sequence[Any]]
_SMALL = 8  # elements of an input that the host may read: a key has two, the number of a step one
_copy = torch.ops.aten.copy_.default


@dataclasses.dataclass(frozen=True)
class _Part:
    """A part of a graph that computes a few values from small inputs, on CPU tensors.

    Attributes:
        slots: positions of its inputs among those of the graph.
        graph: takes them, and returns the values as a list.
    """

    slots: tuple[int, ...]
    graph: fx.GraphModule

    def __call__(self, tensors: Sequence[Tensor], find: Callable[[Tensor], Any]) -> list[Tensor] | None:
        """Compute the values; None if `find` does not know an input."""
        given = []
        for slot in self.slots:
            value = find(tensors[slot])
            if value is None:
                return None
            given.append(torch.tensor(value, dtype=tensors[slot].dtype, device="cpu"))
        found: list[Tensor] = self.graph(*given)
        return found


@dataclasses.dataclass(frozen=True)
class HostSide:
    """A graph without what the host computes of it.

    Attributes:
        traced: the graph; after its own inputs it takes the keys.
        keys: computes the keys.
        written: positions of the inputs that it writes an integer over, and what computes it; None for what the host
            cannot compute.
        returned: positions of the outputs that are integers which the host computes, and what does.
    """

    traced: Traced
    keys: _Part | None
    written: dict[int, _Part | None]
    returned: dict[int, _Part]

    def run(self, run: Run) -> Run:
        """Return a function that runs the whole graph, given one for what is left of it."""

        def whole(tensors: list[Tensor]) -> Sequence[Any]:
            keys = self.keys(tensors, remembered.read) if self.keys else None
            numbers = [_number(part, tensors) for part in (*self.written.values(), *self.returned.values())]
            new = [tensors[slot] for slot in self.written]
            tensors.extend(keys or ())
            outputs = run(tensors)
            new.extend(outputs[i] for i in self.returned)
            # A compiled kernel writes without torch's count of writes, so the old value is not kept in any case.
            for tensor, number in zip(new, numbers, strict=True):
                remembered.remember(tensor, number)
            return outputs

        return whole


def _number(part: _Part | None, tensors: Sequence[Tensor]) -> int | None:
    found = None if part is None else part(tensors, remembered.known)
    return None if found is None else int(found[0])


def of(traced: Traced) -> HostSide | None:
    """Return a graph in two parts; None if the host has nothing to compute, as where all inputs are CPU tensors."""
    inputs, _, returned = traced.nodes()
    attentions = [node for node in traced.graph.graph.nodes if is_operator(node.target)]
    keys = list(dict.fromkeys(node.args[0] for node in attentions))
    part = _part(traced, keys) if keys else None
    slot_of = {node: slot for slot, node in enumerate(inputs) if _is_number(node)}
    over = {n.args[0]: n.args[1] for n in traced.graph.graph.nodes if n.target is _copy and n.args[0] in slot_of}
    written = {slot_of[into]: _part(traced, [value]) for into, value in over.items()}
    numbers = [i for i, node in enumerate(returned) if _is_number(node) and node.op != "placeholder"]
    followed = {i: found for i in numbers if (found := _part(traced, [returned[i]])) is not None}
    if not keys and not written and not followed:
        return None
    left = traced if part is None else _with_inputs(traced, keys)
    return HostSide(left, part, written, followed)


def has_keys(traced: Traced) -> bool:
    """Tell whether the host has the keys of all kernels that draw before the graph runs, as a recording needs them."""
    keys = [node.args[0] for node in traced.graph.graph.nodes if is_operator(node.target)]
    return all(key.meta["val"].device.type == "cpu" for key in keys)


def _is_number(node: fx.Node) -> bool:
    """Tell whether a node is an integer on a card."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and value.dtype == torch.int64 and value.ndim == 0 and value.device.type != "cpu"


def _part(traced: Traced, wanted: list[Any]) -> _Part | None:
    """Cut the computation of some nodes out of a graph; None if it is not one of small integers that are inputs."""
    inputs, _, _ = traced.nodes()
    needed: set[fx.Node] = set()
    pending = list(wanted)
    while pending:
        node = pending.pop()
        if node in needed:
            continue
        if not _for_host(node):
            return None
        needed.add(node)
        pending.extend(node.all_input_nodes)
    if not needed:
        return None
    graph, made = fx.Graph(), {}
    taken = [node for node in inputs if node in needed]
    for node in taken:
        made[node] = graph.placeholder(node.name)
    for node in traced.graph.graph.nodes:
        if node in needed and node.op == "call_function":
            args, kwargs = fx.map_arg((node.args, node.kwargs), made.__getitem__)
            args, kwargs = fx.node.map_aggregate((args, kwargs), _on_cpu)
            target = _philox if node.target is philox else node.target
            made[node] = graph.call_function(target, args, kwargs)
    graph.output([made[node] for node in wanted])
    slots = tuple(inputs.index(node) for node in taken)
    return _Part(slots, fx.GraphModule({}, graph))


def _for_host(node: fx.Node) -> bool:
    if node.op == "placeholder":
        value = node.meta.get("val")
        return isinstance(value, Tensor) and value.numel() <= _SMALL and value.dtype == torch.int64
    if node.op != "call_function":
        return False
    if node.target in (philox, operator.getitem):
        return True
    return isinstance(node.target, _torch.OpOverload) and not errors.is_writer(node) and _is_integral(node)


def _is_integral(node: fx.Node) -> bool:
    """Tell whether a node is a small tensor of integers."""
    value = node.meta.get("val")
    return isinstance(value, Tensor) and not value.is_floating_point() and value.numel() <= _SMALL


def _on_cpu(argument: Any) -> Any:
    return torch.device("cpu") if isinstance(argument, torch.device) else argument


def _philox(counter: Sequence[Any], key: Sequence[Any]) -> tuple[Any, ...]:
    """Compute a block in Python's ints, which takes a tenth of the time of two hundred operations."""
    words = [int(word) if isinstance(word, Tensor) and word.ndim == 0 else word for word in (*counter, *key)]
    if any(isinstance(word, Tensor) for word in words):
        return philox(counter, key)
    return tuple(torch.tensor(word, device="cpu") for word in philox(words[:4], words[4:]))


def _with_inputs(traced: Traced, keys: Sequence[fx.Node]) -> Traced:
    """Return a copy of a graph in which some nodes are inputs on the CPU, after the others."""
    graph = fx.Graph()
    made: dict[fx.Node, fx.Node] = {}
    inputs, _, _ = traced.nodes()
    fakes = [fake_like(traced.mode, key.meta["val"], "cpu") for key in keys]
    for node in inputs:
        made[node] = graph.node_copy(node, made.__getitem__)
    given = {}
    for i, (key, fake) in enumerate(zip(keys, fakes, strict=True)):
        given[key] = graph.placeholder(f"attention_key_{i}")
        given[key].meta["val"] = fake
    for node in traced.graph.graph.nodes:
        if node.op == "placeholder":
            continue
        made[node] = graph.node_copy(node, made.__getitem__)
        if is_operator(node.target):
            made[node].args = (given[node.args[0]], *made[node].args[1:])
    copied = fx.GraphModule(traced.graph, graph)
    copied.graph.eliminate_dead_code()
    copied.recompile()
    return dataclasses.replace(traced, graph=copied, fakes=[*traced.fakes, *fakes])
