"""Values of tensors that Python reads while a function is traced: `if mask.all():`, `labels.max().item()`.

A trace has shapes and no values. `Reads` computes a requested value from constants, or from the batch of this call. A
value of the batch becomes a `Guard` of the graph, which later calls have to pass. A value that depends on
floating-point state (parameters, so everything that a model computes) is not read: the tracer refuses it. `trace` calls
`Reads`; `function` checks the guards.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from purestep import _torch
from purestep.jit._torch import READ_VALUE, UNIQUE, node_of, proxy_root
from purestep.jit.bounds import COMPARED, known
from purestep.jit.errors import is_writer, written
from purestep.random.host_trap import calling_line

aten = torch.ops.aten
# A function that reads more values than this computes in Python; it does not merely branch.
_MOST = 64


@dataclasses.dataclass(frozen=True)
class Guard:
    """A value of the batch that is a constant of a traced graph.

    Attributes:
        value: a number, or a list of numbers.
        compute: computes the value from the tensors of a call.
        slots: positions of the tensors that `compute` takes.
        line: the user's line that read the value.
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
    """The inputs of a trace whose values may be read.

    Attributes:
        tensors: the tensors of the call, one for each input of the graph.
        batch: inputs from which integers and booleans may be read.
        counters: inputs from which booleans may be read: the batch, and the integers of the state.
    """

    tensors: Sequence[Tensor]
    batch: frozenset[int] = frozenset()
    counters: frozenset[int] = frozenset()


class Reads:
    """The reads of one trace.

    Attributes:
        guards: one for each value that was read from the batch, in order.
        log: every value that was read, in order; `replayed` returns them to a second run on fake tensors.
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
        """Return the result of an operator on the real values, or NotImplemented where they may not be read."""
        settled = _settled(args[0]) if op is READ_VALUE else None
        if settled is not None:
            self.log.append(settled)
            return settled
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
        """Return a mode that answers each read with the value that the trace read."""
        return _Replayed(self.log)

    def _constant(self, op: Any) -> Callable[..., Any]:
        """Return a decomposition of an operator whose output shape depends on values: computed if all are constants."""

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
        """Decompose `x[mask]` where the mask depends on constants only."""
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

    # --- the program that computes a value ----------------------------------------------------------------------------

    def _program(
        self, op: Callable[..., Any], args: Sequence[Any]
    ) -> tuple[Callable[..., Any], tuple[int, ...]] | None:
        """Return a program that computes an operator from inputs of the graph, and the positions of those inputs; None
        where an argument is not traced, is drawn at random or is written into an input."""
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
    """Answers reads of fake tensors with recorded values."""

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


def _settled(truth: Tensor) -> bool | None:
    """Return a truth value that is the same for every draw, see `bounds`; None where there is none."""
    node = node_of(truth)
    if node is None or node.target not in COMPARED:
        return None
    steps = _steps([node])
    return None if steps is None or any(is_writer(step) for step in steps) else known(node)


def _evaluate(compute: Callable[..., Any], tensors: Sequence[Tensor]) -> Any:
    with _torch.disable_current_modes(), _torch.no_torch_function(), torch.no_grad():
        return compute(*tensors)


def same(one: Any, other: Any) -> bool:
    """Tell whether two programs have the same code and hold no constant tensors."""
    texts = [str(program.graph) for program in (one, other)]
    return texts[0] == texts[1] and not any(n.op == "get_attr" for n in one.graph.nodes)


def _steps(wanted: Sequence[fx.Node]) -> dict[fx.Node, None] | None:
    """Return the nodes that the wanted nodes depend on, in order; None where one of them draws random numbers or writes
    into an input.

    A node also depends on every later operation that wrote into its memory.
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
