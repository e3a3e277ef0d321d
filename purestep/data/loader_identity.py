"""The identity of a third-party loader, by the conventions of torch's DataLoader, which others follow.

Owns the description that a run records of such a loader. It reads attributes, and never a batch.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterable, Sized
from typing import Any

# Attributes of torch's DataLoader. Other loaders have some of them, so each is read by its name.
_SETTINGS = ("batch_size", "drop_last", "collate_fn", "shuffle")
_COMPONENTS = ("sampler", "batch_sampler", "dataset")


def identity(loader: object, seed: int) -> dict[str, Any]:
    """Return what decides which batches a loader gives, as far as its attributes show.

    Workers and prefetching do not decide it; neither does the seed of its generator, which a resumed run restores.

    Args:
        loader: a DataLoader, an iterable, or a function that returns one.
        seed: of the global generators while it works.

    Examples:
        >>> from torch.utils.data import DataLoader
        >>> description = identity(DataLoader([1, 2, 3], 2), seed=0)
        >>> description["batch_size"], description["samples"], description["sampler"].__name__
        (2, 3, 'SequentialSampler')
    """
    if isinstance(loader, type) or not (isinstance(loader, Iterable) or hasattr(loader, "__getitem__")):
        return {"class": "function", "function": loader, "seed": seed}
    description: dict[str, Any] = {"class": type(loader), "length": _length(loader), "seed": seed}
    description |= {name: value for name in _SETTINGS if (value := _attribute(loader, name)) is not None}
    for name in _COMPONENTS:
        if (component := _attribute(loader, name)) is not None:
            description[name] = type(component)
    if "dataset" in description:
        description["samples"] = _length(_attribute(loader, "dataset"))
    if "batch_size" not in description:
        description["batch_size"] = _attribute(_attribute(loader, "batch_sampler"), "batch_size")
    return description


def _attribute(owner: object, name: str) -> object:
    with contextlib.suppress(Exception):  # a property of the loader's class may raise
        return getattr(owner, name, None)
    return None


def _length(owner: object) -> int | None:
    with contextlib.suppress(Exception):
        return len(owner) if isinstance(owner, Sized) else None
    return None
