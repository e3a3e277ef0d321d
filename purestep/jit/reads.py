"""Values of tensors that Python reads while a function is traced: `if mask.all():`, `labels.max().item()`.

A trace has shapes and no values. `Reads` works out a value that constants alone decide, and one that the batch decides,
from the batch of this call; the second is a `Guard` of the graph, which later calls have to pass. What depends on
floating-point state (parameters, so everything that a model computes) is left to be refused. `trace` asks, and
`function` looks at the guards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from purestep import _torch
from purestep.jit._torch import READ_VALUE, UNIQUE, node_of, proxy_root
from purestep.jit.errors import is_writer, written
from purestep.random.host_draws import calling_line

aten = torch.ops.aten
# More reads than these are no decision but a computation in Python.
_MOST = 64


@dataclasses.dataclass(frozen=True)
class Guard:
    """A value that a trace baked in.

    Attributes:
        value: the number, or the list of them.
        compute: computes it from the tensors of a call.
        slots: which of the tensors `compute` takes.
        line: the line that read it.
    """

    value: Any
    compute: Callable[..., Any]
    slots: tuple[int, ...]
    line: str | None

    def __str__(self) -> str:
        value = repr(self.value)
        return f"{value if len(value) < 60 else value[:57] + '...'} was read in {self.line or 'the function'}"

    def holds(self, tensors: Sequence[Tensor]) -> bool:
        """Tell whether a call would read the same value."""
        with torch.no_grad():
            return bool(self.compute(*[tensors[slot] for slot in self.slots]) == self.value)


@dataclasses.dataclass(frozen=True)
class Roots:
    """What values may be read from.

    Attributes:
        tensors: the tensors of the call, one for each input of the graph.
        batch: the inputs of which any whole number and truth value may be read.
        counters: those of which truth values may be read.
    """

    tensors: Sequence[Tensor]
    batch: frozenset[int] = frozenset()
    counters: frozenset[int] = frozenset()


class Reads:
    """The reads of one trace.

    Attributes:
        guards: of the values that the batch decided, in order.
        log: every value that was read, in order: a second run on fake tensors is given the same.
    """

    def __init__(self, roots: Roots) -> None:
        self.roots = roots
        self.guards: list[Guard] = []
        self.log: list[Any] = []

    def table(self) -> dict[Any, Callable[..., Any]]:
        """Return decompositions, for `make_fx`, of the operators that ask for values."""
        values = {op: self._reader(op) for op in (READ_VALUE, aten.equal.default)}
        shapes = {op: self._constant(op) for op in _SHAPED}
        return {**values, **shapes, aten.index.Tensor: self._index}

    def _reader(self, op: Any) -> Callable[..., Any]:
        return lambda *args: self.read(op, *args)

    def read(self, op: Callable[..., Any], *args: Any) -> Any:
        """Return what an operator makes of the values of its tensors, or NotImplemented where it may not be known."""
        program = self._program(op, args)
        if program is None or len(self.guards) >= _MOST:
            return NotImplemented
        compute, slots = program
        kinds = {x.dtype for x in args if isinstance(x, Tensor)}
        truth = op is aten.equal.default or kinds == {torch.bool}
        whole = truth or not any(kind.is_floating_point or kind.is_complex for kind in kinds)
        readable = self.roots.batch if whole else frozenset()
        if truth:
            readable = readable | self.roots.counters
        tensors = [self.roots.tensors[slot] for slot in slots]
        if not readable.issuperset(slots) or any(x.is_meta for x in tensors):
            return NotImplemented
        value = _evaluate(compute, tensors)
        self.log.append(value)
        if slots and not any(g.value == value and g.slots == slots and same(g.compute, compute) for g in self.guards):
            self.guards.append(Guard(value, compute, slots, calling_line()))
        return value

    def replayed(self) -> _Replayed:
        """Return a mode in which reads are answered as they were in the trace."""
        return _Replayed(self.log)

    def _constant(self, op: Any) -> Callable[..., Any]:
        """An operator whose result has a shape that depends on values: known where constants decide it."""

        def result(*args: Any, **kwargs: Any) -> Any:
            program = self._program(lambda *a: op(*a, **kwargs), args)
            if program is None or program[1]:
                return NotImplemented
            found = _evaluate(program[0], [])
            many = isinstance(found, tuple)
            fresh = [aten.lift_fresh.default(x) for x in (found if many else (found,))]
            return tuple(fresh) if many else fresh[0]

        return result

    def _index(self, x: Tensor, indices: Sequence[Tensor | None]) -> Any:
        """`x[mask]` where constants decide the mask."""
        if not any(i is not None and i.dtype in (torch.bool, torch.uint8) for i in indices):
            return NotImplemented
        places: list[Tensor | None] = []
        for index in indices:
            if index is None or index.dtype not in (torch.bool, torch.uint8):
                places.append(index)
                continue
            found = self._constant(aten.nonzero.default)(index)
            if found is NotImplemented:
                return NotImplemented
            places.extend(found.unbind(1))
        return aten.index.Tensor(x, places)

    # --- what a value is made of --------------------------------------------------------------------------------------

    def _program(
        self, op: Callable[..., Any], args: Sequence[Any]
    ) -> tuple[Callable[..., Any], tuple[int, ...]] | None:
        """Return what computes an operator from inputs of the graph, and which; None where that is not to be done."""
        nodes = [node_of(x) if isinstance(x, Tensor) else None for x in args]
        if any(isinstance(x, Tensor) and node is None for x, node in zip(args, nodes, strict=True)):
            return None
        wanted = [node for node in nodes if node is not None]
        if not wanted:
            return None
        steps = _steps(wanted)
        if steps is None:
            return None
        inputs = [node for node in wanted[0].graph.nodes if node.op == "placeholder"]
        program = fx.Graph()
        copied: dict[fx.Node, fx.Node] = {}
        slots = tuple(slot for slot, node in enumerate(inputs) if node in steps)
        for slot in slots:
            copied[inputs[slot]] = program.placeholder(inputs[slot].name)
        for node in steps:
            if node.op != "placeholder":
                copied[node] = program.node_copy(node, copied.__getitem__)
        values = [x if node is None else copied[node] for x, node in zip(args, nodes, strict=True)]
        program.output(program.call_function(op, tuple(values)))
        return fx.GraphModule(proxy_root(), program), slots


class _Replayed(_torch.DispatchMode):
    """Answers reads of fake tensors from a list."""

    def __init__(self, values: Sequence[Any]) -> None:
        super().__init__()
        self.values = list(values)

    def __torch_dispatch__(self, func: Any, kinds: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in (READ_VALUE, aten.equal.default) and self.values:
            return self.values.pop(0)
        return func(*args, **(kwargs or {}))


_SHAPED = (
    aten.nonzero.default,
    aten.masked_select.default,
    aten.repeat_interleave.Tensor,
    UNIQUE,
    aten.unique_consecutive.default,
    aten.bincount.default,
)


def _evaluate(compute: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
    with _torch.disable_current_modes(), _torch.no_torch_function(), torch.no_grad():
        return compute(*tensors)


def same(one: Any, other: Any) -> bool:
    """Tell whether two programs are the same text over the same constants."""
    texts = [str(program.graph) for program in (one, other)]
    return texts[0] == texts[1] and not any(n.op == "get_attr" for n in one.graph.nodes)


def _steps(wanted: Sequence[fx.Node]) -> dict[fx.Node, None] | None:
    """Return the nodes of a graph in the making that decide some of them, in order; None where one of them draws random
    numbers or writes into an input.

    What a later operation wrote into a tensor decides it, too.
    """
    order = list(wanted[0].graph.nodes)
    writers = [node for node in order if is_writer(node)]
    needed: set[fx.Node] = set()
    pending = list(wanted)
    while pending:
        while pending:
            node = pending.pop()
            if node not in needed:
                needed.add(node)
                pending.extend(node.all_input_nodes)
        memory = {m for node in needed for m in _memory(node)} if writers else set()
        pending = [w for w in writers if w not in needed and memory & _written(w)]
    inputs = {m for node in order if node.op == "placeholder" for m in _memory(node)}
    for node in needed:
        drawn = isinstance(node.target, _torch.OpOverload) and torch.Tag.nondeterministic_seeded in node.target.tags
        if drawn or (is_writer(node) and inputs & _written(node)):
            return None
    return {node: None for node in order if node in needed}


def _memory(node: fx.Node) -> Iterator[int]:
    value = node.meta.get("val")
    for x in value if isinstance(value, (list, tuple)) else (value,):
        if isinstance(x, Tensor):
            yield _torch.storage_id(x.untyped_storage())


def _written(node: fx.Node) -> set[int]:
    return {m for target in written(node) for m in _memory(target)}
