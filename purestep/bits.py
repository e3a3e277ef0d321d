"""Bits of a leaf: what it is called, its bytes, and how far two leaves are apart.

Owns `describe`, the digest over named leaves and `Difference`. It knows tensors, numpy arrays and Python scalars, and
never looks at the structure of a tree: `tree.digest` and `tree.diff` do that and call it.
"""

from __future__ import annotations

import dataclasses
import hashlib
import math
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from typing import Any, Protocol

import numpy as np
import torch

from purestep._cpus import available_cpus
from purestep.errors import TreeError, explain
from purestep.portable import mode as mode
from purestep.portable import portable as portable
from purestep.portable import portable_here as portable_here
from purestep.views import Block, Note, Printed, Table, shortened

BLOCK = 1 << 20  # bytes; longer leaves are hashed by blocks of this size, which threads and ranks can share
_HASH_THREADS = 4
_DECIMAL_BITS = 10_000  # Python refuses to write much longer integers in decimal
_INTEGER = {1: torch.int8, 2: torch.int16, 4: torch.int32, 8: torch.int64}


def describe(leaf: object) -> str:
    """Return `dtype[shape]` of a tensor or array, and the type and value of anything else.

    Examples:
        >>> describe(torch.zeros(2, 3)), describe(7)
        ('float32[2, 3]', 'int 7')
    """
    if isinstance(leaf, torch.Tensor):
        return f"{str(leaf.dtype).removeprefix('torch.')}[{', '.join(str(n) for n in leaf.shape)}]"
    if isinstance(leaf, (np.ndarray, np.generic)):
        return f"{leaf.dtype.name}[{', '.join(str(n) for n in leaf.shape)}]"
    return f"{type(leaf).__name__} {_integer_text(leaf) if type(leaf) is int else repr(leaf)}"


def _integer_text(value: int) -> str:
    return repr(value) if value.bit_length() < _DECIMAL_BITS else hex(value)


def human_bytes(count: float) -> str:
    """Return a number of bytes as people read it.

    Examples:
        >>> human_bytes(999), human_bytes(1536), human_bytes(3 * 2**30)
        ('999 B', '1.5 KiB', '3.0 GiB')
    """
    if count < 1024:
        return f"{count:.0f} B"
    value, units = float(count), iter(("KiB", "MiB", "GiB", "TiB", "PiB"))
    unit = ""
    while value >= 1024 and (following := next(units, None)):
        value, unit = value / 1024, following
    return f"{value:.1f} {unit}"


class Gatherer(Protocol):
    """Returns the full tensor of a split one (a DTensor), on every process of its mesh; each of them calls it."""

    def __call__(self, split: torch.Tensor, /) -> torch.Tensor: ...


def gather_split_with(gatherer: Gatherer) -> None:
    """Register what `whole` gathers split tensors with, for whoever makes such tensors.

    Digests stand on the ground floor and know no meshes, so the room that splits tensors says how they come together,
    like a node that registers how it is flattened. Before that there are none but a caller's own DTensors, which
    `whole` gathers the way torch does.

    Raises:
        TreeError: another gatherer is registered already: digests would depend on which came first.
    """
    global _gatherer
    if _gatherer not in (None, gatherer):
        raise TreeError(explain("split tensors have one gatherer", where=f"{_gatherer!r}, and now {gatherer!r}"))
    _gatherer = gatherer


_gatherer: Gatherer | None = None


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """Return a tensor, gathered if it is split over processes (a DTensor): then each of them calls this."""
    if type(tensor) is torch.Tensor or not hasattr(tensor, "full_tensor"):
        return tensor
    return tensor.full_tensor() if _gatherer is None else _gatherer(tensor)


def tensor_bytes(tensor: torch.Tensor) -> np.ndarray:
    """Return the elements of a tensor as a flat uint8 array on the host, in logical (row-major) order.

    It is a view where the memory allows. Conjugate and negative bits are resolved, strides do not show.
    """
    host = whole(tensor).detach().resolve_conj().resolve_neg().cpu().contiguous()
    return host.reshape(-1).view(torch.uint8).numpy()


def _is_numeric(dtype: np.dtype[Any]) -> bool:
    # Kind "V" holds both records and the small floats that other packages register (ml_dtypes' bfloat16, float8).
    return dtype.kind in "biufc" or (dtype.kind == "V" and dtype.isbuiltin == 2)


def leaf_bytes(path: str, leaf: object) -> tuple[str, Any]:
    """Return what a leaf is, and its content as bytes or as a flat uint8 array (little endian).

    Raises:
        TreeError: the leaf is not a tensor, numpy array, number, string or bytes; the message names the path.
    """
    if isinstance(leaf, torch.Tensor):
        return describe(leaf), tensor_bytes(leaf)
    if isinstance(leaf, (np.ndarray, np.generic)) and _is_numeric(leaf.dtype):
        return describe(leaf), _little_endian(leaf).reshape(-1).view(np.uint8)
    if isinstance(leaf, bytes):
        return "bytes", leaf
    if isinstance(leaf, float):
        return "float", leaf.hex().encode()
    if type(leaf) is int:
        return "int", _integer_text(leaf).encode()
    if isinstance(leaf, (bool, int, complex, str)):
        return type(leaf).__name__, repr(leaf).encode()
    raise TreeError(
        explain(
            f"a leaf of type {type(leaf).__module__}.{type(leaf).__qualname__} has no bytes to digest or compare",
            where=path or "the root",
            why="leaves are tensors, numpy arrays, numbers, strings and bytes",
            instead="decorate your own classes with @ps.pytree, so that their fields are the leaves",
        )
    )


def _little_endian(array: np.ndarray | np.generic) -> np.ndarray:
    swapped = array.dtype.newbyteorder("<") if array.dtype.byteorder == ">" else None
    return np.ascontiguousarray(array, dtype=swapped)


def digest_leaves(pairs: Iterable[tuple[str, object]]) -> str:
    """Return the sha256, in hex, of paths and leaves, in any order: the `tree.digest` of the tree that has them."""
    return digest_rows((path, *digest_row(path, leaf)) for path, leaf in sorted(pairs, key=lambda pair: pair[0]))


def digest_row(path: str, leaf: object) -> tuple[str, int, bytes]:
    """Return what the digest is made of for one leaf: its kind, its bytes' number, and the bytes, condensed."""
    kind, content = leaf_bytes(path, leaf)
    return kind, len(content), condense(content)


def digest_rows(rows: Iterable[tuple[str, str, int, bytes]]) -> str:
    """Return the digest of a tree from (path, kind, number of bytes, condensed bytes) of its leaves, in any order."""
    total = hashlib.sha256()
    for path, kind, count, content in sorted(rows, key=lambda row: row[0]):
        header = f"{path}\0{kind}\0{count}\0".encode()
        total.update(len(header).to_bytes(8, "little") + header)
        total.update(content)
    return total.hexdigest()


def condense(content: bytes | np.ndarray) -> bytes:
    """Return up to `BLOCK` bytes as they are, and the sha256 over the sha256 of each block of more than that."""
    if len(content) <= BLOCK:
        return bytes(content)
    view = np.frombuffer(content, np.uint8)
    blocks = [view[start : start + BLOCK] for start in range(0, len(content), BLOCK)]
    with ThreadPoolExecutor(min(_HASH_THREADS, available_cpus())) as pool:  # hashing releases the GIL
        digests = pool.map(lambda block: hashlib.sha256(block).digest(), blocks)
        return hashlib.sha256(b"".join(digests)).digest()


@dataclasses.dataclass(frozen=True)
class Difference:
    """One path at which two trees differ.

    Attributes:
        path: printed path of the leaf.
        left, right: `describe` of the two leaves, or "missing".
        max_abs: largest absolute difference of the elements that differ; None where it has no meaning, NaN when one of
            them is NaN.
        max_ulp: largest distance in units in the last place over the elements that are numbers on both sides; None for
            anything but floating point of one dtype.
        elements: number of elements that differ in their bytes, None where shapes differ.
        max_rel: largest difference of an element from its counterpart, relative to the larger magnitude of the two, so
            at most 2; None and NaN as for `max_abs`.
    """

    path: str
    left: str
    right: str
    max_abs: float | None = None
    max_ulp: int | None = None
    elements: int | None = None
    max_rel: float | None = None

    @property
    def leaf(self) -> str:
        """What the leaf is; on both sides, where that differs."""
        return self.left if self.left == self.right else f"{self.left} != {self.right}"

    def __str__(self) -> str:
        parts = [f"{self.path or 'the root'}: {self.leaf}"]
        if self.elements is not None:
            parts.append(f"{self.elements} differ")
        if self.max_abs is not None:
            parts.append(f"max abs {self.max_abs:.3g}")
        if self.max_ulp is not None:
            parts.append(f"{self.max_ulp} ulp")
        return ", ".join(parts)


_MOST_ROWS = 200  # of a table of differences
_LEAF = 60  # characters of a leaf in it


class Differences(Printed, tuple[Difference, ...]):
    """The result of `diff`: a tuple that shows itself as a table. Empty (and false) when the trees are equal.

    The columns: path; what the leaf is, on both sides where they differ in that; how many of its elements differ; the
    largest absolute and relative difference, and the largest distance in units in the last place.

    Examples:
        >>> a = Difference("a", "float32[2]", "float32[2]", 0.5, 4194304, 1, 0.5)
        >>> Differences([a, Difference("b", "int 1", "missing")])
        path  leaf              differ  max abs  max rel    max ulp
        a     float32[2]             1      0.5      0.5  4,194,304
        b     int 1 != missing
    """

    def view(self) -> list[Block]:
        if not self:
            return [Note("equal")]
        columns: dict[str, list[Any]] = {
            "path": [d.path or "the root" for d in self[:_MOST_ROWS]],
            "leaf": [shortened(d.leaf, _LEAF) for d in self[:_MOST_ROWS]],
            "differ": [d.elements for d in self[:_MOST_ROWS]],
            "max abs": [d.max_abs for d in self[:_MOST_ROWS]],
            "max rel": [d.max_rel for d in self[:_MOST_ROWS]],
            "max ulp": [d.max_ulp for d in self[:_MOST_ROWS]],
        }
        kept = {name: values for name, values in columns.items() if any(value is not None for value in values)}
        table: Block = Table(list(kept), list(zip(*kept.values(), strict=True)), wide=True)
        more = len(self) - _MOST_ROWS
        return [table, Note(f"... and {more:,} more")] if more > 0 else [table]


def diff_leaves(left: Mapping[str, object], right: Mapping[str, object]) -> Differences:
    """Return the differences between leaves by path, in the order of the left ones."""
    found = []
    for path in list(left) + [p for p in right if p not in left]:
        if path not in right:
            found.append(Difference(path, describe(left[path]), "missing"))
        elif path not in left:
            found.append(Difference(path, "missing", describe(right[path])))
        elif (difference := _difference(path, left[path], right[path])) is not None:
            found.append(difference)
    return Differences(found)


def _difference(path: str, a: Any, b: Any) -> Difference | None:
    if a is b:
        return None
    (kind_a, bytes_a), (kind_b, bytes_b) = leaf_bytes(path, a), leaf_bytes(path, b)
    if kind_a != kind_b:
        return Difference(path, describe(a), describe(b))
    if isinstance(bytes_a, bytes):
        if bytes_a == bytes_b:
            return None
        distance = _scalar_distance(a, b)
        return Difference(path, describe(a), describe(b), distance, max_rel=_scalar_relative(a, b, distance))
    if np.array_equal(bytes_a, bytes_b):
        return None
    width = a.element_size() if isinstance(a, torch.Tensor) else a.dtype.itemsize
    unequal = (bytes_a.reshape(-1, width) != bytes_b.reshape(-1, width)).any(axis=1)
    left, right = (_elements(x)[torch.from_numpy(unequal)] for x in (a, b))
    return Difference(
        path,
        describe(a),
        describe(b),
        _max_abs(left, right),
        _max_ulp(left, right),
        int(unequal.sum()),
        _max_rel(left, right),
    )


def _elements(leaf: torch.Tensor | np.ndarray | np.generic) -> torch.Tensor:
    """Return the elements as a flat tensor on the host; numpy and torch name the small floats alike."""
    if isinstance(leaf, torch.Tensor):
        return whole(leaf).detach().resolve_conj().resolve_neg().cpu().reshape(-1)
    dtype = getattr(torch, leaf.dtype.name)
    return torch.from_numpy(_little_endian(leaf).reshape(-1).view(np.uint8).copy()).view(dtype)


def _scalar_distance(a: Any, b: Any) -> float | None:
    if isinstance(a, bool) or not isinstance(a, (int, float, complex)):
        return None
    try:
        return float(abs(a - b))
    except OverflowError:  # an integer that no float is as large as
        return math.inf


def _max_abs(a: torch.Tensor, b: torch.Tensor) -> float:
    if a.is_complex() or a.is_floating_point():
        wide = torch.complex128 if a.is_complex() else torch.float64
        return float((a.to(wide) - b.to(wide)).abs().max())
    # Python integers: float64 cannot tell large neighbours apart, and int64 overflows.
    return float(max(abs(int(x) - int(y)) for x, y in zip(a.tolist(), b.tolist(), strict=True)))


def _max_rel(a: torch.Tensor, b: torch.Tensor) -> float:
    """The largest difference relative to the larger magnitude; 0 for -0.0 and 0.0, infinite where one side is."""
    wide = torch.complex128 if a.is_complex() else torch.float64
    x, y = a.to(wide), b.to(wide)
    apart, larger = (x - y).abs(), torch.maximum(x.abs(), y.abs())
    return float(torch.where(larger == 0, 0.0, torch.where(apart.isinf(), apart, apart / larger)).max())


def _scalar_relative(a: Any, b: Any, apart: float | None) -> float | None:
    if apart is None or (math.isinf(apart) and not isinstance(a, int)):
        return apart
    return float(abs(a - b) / max(abs(a), abs(b))) if a or b else 0.0  # of integers exact, whatever their size


def _max_ulp(a: torch.Tensor, b: torch.Tensor) -> int | None:
    if not a.is_floating_point():
        return None
    numbers = ~(torch.isnan(a.to(torch.float64)) | torch.isnan(b.to(torch.float64)))
    left, right = _ordered(a)[numbers.numpy()], _ordered(b)[numbers.numpy()]
    return int((np.maximum(left, right) - np.minimum(left, right)).max()) if left.size else None


@dataclasses.dataclass(frozen=True)
class Largest:
    """The element of two tensors that is furthest apart.

    Attributes:
        index: where it is; of a complex number the last one is 0 for the real part and 1 for the imaginary one.
        a, b: both values.
        ulp: the distance in units in the last place; None where it has no meaning, as between NaN and a number.
    """

    index: tuple[int, ...]
    a: float | int | bool
    b: float | int | bool
    ulp: int | None


def largest_difference(a: torch.Tensor, b: torch.Tensor) -> Largest | None:
    """Return the element of two tensors of one dtype and shape that is furthest apart; None where the bits are equal.

    Elements of which one is NaN come first, then the distance in units in the last place, or of integers as such.

    Examples:
        >>> a = torch.tensor([1.0, 2.0])
        >>> largest_difference(a, torch.nextafter(a, a.new_tensor([1.0, 3.0])))
        Largest(index=(1,), a=2.0, b=2.000000238418579, ulp=1)
    """
    left, right = ((torch.view_as_real(x.resolve_conj()) if x.is_complex() else x) for x in (a, b))
    (flat_a, flat_b), width = (_elements(left), _elements(right)), left.element_size()
    unequal = (tensor_bytes(flat_a).reshape(-1, width) != tensor_bytes(flat_b).reshape(-1, width)).any(axis=1)
    places = np.flatnonzero(unequal)
    if not places.size:
        return None
    x, y = flat_a[torch.from_numpy(places)], flat_b[torch.from_numpy(places)]
    if not x.is_floating_point():
        apart = [abs(int(p) - int(q)) for p, q in zip(x.tolist(), y.tolist(), strict=True)]
        chosen, ulp = max(range(len(apart)), key=apart.__getitem__), None
    else:
        p, q = _ordered(x), _ordered(y)
        distance = np.maximum(p, q) - np.minimum(p, q)
        strange = (torch.isnan(x.to(torch.float64)) | torch.isnan(y.to(torch.float64))).numpy()
        chosen = int(strange.argmax()) if strange.any() else int(distance.argmax())
        ulp = None if strange.any() else int(distance[chosen])
    index = tuple(int(i) for i in np.unravel_index(places[chosen], tuple(left.shape)))
    return Largest(index, x[chosen].item(), y[chosen].item(), ulp)


def _ordered(values: torch.Tensor) -> np.ndarray:
    """Map floats to unsigned integers that grow with the float, neighbours one apart, and -0.0 and 0.0 the same."""
    bits = values.contiguous().view(_INTEGER[values.element_size()])
    signed = bits.to(torch.int64)
    if values.dtype == torch.float8_e8m0fnu:  # has no sign bit
        return (signed & 0xFF).numpy().astype(np.uint64)
    lowest = torch.iinfo(bits.dtype).min
    return torch.where(signed < 0, lowest - signed, signed).numpy().astype(np.uint64) ^ np.uint64(1 << 63)
