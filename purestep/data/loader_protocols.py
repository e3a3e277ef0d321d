"""The components of a third-party loader and their protocols: sampler, data set, generators, and who saves its state.

Owns the conventions of torch's and other loaders. It knows protocols, not packages, and changes nothing.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable
from typing import Any, Protocol, TypeGuard

import torch

from purestep.errors import DataError, explain

# What torch's DataLoader calls its components; other loaders have some of these attributes, and no common base class.
_NAMES = ("sampler", "batch_sampler", "dataset", "collate_fn")


class Stateful(Protocol):
    """A loader, a sampler or a data set that saves its own state, as those of torchdata."""

    def state_dict(self) -> Any: ...

    def load_state_dict(self, state_dict: Any, /) -> object: ...


class StatefulIterator(Protocol):
    """An iterator that saves its own state, as those of grain."""

    def get_state(self) -> Any: ...

    def set_state(self, state: Any, /) -> object: ...


class Epochal(Protocol):
    """A sampler or a data set whose order depends on the epoch, as torch's DistributedSampler."""

    def set_epoch(self, epoch: int, /) -> object: ...


# Not `isinstance` of a runtime-checkable protocol: from Python 3.12 on that does not see attributes which a wrapper
# forwards by `__getattr__`, as the loaders of Accelerate do, and their state would be lost without a word.


def is_stateful(value: object) -> TypeGuard[Stateful]:
    """Tell whether a value (or, for a class, its instances) has `state_dict` and `load_state_dict`."""
    return hasattr(value, "state_dict") and hasattr(value, "load_state_dict")


def is_stateful_iterator(value: object) -> TypeGuard[StatefulIterator]:
    """Tell whether a value has `get_state` and `set_state`."""
    return hasattr(value, "get_state") and hasattr(value, "set_state")


def has_epoch(value: object) -> TypeGuard[Epochal]:
    """Tell whether a value has `set_epoch`."""
    return callable(getattr(value, "set_epoch", None))


def has_persistent_workers(loader: object) -> bool:
    """Tell whether the worker processes of a loader stay alive from epoch to epoch."""
    return bool(getattr(loader, "persistent_workers", False) and getattr(loader, "num_workers", 0))


def components_of(loader: object) -> list[object]:
    """Return the loader, its sampler, batch sampler, the sampler of that, and the data set: each once."""
    batch_sampler = getattr(loader, "batch_sampler", None)
    candidates = (
        loader,
        getattr(loader, "sampler", None),
        batch_sampler,
        getattr(batch_sampler, "sampler", None),
        getattr(loader, "dataset", None),
    )
    unique = {id(component): component for component in candidates if component is not None}
    return list(unique.values())


def named_components(loader: object) -> dict[str, object]:
    """Return the loader and its components that may keep a state, by the names that messages use."""
    named = {name: getattr(loader, name, None) for name in _NAMES}
    return {"loader": loader, **{name: component for name, component in named.items() if component is not None}}


def saved_by_loader(loader: object) -> list[object]:
    """Return the components whose state is part of the loader's own state."""
    if is_stateful_iterator(loader):
        return [loader]
    return [component for component in components_of(loader) if is_stateful(component)] if is_stateful(loader) else []


def generators_of(loader: object) -> list[torch.Generator]:
    """Return the attributes `generator` of the loader and its components."""
    candidates = (getattr(component, "generator", None) for component in components_of(loader))
    unique = {id(value): value for value in candidates if isinstance(value, torch.Generator)}
    return list(unique.values())


def base_seed(loader: object, generator: torch.Generator, seed: int) -> int:
    """Return the seed that the user gave a generator, or `seed` where torchdata drew it at random."""
    # A torchdata sampler without a generator makes one, seeded from the global generator: another seed in each process.
    sampler = type(getattr(loader, "sampler", None))
    drawn = getattr(loader, "generator", None) is None and sampler.__module__.startswith("torchdata")
    return seed if drawn else generator.initial_seed()


def iterable_of(function: Callable[..., Any], epoch: int) -> Iterable[Any]:
    """Call a function for the batches of an epoch, with the epoch where it has a parameter `epoch` or needs one value.

    Raises:
        DataError: what it returns cannot be iterated.
    """
    args, kwargs = _epoch_argument(function, epoch)
    batches = function(*args, **kwargs)
    if not isinstance(batches, Iterable) and not hasattr(batches, "__getitem__"):
        raise DataError(
            explain(
                "the function that makes the batches of an epoch returned a value that cannot be iterated",
                where=f"data: {function!r:.80} returned {type(batches).__name__}",
                why="it is called for each epoch, and returns an iterator of batches",
                instead="lambda epoch: iter(batches)",
            )
        )
    return batches


def _epoch_argument(function: Callable[..., Any], epoch: int) -> tuple[tuple[int, ...], dict[str, int]]:
    try:
        parameters = inspect.signature(function).parameters
    except ValueError:  # some built-in functions have no signature
        return (), {}
    if "epoch" in parameters:
        return (), {"epoch": epoch}
    required = [
        p
        for p in parameters.values()
        if p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)
    ]
    return ((epoch,) if len(required) == 1 else ()), {}
