"""Loaders that are not ours, as sources: resumed from their own state where they have one, by skipping where not.

Owns the adapters behind `as_source`. It knows protocols (`state_dict`, `get_state`, `set_epoch`), not packages, and
imports none of them. What such a source saves is `saved`'s business.
"""

from __future__ import annotations

import collections.abc
import inspect
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import torch

from purestep import tree
from purestep.data import seeds
from purestep.data.portable import pack, unpack
from purestep.data.saved import Saved, fits
from purestep.errors import DataError, explain


class ReplayWarning(UserWarning):
    """A resume inside an epoch reads the first batches again and drops them, for lack of a state."""


class Sequence:
    """A sequence of batches: any position is as near as any other."""

    def __init__(self, data: collections.abc.Sequence[Any]) -> None:
        self._data = data

    def __repr__(self) -> str:
        return f"{type(self._data).__name__} of {len(self._data)} batches"

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
    """Any loader or iterable as a source; see `as_source` for what it does with which.

    A loader may carry its state from one epoch into the next. So an epoch is left as a `for` statement leaves it, by
    asking for the batch after the last, and a state of the end of an epoch is restored there, and left in the same way.
    """

    def __init__(self, data: Any, *, seed: int = 0) -> None:
        self._data = data
        self._seed = seed
        self._iterator: Any = None
        self._position: tuple[int, int] | None = None
        self._ended = False
        self._warned = False
        self._initial: Any = None
        self._looked: Saved | None = None
        self._pending: Saved | None = None
        self._rolled: Saved | None = None
        self._generators = _generators(data)
        self._bases = [_base_seed(data, g, seed) for g in self._generators]
        self._named = f"{type(data).__module__}.{type(data).__qualname__}"
        self._function = isinstance(data, type) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__"))
        self._one_shot = isinstance(data, collections.abc.Iterator)
        if self._one_shot and _keeps_state(data):
            self._initial = data.get_state()

    def __repr__(self) -> str:
        return self._named

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
            state: what `state()` returned there, or, where `batch` is 0, at the end of the epoch before; None replays.

        Raises:
            DataError: the state belongs to another kind of loader, or an iterator would have to begin again.
        """
        if state is not None and not self._is_at(epoch, batch):
            self._adopt(state, epoch, batch)
        if not self._is_at(epoch, batch):
            self._go_to(epoch, batch)
        return self._read(self._iterator, epoch, batch)

    def state(self) -> Any:
        """Return the loader's own state as of the last batch given, as a pytree of plain values and tensors."""
        if self._position is None:
            # Asked before its first epoch, torchdata would start an iteration to answer.
            return Saved(generators=list(self._bases)).packed()
        if self._pending is not None:
            return self._pending.packed()
        if self._ended and self._looked is not None:
            # Some loaders take the state after the end for the next epoch, and a sampler that has ended for one that
            # goes on. The state before the end is safe with all.
            return self._looked.replace(stop="ahead").packed()
        saved = Saved(self._position, "past" if self._ended else "", generators=list(self._bases))
        if _stateful(self._data):
            saved = saved.replace(state_dict=pack(self._data.state_dict(), "the loader's state_dict()"))
            if self._rolled is not None and tree.equal(saved.state_dict, self._rolled.state_dict):
                saved = self._rolled.replace(then=self._position)
        elif _keeps_state(self._iterator):
            saved = saved.replace(get_state=pack(self._iterator.get_state(), "the iterator's get_state()"))
        self._looked = None if self._ended else saved
        return saved.packed()

    def parts(self) -> list[Any]:
        """Return the loader, its sampler, batch sampler, that one's sampler, and the data set: each once."""
        return _parts(self._data)

    def close(self) -> None:
        """Forget the iterator, which ends the workers that only it keeps alive."""
        self._iterator, self._position = None, None
        self._looked, self._pending, self._rolled = None, None, None

    # --- from one epoch to the next ----------------------------------------------------------------------------------

    def _is_at(self, epoch: int, batch: int) -> bool:
        return self._position == (epoch, batch) and not self._ended

    def _adopt(self, state: Any, epoch: int, batch: int) -> None:
        """Go where a state was taken, unless this is the place."""
        saved = self._checked(state)
        self._bases = saved.generators
        if not saved.own or self._position == (saved.then or saved.place):
            return
        if saved.place is None:
            if batch == 0:
                self._warn_of_old(epoch)
                return
            saved = saved.replace(place=(epoch, batch))
        place = saved.place or (epoch, batch)
        self._announce(place[0])
        self._looked, self._pending, self._rolled, self._ended = None, None, None, False
        if saved.stop or place[1] == self.length():
            self._iterator, self._pending = iter(()), saved
        elif saved.worker_ended:
            self._iterator = self._replayed(*place, why="one of its workers had ended, and would begin again")
        else:
            self._iterator = self._restored(place[0], saved)
        self._position = place
        if saved.then is not None:
            self._go_to(*saved.then)

    def _go_to(self, epoch: int, batch: int) -> None:
        """Go on to a place without a state: in this epoch, or by way of its end to the start of another one."""
        before = self._position is not None and self._position[0] == epoch and self._position[1] < batch
        if before and not self._ended and self._position is not None:
            self._drop(epoch, self._position[1], batch)
        else:
            self._rolled = self._leave()
            self._announce(epoch, self._rolled)
            self._iterator = self._fresh(epoch) if batch == 0 else self._replayed(epoch, batch)
        self._position, self._ended = (epoch, batch), False

    def _leave(self) -> Saved | None:
        """End the epoch that was read to its last batch, and return the state to load again, if there is one."""
        saved, self._pending, self._looked = self._pending, None, None
        if saved is None:
            if not self._ended and self._position is not None and self._position[1] == self.length():
                self._read_past_end()
            return None
        if saved.stop == "past" and saved.state_dict is not None:
            return saved
        epoch = saved.place[0] if saved.place else 0
        self._iterator = self._restored(epoch, saved)
        # A loader with a batch here has taken the end of its epoch for the start of the next one, and begins there when
        # it is given the state again. One with workers begins at its data set, so that what is left is of no account.
        rolls = self._read_past_end() and saved.state_dict is not None and not getattr(self._data, "num_workers", 0)
        return saved if rolls else None

    def _read_past_end(self) -> bool:
        """Ask for the batch after the last, which is when loaders put themselves back; tell whether there was one."""
        epoch, batch = self._position or (0, 0)
        try:
            self._seeded(lambda: next(self._iterator), epoch, batch)
        except StopIteration:
            return False
        return True

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
                self._position, self._looked = (epoch, number + 1), None
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

    def _restored(self, epoch: int, saved: Saved) -> Any:
        if saved.state_dict is not None:
            self._data.load_state_dict(unpack(saved.state_dict))
            return self._seeded(lambda: iter(self._data), epoch, 0)
        iterator = self._data if self._one_shot else self._seeded(lambda: iter(self._call(epoch)), epoch, 0)
        iterator.set_state(unpack(saved.get_state))
        return iterator

    def _replayed(self, epoch: int, batch: int, why: str = "it keeps no state that could be saved") -> Any:
        self._iterator = self._fresh(epoch)
        if not self._warned:
            self._warned = True
            warnings.warn(
                explain(
                    f"resuming inside an epoch reads its first {batch} batches again and drops them",
                    where=f"data: {self._named}",
                    why=f"{why}; should it give other batches this time, the run differs",
                    instead="ps.data.batches, or a loader with state_dict, such as torchdata's StatefulDataLoader",
                ),
                ReplayWarning,
                stacklevel=4,
            )
        self._drop(epoch, 0, batch)
        return self._iterator

    def _drop(self, epoch: int, first: int, batch: int) -> None:
        """Read from batch `first` up to `batch`."""
        for number in range(first, batch):
            try:
                self._seeded(lambda: next(self._iterator), epoch, number)
            except StopIteration:
                raise DataError(
                    explain(
                        f"the epoch ended after {number} batches, but the run had read {batch} of it",
                        where=f"data: {self._named}, epoch {epoch}",
                        why="it does not give the same batches as before the resume",
                        instead="ps.data.batches, or a loader with state_dict, such as torchdata's StatefulDataLoader",
                    )
                ) from None

    def _checked(self, state: Any) -> Saved:
        """What a state says, checked against this loader."""
        own = "state_dict" if _stateful(self._data) else "get_state"
        if not fits(state, own, len(self._generators)):
            raise DataError(
                explain(
                    "the saved position is that of another kind of loader",
                    where=f"data: {self._named}, state: {str(state)[:120]}",
                    instead="the loader that the run was started with, or resume from the end of an epoch",
                )
            )
        return Saved.of(state)

    def _warn_of_old(self, epoch: int) -> None:
        warnings.warn(
            explain(
                f"the loader begins epoch {epoch} without the state that it had after epoch {epoch - 1}",
                where=f"data: {self._named}",
                why="the snapshot is of an older version, which did not note where an epoch ended; if the loader "
                "carries nothing from one epoch into the next, the run is the same",
                instead="resume from a snapshot inside of an epoch, where there is one: resume=<its number>",
            ),
            ReplayWarning,
            stacklevel=5,
        )

    def _announce(self, epoch: int, again: Saved | None = None) -> None:
        """Tell the epoch to samplers and data sets that ask for it, and point the loader's generators at it.

        Where a state is to be loaded again, that comes between the two: it may hold the epoch and the generators of the
        epoch before.
        """
        for part in _parts(self._data):
            set_epoch = getattr(part, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
        if again is not None:
            self._data.load_state_dict(unpack(again.state_dict))
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


def _stateful(loader: Any) -> bool:
    return hasattr(loader, "state_dict") and hasattr(loader, "load_state_dict")


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
