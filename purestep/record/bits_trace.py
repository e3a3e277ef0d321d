"""`BitsTrace`: the digests of every operation of one step, as a value and as a small file.

Owns the file: a line of JSON for the conditions it was made under, one for each operation, and one that ends it.
Nothing in it is executed, so it may come from anywhere. `trace_bits` makes traces, `compare_bits` compares them.
"""

from __future__ import annotations

import collections
import dataclasses
import gzip
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purestep import bits
from purestep.errors import ConfigError, explain

FORMAT, VERSION = "purestep bits trace", 1
_LARGE = 1 << 16  # bytes from which on a file is compressed
_GZIP = b"\x1f\x8b"
_Reading = (OSError, EOFError, ValueError, TypeError, KeyError, IndexError, AttributeError, RecursionError)


@dataclasses.dataclass(frozen=True)
class Bits:
    """What a value is and what is in it.

    Attributes:
        kind: dtype and shape of a tensor, `float32[8, 3]`; the type and value of a number.
        digest: 16 hex digits of the sha256 over the kind and the bytes in logical order; "" where there are no bytes to
            compare: memory that no operation has filled, tensors without memory.
    """

    kind: str
    digest: str


@dataclasses.dataclass(frozen=True)
class Operation:
    """One operation of torch in a step. Views are none: they compute nothing.

    Attributes:
        name: the operator, `aten.convolution_backward`, with its overload unless that is the default.
        phase: "forward", "backward", "update" (all that comes after a backward pass, so the sum over microbatches,
            too), or "graph" in a step of `ps.jit`, whose graph holds all three.
        module: path of the module it is in, `body.3`; in the backward pass that of the operation whose gradient it
            computes. "" outside of modules.
        place: file, line and function: the innermost ones that belong neither to torch nor to purestep; where there is
            none, those of purestep.
        code: the text of that line.
        inputs: tensors that it reads, in order.
        arguments: everything else that it is given, as text.
        outputs: what it returns, and then what it wrote in place.
    """

    name: str
    phase: str
    module: str
    place: str
    code: str
    inputs: tuple[Bits, ...]
    arguments: str
    outputs: tuple[Bits, ...]

    def __str__(self) -> str:
        return f"{self.name} in {self.module}" if self.module else f"{self.name} ({self.phase}, outside of modules)"


@dataclasses.dataclass(frozen=True)
class BitsTrace:
    """The digests of every operation of one step. Made by `ps.trace_bits`, or read from a file.

    Attributes:
        conditions: what the bits depend on besides the program: torch, processor, threads, bits mode, devices.
        given: leaves of the state and the batch by path.
        operations: in the order in which they ran.
        result: tensor leaves of what the step returned, by path.
        values: by position of an operation its outputs, for the operations that `values=` chose.
        returned: what the step returned; None when the trace was read from a file.
    """

    conditions: Mapping[str, Any]
    given: Mapping[str, Bits]
    operations: tuple[Operation, ...]
    result: Mapping[str, Bits]
    values: Mapping[int, tuple[Any, ...]] = dataclasses.field(default_factory=dict, compare=False, repr=False)
    returned: Any = dataclasses.field(default=None, compare=False, repr=False)

    def __repr__(self) -> str:
        phases = collections.Counter(operation.phase for operation in self.operations)
        counts = ", ".join(f"{count} {phase}" for phase, count in phases.items())
        under = ", ".join(f"{name} {value}" for name, value in self.conditions.items() if value)
        return f"BitsTrace({len(self.operations)} operations: {counts}; {under})"

    def save(self, file: str | os.PathLike[str]) -> None:
        """Write it, the chosen values included; compressed by gzip unless it is small."""
        content = "\n".join(json.dumps(line, separators=(",", ":")) for line in self._lines()).encode() + b"\n"
        # Without a time in it, equal traces are equal files.
        Path(file).write_bytes(gzip.compress(content, mtime=0) if len(content) > _LARGE else content)

    def _lines(self) -> list[Any]:
        head = {"format": FORMAT, "version": VERSION, "conditions": dict(self.conditions)}
        head |= {name: {path: [*_pair(b)] for path, b in getattr(self, name).items()} for name in ("given", "result")}
        return [head, *map(self._line, range(len(self.operations))), {"operations": len(self.operations)}]

    def _line(self, position: int) -> dict[str, Any]:
        operation = self.operations[position]
        line: dict[str, Any] = {field.name: getattr(operation, field.name) for field in dataclasses.fields(Operation)}
        line["inputs"], line["outputs"] = ([_pair(b) for b in line[name]] for name in ("inputs", "outputs"))
        if position in self.values:
            line["values"] = [_plain(value) for value in self.values[position]]
        return line

    @classmethod
    def load(cls, file: str | os.PathLike[str]) -> BitsTrace:
        """Read one.

        Raises:
            ConfigError: it is no such file, was cut off, or is of a later version.
        """
        try:
            content = Path(file).read_bytes()
            if content.startswith(_GZIP):
                content = gzip.decompress(content)
            head, *lines, end = [json.loads(line) for line in content.splitlines()]
            if head["format"] != FORMAT or (head["version"] == VERSION and end != {"operations": len(lines)}):
                raise ValueError("its last line does not count its operations: it was cut off")
            if head["version"] == VERSION:
                return _read(head, lines)
        except _Reading as error:
            raise ConfigError(
                explain(
                    "this is no whole trace of bits",
                    where=str(file),
                    why=f"{type(error).__name__}: {str(error)[:200]}",
                    instead='ps.trace_bits(step, state, batch, "a.bits")',
                )
            ) from error
        raise ConfigError(
            explain(
                "this trace of bits was written by another version of purestep",
                where=f"{file}: version {head['version']!r:.20}, this one reads {VERSION}",
                instead="trace both steps with one version of purestep",
            )
        )


def _read(head: Mapping[str, Any], lines: list[Any]) -> BitsTrace:
    operations, values = [], {}
    for position, line in enumerate(lines):
        kept = line.pop("values", None)
        if kept is not None:
            values[position] = tuple(map(_made, kept))
        line |= {name: tuple(Bits(*pair) for pair in line[name]) for name in ("inputs", "outputs")}
        operations.append(Operation(**line))
    given, result = ({path: Bits(*pair) for path, pair in head[name].items()} for name in ("given", "result"))
    return BitsTrace(head["conditions"], given, tuple(operations), result, values)


def _pair(content: Bits) -> tuple[str, str]:
    return content.kind, content.digest


def _plain(value: object) -> Any:
    """Return a value as JSON: dtype, shape and bytes of a tensor."""
    if not isinstance(value, Tensor):
        return repr(value)
    return [str(value.dtype).removeprefix("torch."), list(value.shape), bits.tensor_bytes(value).tobytes().hex()]


def _made(plain: Any) -> Any:
    if isinstance(plain, str):
        return plain
    name, shape, content = plain
    dtype = getattr(torch, name)
    if not isinstance(dtype, torch.dtype):
        raise TypeError(f"{name} is no dtype")
    raw = bytearray.fromhex(content)
    flat = torch.frombuffer(raw, dtype=dtype) if raw else torch.empty(0, dtype=dtype)  # it refuses an empty buffer
    return flat.reshape(shape)
