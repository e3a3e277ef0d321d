"""Loader states as plain pytrees, and back: what a snapshot can hold without pickle.

Owns `pack` and `unpack`. Tuples, bytes, numpy values and dict keys that are not strings are written as tagged dicts, so
that nothing is lost. `adapters` and `hidden_state` call it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from purestep.errors import DataError, explain

_TAG = "__kind__"
# What `pack` writes: these types, and dicts (of string keys) and lists of them.
Packed = None | bool | int | float | str | Tensor | list["Packed"] | dict[str, "Packed"]


def pack(value: Any, path: str = "state") -> Packed:
    """Write a value with dicts (of string keys), lists, strings, numbers, booleans, None and tensors only.

    Args:
        value: anything made of Python's containers, plain values, tensors and numpy values of numbers.
        path: of the value, for messages.

    Raises:
        DataError: it contains a value of another type; the message names its path.

    Examples:
        >>> pack({"position": (1, 2)})
        {'position': {'__kind__': 'tuple', 'items': [1, 2]}}
        >>> unpack(pack({1: b"a", "x": (None, 2.5)}))
        {1: b'a', 'x': (None, 2.5)}
    """
    kind = type(value)
    if value is None or kind in (bool, int, float, str):
        return value
    if kind is Tensor:
        return value.detach().clone()  # the loader may write into its own tensor later
    if kind is list:
        return [pack(item, f"{path}[{i}]") for i, item in enumerate(value)]
    if isinstance(value, dict):
        if all(type(key) is str for key in value) and _TAG not in value:
            return {key: pack(item, f"{path}[{key!r}]") for key, item in value.items()}
        pairs: list[Packed] = [
            [pack(key, f"{path}[{key!r}]"), pack(item, f"{path}[{key!r}]")] for key, item in value.items()
        ]
        return {_TAG: "dict", "items": pairs}
    if kind is tuple:
        return {_TAG: "tuple", "items": [pack(item, f"{path}[{i}]") for i, item in enumerate(value)]}
    if kind in (bytes, bytearray):
        return {_TAG: kind.__name__, "text": bytes(value).decode("latin-1")}
    if isinstance(value, (np.ndarray, np.generic)) and value.dtype.kind in "biufc":
        array = np.ascontiguousarray(value)
        raw = torch.from_numpy(array.reshape(-1).view(np.uint8).copy())
        name = "ndarray" if isinstance(value, np.ndarray) else "scalar"
        return {_TAG: name, "dtype": array.dtype.str, "shape": list(np.shape(value)), "bytes": raw}
    raise DataError(
        explain(
            f"a loader's state holds a {kind.__module__}.{kind.__qualname__}, which a snapshot cannot hold",
            where=path,
            why="states are saved without pickle, so that loading one never runs code",
            instead="plain values, tensors and arrays in the state of the data set or loader",
        )
    )


def unpack(value: Any) -> Any:
    """Undo `pack`."""
    if isinstance(value, (list, tuple)):
        return [unpack(item) for item in value]
    if isinstance(value, torch.Tensor):
        return value.clone()  # the state may be loaded again, and the loader may write into this tensor
    if not isinstance(value, dict):
        return value
    kind = value.get(_TAG)
    if kind is None:
        return {key: unpack(item) for key, item in value.items()}
    if kind == "dict":
        return {unpack(key): unpack(item) for key, item in value["items"]}
    if kind == "tuple":
        return tuple(unpack(item) for item in value["items"])
    if kind in ("bytes", "bytearray"):
        raw = value["text"].encode("latin-1")
        return raw if kind == "bytes" else bytearray(raw)
    array = np.frombuffer(value["bytes"].numpy().tobytes(), np.dtype(value["dtype"])).reshape(value["shape"]).copy()
    return array if kind == "ndarray" else array[()]
