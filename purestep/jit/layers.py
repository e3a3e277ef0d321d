"""Repeated layers in a graph: one compiled function for all layers that are the same computation.

A model of twelve equal blocks traces as a sequence of operations that repeats twelve times, forward and backward, and
Inductor's work grows with the number of operations. `layered` cuts such a graph into pieces that run one after another,
of which equal ones are compiled once; `backends` compiles them.

A cut never separates two operations that Inductor could fuse: it lies where one side waits for a matrix product,
a convolution or an attention, which are calls of a library.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import itertools
import math
import operator
from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from purestep import _torch
from purestep.jit.outline import COPY, Use, called, kind_of, memory_of, part_of, signature_of, with_last_uses
from purestep.jit.trace import Traced

Run = Callable[[list[Tensor]], Sequence[Any]]
_SHORT = 24  # operations of a layer. Each piece costs Inductor some work of its own.
_SPARED = 48  # operations that are compiled once less, at least
# Multiplications and additions of a layer, for each thread, about. They take milliseconds; a call takes microseconds.
_WORK = 1e8
_EQUAL = 4  # how often a layer may call a library in the same way
# Elements of a value that may be written and read once more: fusing its operations would spare about a microsecond.
_LITTLE = 2**14
_aten = torch.ops.aten
_LIBRARY = (
    _aten.mm,
    _aten.addmm,
    _aten.bmm,
    _aten.baddbmm,
    _aten.convolution,
    _aten.convolution_backward,
    _torch.cpu_attention,
    _torch.cpu_attention_backward,
)


@dataclasses.dataclass(frozen=True)
class Layered:
    """A graph in pieces that run in order.

    Attributes:
        kinds: the graphs of the pieces, equal ones once.
        uses: the pieces; positions count the inputs of the whole, then what the pieces return.
        returns: positions of the results of the whole.
    """

    kinds: tuple[Traced, ...]
    uses: tuple[Use, ...]
    returns: tuple[int, ...]

    def run(self, kinds: Sequence[Run]) -> Run:
        """Return the function that runs the whole graph with compiled pieces."""
        calls = [(_Piece(kinds[use.kind], self.kinds[use.kind].fakes), use.takes, use.last) for use in self.uses]

        def run(tensors: list[Tensor]) -> Sequence[Any]:
            values: list[Any] = [*tensors]
            tensors.clear()
            return called(calls, values, self.returns)

        return run


class _Piece:
    """A compiled piece in one place of the graph.

    A compiler may lay out what a piece returns in another way than the trace did. The first call finds the inputs whose
    strides are not those that this piece was compiled for, and every call copies them.
    """

    def __init__(self, run: Run, fakes: Sequence[Tensor]) -> None:
        self.run, self.fakes = run, fakes
        self.others: list[tuple[int, tuple[int, ...]]] | None = None

    def __call__(self, given: list[Tensor]) -> Sequence[Any]:
        if self.others is None:
            pairs = enumerate(zip(given, self.fakes, strict=True))
            self.others = [(i, fake.stride()) for i, (x, fake) in pairs if not _laid_alike(x, fake)]
        for i, strides in self.others:
            given[i] = _laid(given[i], strides)
        return self.run(given)


def _laid_alike(x: Tensor, y: Tensor) -> bool:
    return all(a == b for size, a, b in zip(x.shape, x.stride(), y.stride(), strict=True) if size > 1)


def _laid(x: Tensor, strides: tuple[int, ...]) -> Tensor:
    """Return a copy with the given strides."""
    once = x[tuple(slice(0, None if stride else 1) for stride in strides)]
    return torch.empty_strided(once.shape, strides, dtype=x.dtype).copy_(once).expand(x.shape)


def layered(traced: Traced) -> Layered | None:
    """Cut a graph of CPU tensors at repeated layers; None if there are none that are worth it."""
    nodes = list(traced.graph.graph.nodes)
    if any(node.op not in ("placeholder", "call_function", "output") for node in nodes):
        return None
    if any(fake.device.type != "cpu" for fake in traced.fakes):
        return None
    sequence = _Sequence(nodes)
    layers: dict[tuple[int, int], Hashable] = {}
    for run in sequence.repeats():
        for span in itertools.pairwise(run.cuts()):
            piece = sequence.piece(*span)
            layers[span] = signature_of(piece.inputs, piece.nodes, piece.outputs)
    counts = collections.Counter(layers.values())
    layers = {span: signature for span, signature in layers.items() if counts[signature] > 1}
    return sequence.cut(traced, layers) if layers else None


class _Sequence:
    """The operations of a graph in order, without views of inputs, which each piece makes for itself.

    So no piece returns a view of an input that a later piece overwrites.
    """

    def __init__(self, nodes: Sequence[fx.Node]) -> None:
        self.inputs = [node for node in nodes if node.op == "placeholder"]
        self.returned: list[fx.Node] = list(nodes[-1].args[0])  # type: ignore[arg-type]
        memory = {memory_of(node) for node in self.inputs}
        calls = [node for node in nodes if node.op == "call_function"]
        self.views = {node for node in calls if memory_of(node) in memory and node.target is not COPY}
        self.nodes = [node for node in calls if node not in self.views]
        self.at = {node: i for i, node in enumerate(self.nodes)}
        names: dict[Hashable, int] = {}
        self.tokens = [names.setdefault(_token(node), len(names)) for node in self.nodes]

    # --- finding layers -----------------------------------------------------------------------------------------------

    def repeats(self) -> Iterator[_Run]:
        """Yield runs of equal layers that do not overlap, those that spare most first."""
        free = [(0, len(self.nodes))]
        while free:
            low, high = free.pop()
            found = self._best(low, high)
            if found is not None:
                yield found
                free += [(low, found.start), (found.end, high)]

    def _best(self, low: int, high: int) -> _Run | None:
        runs = [run for length in self._lengths(low, high) for run in self._periodic(low, high, length)]
        for spared, start, end, length in sorted(runs, reverse=True):
            if spared < _SPARED:
                break
            found = self._placed(start, end, length)
            if found is not None:
                return found
        return None

    def _lengths(self, low: int, high: int) -> list[int]:
        """Return how far calls of a library are from the next equal ones: a layer may hold an equal call twice."""
        seen: dict[int, list[int]] = collections.defaultdict(list)
        for i in range(low, high):
            if _is_library(self.nodes[i]):
                seen[self.tokens[i]].append(i)
        pairs = ((a, b) for at in seen.values() for k in range(1, _EQUAL + 1) for a, b in zip(at, at[k:], strict=False))
        return list(dict.fromkeys(b - a for a, b in pairs if b - a >= _SHORT))

    def _periodic(self, low: int, high: int, length: int) -> Iterator[tuple[int, int, int, int]]:
        """Yield `(spared, start, end, length)` of spans in which each operation is that of `length` before."""
        at = low
        same = (self.tokens[i] == self.tokens[i + length] for i in range(low, high - length))
        for equal, run in itertools.groupby(same):
            count = len(list(run))
            if equal and count >= length:
                yield count, at, at + count + length, length
            at += count

    def _placed(self, start: int, end: int, length: int) -> _Run | None:
        """Return as many layers of a span as fit between cuts that separate nothing."""
        best: _Run | None = None
        for first in range(start, min(start + length, end - 2 * length + 1)):
            run = _Run(first, length, (end - first) // length)
            if (best is None or run.count > best.count) and not any(self.tied[cut] for cut in run.cuts()):
                best = run
        if best is None or (best.count - 1) * length < _SPARED:
            return None
        work = sum(map(_arithmetic, self.nodes[best.start : best.start + length]))
        return best if work >= _WORK * torch.get_num_threads() else None

    @functools.cached_property
    def tied(self) -> list[bool]:
        """For each position, whether a cut there separates operations that could be fused, or a list from its items.

        Operations can be fused unless a call of a library has to run between them. Sets of operations are bits of
        integers.
        """
        before, behind_library = list[int](), list[int]()
        ends = [0] * (len(self.nodes) + 1)
        for i, node in enumerate(self.nodes):
            above = {x: self.at[x] for x in node.all_input_nodes if x in self.at}
            waits = before_it = 0
            for source, at in above.items():
                waits |= before[at] if _is_library(source) else behind_library[at]
                before_it |= before[at] | 1 << at
            before.append(before_it)
            behind_library.append(waits)
            for source, at in above.items():
                origin = _origin(source)
                apart = _is_library(node) or _is_library(origin) or waits >> self.at.get(origin, 0) & 1
                is_list = not isinstance(source.meta["val"], Tensor)
                if is_list or not (apart or source.meta["val"].numel() <= _LITTLE):
                    ends[at] = max(ends[at], i)
        reach = itertools.accumulate(ends, max)
        return [False, *(furthest > at for at, furthest in enumerate(reach))]

    # --- cutting ------------------------------------------------------------------------------------------------------

    def piece(self, start: int, end: int) -> _Part:
        """Return the operations of a piece with the views of inputs that they need."""
        span = self.nodes[start:end]
        returned = set(self.returned)
        outputs = [x for x in span if x in returned or any(self.at.get(user, -1) >= end for user in x.users)]
        if end == len(self.nodes):
            outputs += dict.fromkeys(x for x in self.returned if x in self.views)
        own = dict.fromkeys(x for node in (*span, *outputs) for x in (*self._needed(node), node))
        inputs = dict.fromkeys(x for node in own for x in node.all_input_nodes if x not in own)
        return _Part(list(inputs), list(own), outputs)

    def _needed(self, node: fx.Node) -> Iterator[fx.Node]:
        for source in node.all_input_nodes:
            if source in self.views:
                yield from self._needed(source)
                yield source

    def cut(self, traced: Traced, layers: Mapping[tuple[int, int], Hashable]) -> Layered:
        """Return the graph in pieces: the layers, by the signatures of their spans, and the operations around them."""
        edges = sorted({0, len(self.nodes), *itertools.chain(*layers)})
        position = {node: i for i, node in enumerate(self.inputs)}
        numbers: dict[Hashable, int] = {}
        kinds: list[Traced] = []
        calls = []
        for span in itertools.pairwise(edges):
            piece = self.piece(*span)
            number = numbers.setdefault(layers.get(span, span), len(numbers))
            if number == len(kinds):
                kinds.append(part_of(traced, piece.inputs, piece.nodes, piece.outputs))
            calls.append((number, tuple(position[x] for x in piece.inputs)))
            for node in piece.outputs:
                position[node] = len(position)
        returns = tuple(position[node] for node in self.returned)
        return Layered(tuple(kinds), with_last_uses(calls, returns), returns)


@dataclasses.dataclass(frozen=True)
class _Run:
    """Equal layers one after another: `count` times `length` operations."""

    start: int
    length: int
    count: int

    @property
    def end(self) -> int:
        return self.start + self.length * self.count

    def cuts(self) -> range:
        return range(self.start, self.end + 1, self.length)


@dataclasses.dataclass(frozen=True)
class _Part:
    inputs: list[fx.Node]
    nodes: list[fx.Node]
    outputs: list[fx.Node]


def _is_library(node: fx.Node) -> bool:
    return isinstance(node.target, _torch.OpOverload) and node.target.overloadpacket in _LIBRARY


def _origin(node: fx.Node) -> fx.Node:
    """Return the operation that computes the values of a node: its source, if it is a view or an item of a list."""
    while node.op == "call_function" and node.all_input_nodes:
        source = node.all_input_nodes[0]
        if node.target is not operator.getitem and memory_of(source) != memory_of(node):
            break
        node = source
    return node


def _arithmetic(node: fx.Node) -> float:
    """Return the number of multiplications and additions of a matrix product or a convolution, about."""
    if not _is_library(node):
        return 0.0
    sizes = [x.meta["val"].numel() for x in node.all_input_nodes if isinstance(x.meta.get("val"), Tensor)]
    return 2.0 * math.prod(sorted(sizes)[-2:]) ** 0.75


def _token(node: fx.Node) -> Hashable:
    """Return what is the same for two nodes that call the same operator on tensors of the same kinds."""

    def kind(source: fx.Node) -> Any:
        return _Kind(kind_of(source))

    return str(node.target), repr(fx.map_arg((node.args, node.kwargs), kind)), kind_of(node)


@dataclasses.dataclass(frozen=True)
class _Kind:
    kind: Hashable
