"""The structure of a stored tree: a pytree <-> JSON and a flat list of leaves.

It owns which nodes and leaves can be stored, and how Python values are written as text. It never reads a file, imports
a module by name, or runs code from a snapshot. `template` compares a structure with a user's tree.
"""

from __future__ import annotations

import base64
from collections import OrderedDict, defaultdict, deque
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from purestep import _torch, tree
from purestep.errors import TreeError, explain
from purestep.sharding import placement as placement_module
from purestep.snapshot.json_fields import JSON as JSON

PYTHON_KINDS = ("bool", "int", "float", "complex", "str", "bytes")
Stored = torch.Tensor | np.ndarray  # the value of a leaf that has bytes
DEPTH = 300  # levels of a tree: walking it takes two Python calls a level, of the 1000 that Python allows
_DECIMAL_BITS = 10_000  # Python refuses to write or read much longer integers in decimal
_QUANTIZED = (torch.qint8, torch.quint8, torch.qint32, torch.quint4x2, torch.quint2x4)


@dataclass(frozen=True)
class Leaf:
    """One leaf of a stored tree.

    Attributes:
        path: as `purestep.tree.paths` prints it.
        kind: "tensor", "array" (numpy), "scalar" (numpy), or the name of a Python type.
        dtype, shape: of tensors, arrays and numpy scalars.
        text: the value of a Python leaf.
        alias: index of the earlier leaf that is the same tensor or array (tied weights); None otherwise.
    """

    path: str
    kind: str
    dtype: str = ""
    shape: tuple[int, ...] = ()
    text: str | None = None
    alias: int | None = None

    @property
    def has_bytes(self) -> bool:
        return self.text is None and self.alias is None

    def __str__(self) -> str:
        if self.text is not None:
            return self.kind
        shape = f"[{', '.join(str(n) for n in self.shape)}]"
        return f"{self.dtype}{shape}" if self.kind == "tensor" else f"numpy {np.dtype(self.dtype).name}{shape}"

    def to_json(self) -> JSON:
        row: dict[str, JSON] = {"path": self.path, "kind": self.kind}
        if self.text is not None:
            return row | {"text": self.text}
        row |= {"dtype": self.dtype, "shape": list(self.shape)}
        return row if self.alias is None else row | {"alias": self.alias}


@dataclass(frozen=True)
class Encoded:
    """A flattened tree: `structure` refers to `leaves` by index; `values` are their tensors and arrays, or None."""

    structure: JSON
    leaves: list[Leaf]
    values: list[Stored | None]


def encode(value: object) -> Encoded:
    """Flatten a pytree into JSON and leaves. Nothing is copied.

    Raises:
        TreeError: a leaf or a node cannot be stored; the message names it.

    Examples:
        >>> encoded = encode({"w": torch.zeros(2), "n": (1, None)})
        >>> encoded.structure
        {'node': 'dict', 'keys': ['w', 'n'], 'items': [0, {'node': 'tuple', 'items': [1, None]}]}
        >>> print(*encoded.leaves, sep=", ")
        float32[2], int
    """
    encoder = _Encoder()
    return Encoded(encoder.node(value, "", 0), encoder.leaves, encoder.values)


class _Encoder:
    def __init__(self) -> None:
        self.leaves: list[Leaf] = []
        self.values: list[Stored | None] = []
        self.seen: dict[object, int] = {}

    def node(self, value: object, path: str, depth: int) -> JSON:
        if depth > DEPTH:
            raise TreeError(explain(f"a tree of more than {DEPTH} levels cannot be stored", where=show(path)[:200]))
        node = children(value, path)
        if node is None:
            return self.leaf(value, path)
        head, items = node
        return None if head is None else head | {"items": [self.node(item, where, depth + 1) for where, item in items]}

    def leaf(self, value: object, path: str) -> int:
        # Leaves that are the same memory are written once, and are one tensor again when they are restored.
        leaf, content = _describe(value, path)
        if content is not None:
            first = self.seen.setdefault(_identity(content), len(self.leaves))
            if first < len(self.leaves):
                leaf, content = Leaf(path, leaf.kind, leaf.dtype, leaf.shape, alias=first), None
        self.leaves.append(leaf)
        self.values.append(content)
        return len(self.leaves) - 1


# --- nodes ----------------------------------------------------------------------------------------------------------


def children(value: Any, path: str) -> tuple[dict[str, JSON] | None, list[tuple[str, Any]]] | None:
    """Return the JSON of a node, without its items, and its (path, child) pairs; None when the value is a leaf."""
    cls = type(value)
    if value is None:
        return None, []
    if cls in (dict, OrderedDict, defaultdict):
        keys = [_checked_key(key, path) for key in value]
        return {"node": cls.__name__, "keys": keys}, [(f"{path}[{key!r}]", value[key]) for key in keys]
    if cls in (list, tuple, deque):
        head = {"node": cls.__name__} | ({"maxlen": value.maxlen} if cls is deque else {})
        return head, [(f"{path}[{i}]", item) for i, item in enumerate(value)]
    if is_namedtuple(cls):
        fields = list(cls._fields)
        head = {"node": "namedtuple", "class": tree.stable_name(cls), "fields": fields}
        return head, [(f"{path}.{name}", item) for name, item in zip(fields, value, strict=True)]
    if (name := tree.node_name(cls)) is not None:
        data, fixed = tree.node_fields(cls)
        static = {field: _static(getattr(value, field)) for field in fixed}
        head = {"node": "pytree", "class": name, "fields": list(data), "static": static}
        return head, [(f"{path}.{field}", getattr(value, field)) for field in data]
    return None


def is_namedtuple(cls: type) -> bool:
    """Tell whether a class was made by `namedtuple` or `typing.NamedTuple`."""
    return issubclass(cls, tuple) and isinstance(getattr(cls, "_fields", None), tuple)


def _qualified(cls: type) -> str:
    return f"{cls.__module__}.{cls.__qualname__}"


def _checked_key(key: object, path: str) -> str | int:
    if isinstance(key, str) and type(key) is str:
        return key
    if isinstance(key, int) and type(key) is int:
        if key.bit_length() < _DECIMAL_BITS:
            return key
        what = f"a dict has an integer of {key.bit_length()} bits as a key, which JSON cannot hold"
        raise TreeError(explain(what, where=show(path), instead="use a str"))
    what = f"a dict has a key of type {type(key).__name__}, which a snapshot cannot store"
    raise TreeError(
        explain(what, where=f"{show(path)}[{key!r}]", why="keys are stored as JSON", instead="use str or int keys")
    )


def _static(value: Any) -> JSON:
    """Write a static field: JSON as it is, tuples tagged, the name of the class of anything else."""
    if type(value) is int and value.bit_length() >= _DECIMAL_BITS:
        return {"int": hex(value)}
    # Exact types: a subclass (an enum of str, say) would come back as its base.
    if value is None or type(value) in (bool, int, float, str):
        return value
    if type(value) is list:
        return [_static(v) for v in value]
    if type(value) is tuple:
        return {"tuple": [_static(v) for v in value]}
    if type(value) is dict and all(type(key) is str for key in value):
        return {"dict": {key: _static(v) for key, v in value.items()}}
    return {"opaque": tree.stable_name(type(value))}


# --- leaves ---------------------------------------------------------------------------------------------------------


def show(path: str) -> str:
    """Return a path as a message shows it."""
    return path.removeprefix(".") or "the root"


def kind_of(value: object) -> str | None:
    """Return the kind under which a leaf is stored, None when it cannot be."""
    if isinstance(value, torch.Tensor):
        return "tensor"
    if isinstance(value, np.ndarray):
        return "array"
    if isinstance(value, np.generic):
        return "scalar"
    return type(value).__name__ if type(value) in (bool, int, float, complex, str, bytes) else None


def dtype_name(dtype: torch.dtype) -> str:
    """Return the name of a torch dtype without its module."""
    return str(dtype).removeprefix("torch.")


def _describe(value: Any, path: str) -> tuple[Leaf, Stored | None]:
    kind = kind_of(value)
    if kind == "tensor":
        _check_tensor(value, path)
        return Leaf(path, kind, dtype_name(value.dtype), tuple(value.shape)), value
    if kind in ("array", "scalar"):
        if value.dtype.kind not in "biufc":
            what = f"a numpy {'array' if kind == 'array' else 'scalar'} of dtype {value.dtype} cannot be stored"
            why = "only booleans, integers, floats and complex numbers have bytes that mean the same everywhere"
            raise TreeError(explain(what, where=show(path), why=why))
        array = value if kind == "array" else np.asarray(value)
        return Leaf(path, kind, value.dtype.str, value.shape), array
    if kind is not None:
        return Leaf(path, kind, text=_to_text(value)), None
    raise TreeError(
        explain(
            f"a leaf of type {_qualified(type(value))} cannot be stored",
            where=f"{show(path)} = {str(value)[:80]}",
            why="a snapshot holds tensors, numpy arrays, numbers, strings and bytes; it never pickles",
            instead="make it a static() field of its @ps.pytree class, or decorate its own class with @ps.pytree",
        )
    )


def _check_tensor(value: torch.Tensor, path: str) -> None:
    reason = instead = None
    split: Any = value
    if placement_module.is_split(value):
        if any(placement.is_partial() for placement in _torch.layout_of(split).placements):
            reason, instead = "a tensor whose sum is still outstanding cannot be stored", "x.redistribute(...) first"
        value = _torch.local_tensor(split)
    if reason:
        pass
    elif type(value) not in (torch.Tensor, torch.nn.Parameter, torch.nn.Buffer):
        reason = f"a tensor of class {_qualified(type(value))} cannot be stored"
        instead = "store the plain tensors it consists of"
    elif value.layout is not torch.strided:
        reason, instead = f"a tensor of layout {value.layout} cannot be stored", "x.to_dense()"
    elif value.dtype in _QUANTIZED:
        reason, instead = f"a tensor of dtype {value.dtype} cannot be stored", "store x.int_repr() and the scales"
    elif value.device.type == "meta":
        reason, instead = "a tensor on the meta device has no bytes to store", "initialize it first"
    if reason:
        raise TreeError(explain(reason, where=f"{show(path)}: {tree.describe(split)}", instead=instead))


def _identity(value: Any) -> tuple[Any, ...]:
    """Return a key that two leaves have in common if they are the same view of the same memory."""
    if isinstance(value, torch.Tensor):
        if value.numel() == 0:
            return ("tensor", id(value))
        if placement_module.is_split(value):
            part: Any = value
            here, layout = _torch.local_tensor(part), _torch.layout_of(part)
            same = _identity(here) if here.numel() else id(value)
            return ("split", same, value.shape, str(layout.placements), layout.mesh)
        flags = (value.is_conj(), value.is_neg())
        return ("tensor", value.data_ptr(), value.device, value.dtype, value.shape, value.stride(), flags)
    if value.size == 0 or value.ndim == 0:
        return ("array", id(value))
    return ("array", value.__array_interface__["data"][0], value.dtype.str, value.shape, value.strides)


def _to_text(value: Any) -> str:
    if isinstance(value, float):
        return value.hex()  # exact, and infinities and NaN have a text, which JSON lacks
    if isinstance(value, complex):
        return f"{value.real.hex()} {value.imag.hex()}"
    if isinstance(value, bytes):
        return base64.b64encode(value).decode("ascii")
    if isinstance(value, int) and not isinstance(value, bool):
        return hex(value)  # decimal text of more than 4300 digits is refused by Python itself
    return str(value)


def from_text(kind: str, text: str) -> Any:
    """Return the Python leaf that was written as text.

    Examples:
        >>> from_text("float", (0.1).hex()), from_text("int", hex(-5)), from_text("bool", "False")
        (0.1, -5, False)
    """
    if kind == "complex":
        real, imag = text.split(" ")
        return complex(float.fromhex(real), float.fromhex(imag))
    if kind == "bool":
        return {"True": True, "False": False}[text]
    readers: dict[str, Callable[[str], Any]] = {
        "int": lambda digits: int(digits, 16),
        "float": float.fromhex,
        "str": str,
        "bytes": lambda letters: base64.b64decode(letters, validate=True),
    }
    return readers[kind](text)
