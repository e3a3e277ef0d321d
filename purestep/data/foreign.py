"""Loaders that are not ours, as sources: resumed from their own state where they have one, by skipping where not.

Owns the adapters behind `as_source`. It knows protocols (`state_dict`, `get_state`, `set_epoch`), not packages, and
imports none of them.
"""

from __future__ import annotations

import collections.abc
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from purestep.data import seeds
from purestep.data.portable import pack, unpack
from purestep.errors import DataError, explain


class ReplayWarning(UserWarning):
    """A resume inside an epoch reads the first batches again and drops them, for lack of a state."""


class Sequence:
    """A sequence of batches: any position is as near as any other."""

    def __init__(self, data: collections.abc.Sequence[Any]) -> None:
        self._data = data

    def __repr__(self) -> str:
        return f"{type(self._data).__name__} of {len(self._data)} batches"

    def identity(self) -> dict[str, Any]:
        """Return what it is a sequence of; a snapshot of a run records it."""
        return {"class": type(self._data), "length": len(self._data)}

    def length(self) -> int:
        """Return the number of batches."""
        return len(self._data)

    def open(self, epoch: int, batch: int, state: Any = None) -> Iterator[Any]:
        """Return an iterator over the batches from number `batch` on; every epoch is the same."""
        return (self._data[i] for i in range(batch, len(self._data)))

    def state(self) -> None:
        """Return None: the position says it all."""
        return


class Foreign:
    """Any loader or iterable as a source; see `as_source` for what it does with which."""

    def __init__(self, data: Any, *, seed: int = 0) -> None:
        self._data = data
        self._seed = seed
        self._iterator: Any = None
        self._position: tuple[int, int] | None = None
        self._ended = False
        self._warned = False
        self._initial: Any = None
        self._generators = _generators(data)
        self._bases = [_base_seed(data, g, seed) for g in self._generators]
        self._named = f"{type(data).__module__}.{type(data).__qualname__}"
        self._function = isinstance(data, type) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__"))
        self._one_shot = isinstance(data, collections.abc.Iterator)
        if self._one_shot and _keeps_state(data):
            self._initial = data.get_state()

    def __repr__(self) -> str:
        return self._named

    def identity(self) -> Any:
        """Return what decides which batches it gives, as far as the loader tells; a snapshot of a run records it."""
        from purestep.data import loaders

        return loaders.identity(self._data, self._seed)

    def length(self) -> int | None:
        """Return `len` of the loader, or None where it has none."""
        if self._function:
            return None
        try:
            return len(self._data)
        except (TypeError, NotImplementedError, AttributeError):
            return None

    def open(self, epoch: int, batch: int, state: Any = None) -> Iterator[Any]:
        """Return an iterator over the batches of an epoch from number `batch` on.

        Args:
            epoch: 0 or more.
            batch: batches of the epoch that were read before.
            state: what `state()` returned there; None replays.

        Raises:
            DataError: the state belongs to another kind of loader, or an iterator would have to begin again.
        """
        if self._position == (epoch, batch) and not self._ended:
            return self._read(self._iterator, epoch, batch)
        own = self._unpacked(state)
        self._announce(epoch)
        if batch == 0:
            self._iterator = self._fresh(epoch)
        elif own is not None:
            self._iterator = self._restored(epoch, batch, own)
        else:
            self._iterator = self._skipped(epoch, batch)
        self._position, self._ended = (epoch, batch), False
        return self._read(self._iterator, epoch, batch)

    def state(self) -> Any:
        """Return the loader's own state as of the last batch given, as a pytree of plain values and tensors."""
        packed: dict[str, Any] = {"generators": list(self._bases)} if self._bases else {}
        if self._position is None:
            return packed or None  # asked before its first epoch, torchdata would start an iteration to answer
        if hasattr(self._data, "state_dict") and hasattr(self._data, "load_state_dict"):
            packed["state_dict"] = pack(self._data.state_dict(), "the loader's state_dict()")
        elif _keeps_state(self._iterator):
            packed["get_state"] = pack(self._iterator.get_state(), "the iterator's get_state()")
        return packed or None

    def parts(self) -> list[Any]:
        """Return the loader, its sampler, batch sampler, that one's sampler, and the data set: each once."""
        return _parts(self._data)

    def close(self) -> None:
        """Forget the iterator, which ends the workers that only it keeps alive."""
        self._iterator, self._position = None, None

    # --- private -----------------------------------------------------------------------------------------------------

    def _read(self, iterator: Any, epoch: int, batch: int) -> Iterator[Any]:
        for number in itertools.count(batch):
            try:
                item = self._seeded(lambda: next(iterator), epoch, number)
            except StopIteration:
                if iterator is self._iterator:
                    self._ended = True
                return
            except Exception as error:
                error.add_note(f"while batch {number} of epoch {epoch} was read; data: {self._named}")
                raise
            if iterator is self._iterator:
                self._position = (epoch, number + 1)
            yield item

    def _seeded(self, call: Callable[[], Any], epoch: int, batch: int) -> Any:
        with seeds.preserved():
            seeds.seed_globals(*seeds.fold_words(seeds.epoch_words(self._seed, "loader", epoch), batch))
            return call()

    def _fresh(self, epoch: int) -> Any:
        if not self._one_shot:
            # Loaders draw seeds of their own when an iteration starts; those belong to the epoch as well.
            return self._seeded(lambda: iter(self._call(epoch)), epoch, 0)
        if self._initial is not None:
            self._data.set_state(self._initial)
        elif self._position is not None:
            raise DataError(
                explain(
                    "an iterator gives its batches once, and they are needed again",
                    where=f"data: {self._named}, read to {_place(*self._position)}; asked for {_place(epoch, 0)}",
                    why="a generator that has been read cannot begin again",
                    instead="pass the function that makes it: fit(step, state, lambda: make_batches(), ...)",
                )
            )
        return self._data

    def _call(self, epoch: int) -> Any:
        if not self._function:
            return self._data
        return self._data(epoch=epoch) if _takes_epoch(self._data) else self._data()

    def _restored(self, epoch: int, batch: int, own: dict[str, Any]) -> Any:
        if "state_dict" in own:
            if self.length() == batch:
                return iter(())  # torchdata takes the state of an ended epoch for the start of the next one
            self._data.load_state_dict(own["state_dict"])
            return self._seeded(lambda: iter(self._data), epoch, 0)
        iterator = self._data if self._one_shot else self._seeded(lambda: iter(self._call(epoch)), epoch, 0)
        iterator.set_state(own["get_state"])
        return iterator

    def _skipped(self, epoch: int, batch: int) -> Any:
        iterator = self._fresh(epoch)
        if not self._warned:
            self._warned = True
            warnings.warn(
                explain(
                    f"resuming inside an epoch reads its first {batch} batches again and drops them",
                    where=f"data: {self._named}",
                    why="it keeps no state that could be saved; should it give other batches this time, the run "
                    "differs",
                    instead="ps.data.batches, or a loader with state_dict, such as torchdata's StatefulDataLoader",
                ),
                ReplayWarning,
                stacklevel=4,
            )
        for number in range(batch):
            try:
                self._seeded(lambda: next(iterator), epoch, number)
            except StopIteration:
                raise DataError(
                    explain(
                        f"the epoch ended after {number} batches, but the run had read {batch} of it",
                        where=f"data: {self._named}, epoch {epoch}",
                        why="it does not give the same batches as before the resume",
                        instead="ps.data.batches, or a loader with state_dict, such as torchdata's StatefulDataLoader",
                    )
                ) from None
        return iterator

    def _unpacked(self, state: Any) -> dict[str, Any] | None:
        """The loader's own part of a state, checked; None when there is none."""
        if state is None:
            return None
        bases = state.get("generators", []) if isinstance(state, dict) else []
        stateful = hasattr(self._data, "state_dict") and hasattr(self._data, "load_state_dict")
        known = {"generators", "state_dict" if stateful else "get_state"}
        if not isinstance(state, dict) or not set(state) <= known or len(bases) != len(self._generators):
            raise DataError(
                explain(
                    "the saved position is that of another kind of loader",
                    where=f"data: {self._named}, state: {str(state)[:120]}",
                    instead="the loader that the run was started with, or resume from the end of an epoch",
                )
            )
        self._bases = [int(base) for base in bases]
        own = {name: unpack(value) for name, value in state.items() if name != "generators"}
        return own or None

    def _announce(self, epoch: int) -> None:
        """Tell the epoch to samplers and data sets that ask for it, and point the loader's generators at it."""
        for part in _parts(self._data):
            set_epoch = getattr(part, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
        for generator, base in zip(self._generators, self._bases, strict=True):
            first, second = seeds.epoch_words(base % 2**64, "generator", epoch)
            generator.manual_seed(base if epoch == 0 else first | second << 32)


def _takes_epoch(function: Callable[..., Any]) -> bool:
    try:
        return "epoch" in inspect.signature(function).parameters
    except ValueError:  # some built-in functions have no signature
        return False


def _place(epoch: int, batch: int) -> str:
    return f"batch {batch} of epoch {epoch}"


def _keeps_state(iterator: Any) -> bool:
    return hasattr(iterator, "get_state") and hasattr(iterator, "set_state")


def _parts(loader: Any) -> list[Any]:
    """The loader, its sampler, batch sampler, that one's sampler, and the data set: each once."""
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


def _generators(loader: Any) -> list[torch.Generator]:
    found = (getattr(part, "generator", None) for part in _parts(loader))
    unique = {id(g): g for g in found if isinstance(g, torch.Generator)}
    return list(unique.values())


def _base_seed(loader: Any, generator: torch.Generator, seed: int) -> int:
    # Given no generator, torchdata's sampler makes one and seeds it from the global one; the seed of that is chance.
    chance = getattr(loader, "generator", None) is None and type(
        getattr(loader, "sampler", None)
    ).__module__.startswith("torchdata")
    return seed if chance else generator.initial_seed()
