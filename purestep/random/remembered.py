"""Values of small integer tensors on a card that the host knows: keys and step numbers, by which it can fold.

Reading a tensor makes the host wait for the card, so what the host itself has written or added up is remembered beside
the tensor. Whatever writes into the tensor ends that, because torch counts writes.
"""

from __future__ import annotations

import weakref
from typing import Any

from torch import Tensor

from purestep import _torch

_values: dict[int, tuple[weakref.ref[Tensor], int | None, Any]] = {}


def remember(tensor: Tensor, value: Any) -> None:
    """Remember what a tensor holds, as `tolist` would say it; of a CPU tensor nothing need be."""
    if not tensor.is_cpu and (writes := _writes(tensor)) is not None:
        at = id(tensor)
        _values[at] = (weakref.ref(tensor, lambda gone: _forget(at, gone)), writes, value)


def known(tensor: Tensor) -> Any:
    """Return what a tensor holds, as `tolist` says it; None where the host would have to wait to learn it."""
    if tensor.is_cpu:
        return None if _torch.is_fake(tensor) else tensor.tolist()
    found = _values.get(id(tensor))
    if found is None or found[0]() is not tensor or found[1] != _writes(tensor):
        return None
    return found[2]


def read(tensor: Tensor) -> Any:
    """Return what a tensor holds, as `tolist` says it, and remember it."""
    value = known(tensor)
    if value is None:
        value = tensor.tolist()
        remember(tensor, value)
    return value


def follow(old: Tensor, new: Tensor, added: int) -> None:
    """Remember of `new` that it is `old` and so much more, where `old` is known."""
    if not new.is_cpu and (value := known(old)) is not None:
        remember(new, value + added)


def _writes(tensor: Tensor) -> int | None:
    return 0 if _torch.is_fake(tensor) else _torch.writes(tensor)


def _forget(at: int, gone: weakref.ref[Tensor]) -> None:
    if at in _values and _values[at][0] is gone:
        del _values[at]
