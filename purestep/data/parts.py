"""What a loader is made of, and what it can do: its sampler, its data set, its generators, and whose state it saves.

Owns the conventions of torch's and other loaders. It knows protocols, not packages, and changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

_NAMES = ("sampler", "batch_sampler", "dataset", "collate_fn")


def parts_of(loader: Any) -> list[Any]:
    """Return the loader, its sampler, batch sampler, that one's sampler, and the data set: each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    candidates = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
        getattr(loader, "dataset", None),
    )
    unique = {id(part): part for part in candidates if part is not None}
    return list(unique.values())


def named_parts(loader: Any) -> dict[str, Any]:
    """Return the loader and what may hide a state in it, by name."""
    named = {name: getattr(loader, name, None) for name in _NAMES}
    return {"loader": loader, **{name: part for name, part in named.items() if part is not None}}


def saved_by_loader(loader: Any) -> list[Any]:
    """Return the loader and the parts whose state is in its own, where it has one."""
    parts = parts_of(loader) if is_stateful(loader) else []
    return [loader] if keeps_state(loader) else [part for part in parts if is_stateful(part)]


def generators_of(loader: Any) -> list[torch.Generator]:
    """Return the generators of the loader and its parts that go by this name."""
    found = (getattr(part, "generator", None) for part in parts_of(loader))
    unique = {id(g): g for g in found if isinstance(g, torch.Generator)}
    return list(unique.values())


def base_seed(loader: Any, generator: torch.Generator, seed: int) -> int:
    """Return what a generator was seeded with by its owner, or `seed` where that was chance."""
    # Given no generator, torchdata's sampler makes one and seeds it from the global one; the seed of that is chance.
    chance = getattr(loader, "generator", None) is None and type(
        getattr(loader, "sampler", None)
    ).__module__.startswith("torchdata")
    return seed if chance else generator.initial_seed()


def is_stateful(loader: Any) -> bool:
    """Tell whether something has `state_dict` and `load_state_dict`."""
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


def keeps_state(iterator: Any) -> bool:
    """Tell whether an iterator has `get_state` and `set_state`."""
    return hasattr(iterator, "get_state") and hasattr(iterator, "set_state")


def keeps_workers(loader: Any) -> bool:
    """Tell whether the workers of a loader live from epoch to epoch."""
    return bool(getattr(loader, "persistent_workers", False) and getattr(loader, "num_workers", 0))


def takes_epoch(function: Callable[..., Any]) -> bool:
    """Tell whether a function has a parameter `epoch`."""
    try:
        return "epoch" in inspect.signature(function).parameters
    except ValueError:  # some built-in functions have no signature
        return False
