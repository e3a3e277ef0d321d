"""What a loader that is not ours tells of itself: the conventions of torch's DataLoader, which others follow.

Owns the description that a run records of such a loader. It reads attributes, and never a batch.
"""

from __future__ import annotations

import contextlib
from typing import Any

_SETTINGS = ("batch_size", "drop_last", "collate_fn", "shuffle")
_PARTS = ("sampler", "batch_sampler", "dataset")


def identity(loader: Any, seed: int) -> Any:
    """Return what decides which batches a loader gives, as far as it tells.

    Workers and prefetching are not among it, nor the seed of its own generator: a resumed run restores that one.

    Args:
        loader: a DataLoader, an iterable, or a function that returns one.
        seed: of the global generators while it works.

    Example:
        >>> from torch.utils.data import DataLoader
        >>> found = identity(DataLoader([1, 2, 3], 2), seed=0)
        >>> found["batch_size"], found["samples"], found["sampler"].__name__
        (2, 3, 'SequentialSampler')
    """
    if isinstance(loader, type) or not (hasattr(loader, "__iter__") or hasattr(loader, "__getitem__")):
        return {"class": "function", "function": loader, "seed": seed}
    found: dict[str, Any] = {"class": type(loader), "length": _length(loader), "seed": seed}
    found |= {name: value for name in _SETTINGS if (value := _attribute(loader, name)) is not None}
    for name in _PARTS:
        if (part := _attribute(loader, name)) is not None:
            found[name] = type(part)
    if "dataset" in found:
        found["samples"] = _length(loader.dataset)
    if "batch_size" not in found:
        found["batch_size"] = _attribute(_attribute(loader, "batch_sampler"), "batch_size")
    return found


def _attribute(owner: Any, name: str) -> Any:
    with contextlib.suppress(Exception):  # a property of the loader's class may raise
        return getattr(owner, name, None)
    return None


def _length(owner: Any) -> int | None:
    with contextlib.suppress(Exception):
        return len(owner)
    return None
