"""`compare_bits`: the first operation in which two traces of a step differ, and how far they are apart there."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, Literal

from torch import Tensor

from purestep import bits
from purestep.arguments import Location, checked
from purestep.errors import ConfigError
from purestep.record.bits_trace import BitsTrace, Operation
from purestep.views import Block, Facts, Note, Printed

Kind = Literal["equal", "bits", "operation", "result"]


@dataclasses.dataclass(frozen=True, repr=False)
class BitsComparison(Printed):
    """Where two traces of a step part. Made by `ps.compare_bits`; it prints itself.

    Attributes:
        kind: "equal"; "bits" where the first operation that differs is the same operator on the same shapes in both;
            "operation" where one trace has another operation, other shapes, or none; "result" where all operations are
            equal, and what the steps returned is not: something outside of torch's operations differs.
        position: of the first operation that differs, from 0.
        a, b: that operation in both traces; None where a trace has ended.
        inputs_equal: whether it was given the same bits and numbers in both.
        outputs: positions of its outputs that differ.
        largest: the largest difference of the first of those outputs; None unless both traces hold the values.
        given: paths of the leaves of state and batch that differ.
        results: paths of the leaves of what the steps returned that differ.
        conditions: by name what differs between the places where the traces were made.
        differing: how many operations differ in all, where the traces are of the same operations.
        operations: how many operations each of the traces has.
    """

    kind: Kind
    position: int | None
    a: Operation | None
    b: Operation | None
    inputs_equal: bool
    outputs: tuple[int, ...]
    largest: bits.Largest | None
    given: tuple[str, ...]
    results: tuple[str, ...]
    conditions: Mapping[str, tuple[Any, Any]]
    differing: int
    operations: tuple[int, int]

    @property
    def equal(self) -> bool:
        """Whether every operation, and what the steps returned, has the same bits."""
        return self.kind == "equal"

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        head, facts = self._facts()
        return [Note(head), Facts(facts)]

    def _facts(self) -> tuple[str, list[tuple[str, str]]]:
        count = f"{self.operations[0]} operations"
        lines = [] if not self.given else [("given", f"other bits: {', '.join(self.given[:4])}{_more(self.given, 4)}")]
        if self.kind == "equal":
            head = f"equal: {count}"
        elif self.kind == "result":
            head = f"all {count} are equal, and the result is not"
            lines.append(("result", f"other bits: {', '.join(self.results[:4])}{_more(self.results, 4)}"))
            lines.append(("why", "something that is no operation of torch: numpy, Python, or a compiled function"))
        elif self.kind == "operation":
            head = f"the traces part at operation {self.position}: {_said(self.a)} in a, {_said(self.b)} in b"
            lines += [(name, _place(op)) for name, op in (("a", self.a), ("b", self.b)) if op is not None]
        else:
            head, lines = self._first(lines)
        different = "; ".join(f"{name} {a} and {b}" for name, (a, b) in self.conditions.items())
        lines += [("made with", different)] if different else []
        return head, lines

    def _first(self, lines: list[tuple[str, str]]) -> tuple[str, list[tuple[str, str]]]:
        a, b = self.a, self.b
        if a is None or b is None or self.position is None:
            return "", lines
        largest = self.largest
        apart = "" if largest is None or largest.ulp is None else f", {largest.ulp} ulp"
        lines = [("where", f"operation {self.position} of {self.operations[0]}, {_place(a)}"), *lines]
        if (a.place, a.code) != (b.place, b.code):
            lines.append(("in b", _place(b)))
        if self.inputs_equal:
            lines.append(("inputs", "equal"))
        elif a.arguments != b.arguments:
            lines.append(("arguments", f"({a.arguments}) and ({b.arguments})"))
        else:
            which = ", ".join(str(i) for i, (x, y) in enumerate(zip(a.inputs, b.inputs, strict=False)) if x != y)
            source = "the state or the batch" if self.given else "a constant, or a view of something else"
            lines.append(("inputs", f"number {which} differs, and no operation before it does: {source}"))
        first = self.outputs[0]
        x, y = a.outputs[first], b.outputs[first]
        lines.append(("bits", f"output {first}, {x.kind}: {x.digest} and {y.digest}"))
        if largest is not None:
            lines.append(("largest", f"at {list(largest.index)}: {largest.a!r} and {largest.b!r}{apart}"))
        else:
            lines.append(("distance", f"trace both with values=[{self.position}] to see it"))
        lines.append(
            ("in all", "1 operation differs" if self.differing == 1 else f"{self.differing} operations differ")
        )
        return f"the first operation that differs is {a}{apart}", lines


def _more(paths: tuple[str, ...], shown: int) -> str:
    return f" and {len(paths) - shown} more" if len(paths) > shown else ""


def _said(operation: Operation | None) -> str:
    if operation is None:
        return "none"
    return f"{operation} -> {', '.join(output.kind for output in operation.outputs)}"


def _place(operation: Operation) -> str:
    return f"{operation.phase}, {operation.place}" + (f": {operation.code}" if operation.code else "")


@checked(ConfigError)
def compare_bits(a: BitsTrace | Location, b: BitsTrace | Location) -> BitsComparison:
    """Return where two traces of a step part: the first operation whose outputs have other bits.

    Operations are compared in the order in which they ran. Where one trace has an operation that the other has not, the
    comparison ends there, because what follows has no counterpart.

    Args:
        a, b: what `ps.trace_bits` returned, or files it wrote.

    Returns:
        A comparison: print it, or read its fields.

    Raises:
        ConfigError: a file is no whole trace.

    Examples:
        >>> import torch
        >>> import purestep as ps
        >>> x = torch.ones(2)
        >>> a = ps.trace_bits(lambda state, batch: ((state * 3).exp(), {}), x, x, values=True)
        >>> b = ps.trace_bits(lambda state, batch: ((state * 4).exp(), {}), x, x, values=True)
        >>> comparison = compare_bits(a, b)
        >>> comparison.position, comparison.a.name, comparison.largest
        (0, 'aten.mul.Tensor', Largest(index=(0,), a=3.0, b=4.0, ulp=4194304))
    """
    left, right = (x if isinstance(x, BitsTrace) else BitsTrace.load(x) for x in (a, b))
    pairs = list(zip(left.operations, right.operations, strict=False))
    kind: Kind = "equal"
    results = _differing(left.result, right.result)
    position = next((i for i, (x, y) in enumerate(pairs) if not _same_kind(x, y) or x.outputs != y.outputs), None)
    if position is None and len(left.operations) != len(right.operations):
        position = len(pairs)
    if position is not None:
        alike = position < len(pairs) and _same_kind(*pairs[position])
        kind = "bits" if alike else "operation"
    elif results:
        kind = "result"
    x, y = (
        t.operations[position] if position is not None and position < len(t.operations) else None for t in (left, right)
    )
    outputs: tuple[int, ...] = ()
    if kind == "bits" and x is not None and y is not None:
        outputs = tuple(i for i, (p, q) in enumerate(zip(x.outputs, y.outputs, strict=True)) if p != q)
    return BitsComparison(
        kind,
        position,
        x,
        y,
        x is not None and y is not None and (x.inputs, x.arguments) == (y.inputs, y.arguments),
        outputs,
        _largest(left, right, position, outputs[0]) if outputs and position is not None else None,
        _differing(left.given, right.given),
        results,
        {
            name: (left.conditions.get(name), right.conditions.get(name))
            for name in {**left.conditions, **right.conditions}
            if left.conditions.get(name) != right.conditions.get(name)
        },
        sum(p.outputs != q.outputs for p, q in pairs),
        (len(left.operations), len(right.operations)),
    )


def _same_kind(a: Operation, b: Operation) -> bool:
    """Return whether two operations are one operator with outputs of the same dtypes and shapes."""
    return a.name == b.name and len(a.outputs) == len(b.outputs) and all(map(_alike, a.outputs, b.outputs))


def _alike(a: Any, b: Any) -> bool:
    # A number, other than a tensor, has its value in its kind.
    return bool(a.kind == b.kind or ("[" not in a.kind and a.kind.split()[0] == b.kind.split()[0]))


def _differing(a: Mapping[str, object], b: Mapping[str, object]) -> tuple[str, ...]:
    return tuple(path for path in {**a, **b} if a.get(path) != b.get(path))


def _largest(a: BitsTrace, b: BitsTrace, position: int, output: int) -> bits.Largest | None:
    if position not in a.values or position not in b.values:
        return None
    x, y = a.values[position][output], b.values[position][output]
    return bits.largest_difference(x, y) if isinstance(x, Tensor) and isinstance(y, Tensor) else None
