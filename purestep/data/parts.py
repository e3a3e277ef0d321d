"""What a loader is made of, and what it can do: its sampler, its data set, its generators, and whose state it saves.

Owns the conventions of torch's and other loaders. It knows protocols, not packages, and changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import torch

from purestep.errors import DataError, explain

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


def called(function: Callable[..., Any], epoch: int) -> Any:
    """Return what a function gives for an epoch; it gets the number where it has a parameter `epoch`, or needs a value.

    Raises:
        DataError: what it returns cannot be iterated.
    """
    args, kwargs = _epoch_of(function, epoch)
    made = function(*args, **kwargs)
    if not hasattr(made, "__iter__") and not hasattr(made, "__getitem__"):
        raise DataError(
            explain(
                "the function that stands for the data returned nothing to iterate",
                where=f"data: {function!r:.80} returned {type(made).__name__}",
                why="it is called for each epoch, and returns an iterator of batches",
                instead="lambda epoch: iter(batches)",
            )
        )
    return made


def _epoch_of(function: Callable[..., Any], epoch: int) -> tuple[tuple[int, ...], dict[str, int]]:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some built-in functions have no signature
        return (), {}
    if "epoch" in parameters:
        return (), {"epoch": epoch}
    needed = [
        p
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return ((epoch,) if len(needed) == 1 else ()), {}
