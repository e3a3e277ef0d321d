"""Third-party loaders as sources: resumed from their own state where they have one, by skipping batches where not.

Owns the adapters behind `as_source`. It knows protocols (`state_dict`, `get_state`, `set_epoch`), not packages, and
imports none of them. `loader_state` defines the record of what such a source saves.
"""

from __future__ import annotations

import collections.abc
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any, TypeVar

from purestep import tree
from purestep.data import seeding
from purestep.data.hidden_state import HiddenState
from purestep.data.loader_protocols import (
    base_seed,
    components_of,
    generators_of,
    has_epoch,
    has_persistent_workers,
    is_stateful,
    is_stateful_iterator,
    iterable_of,
    named_components,
    saved_by_loader,
)
from purestep.data.loader_state import Position, Saved, fits
from purestep.data.plain_state import pack, unpack
from purestep.errors import DataError, explain
from purestep.random import watch_all

T = TypeVar("T")
_TRIED = 32  # batches that are read with seeds before they are left out
_END = object()


class ReplayWarning(UserWarning):
    """A resume inside an epoch reads the first batches again and drops them, because the loader saves no state."""


class UnsavedStateWarning(UserWarning):
    """A loader keeps a state that no snapshot holds, so the resumed run may differ from the uninterrupted one."""


class BatchSequence:
    """A sequence of batches: opening it costs the same at any position."""

    def __init__(self, data: collections.abc.Sequence[Any]) -> None:
        self._data = data

    def __repr__(self) -> str:
        return f"{type(self._data).__name__} of {len(self._data)} batches"

    def identity(self) -> dict[str, Any]:
        """Return the type and the length of the sequence; a snapshot of a run records it."""
        return {"class": type(self._data), "length": len(self._data)}

    def length(self) -> int:
        """Return the number of batches."""
        return len(self._data)

    def open(self, epoch: int, batch: int, state: object = None) -> Iterator[Any]:
        """Return an iterator over the batches from number `batch` on; every epoch is the same."""
        return (self._data[i] for i in range(batch, len(self._data)))

    def state(self) -> None:
        """Return None: the position determines every batch."""
        return


class ThirdPartyLoader:
    """Any loader or iterable as a source; the table of `as_source` says how each kind resumes.

    A loader may carry its state from one epoch into the next. So the adapter leaves an epoch as a `for` statement does,
    by asking for the batch after the last, and restores a state of the end of an epoch at that end, which it then
    leaves in the same way.
    """

    def __init__(self, data: Any, *, seed: int = 0) -> None:
        self._data = data
        self._seed = seed
        self._quiet = 0  # batches that were read without a draw from a global generator; -1 from the first draw on
        self._iterator: Any = None
        self._position: Position | None = None
        self._ended = False  # whether the iterator has raised StopIteration
        self._has_iterated = False
        self._has_warned = False
        self._initial_state: Any = None
        # Three records of the loader: its state at the position, so that `state` reads it once; a state of the end of
        # an epoch that is restored only when the next epoch opens; the state from which this epoch was rolled over.
        self._current: Saved | None = None
        self._pending: Saved | None = None
        self._rolled_over: Saved | None = None
        self._generators = generators_of(data)
        self._base_seeds = [base_seed(data, generator, seed) for generator in self._generators]
        self._hidden = HiddenState(named_components(data), known=[*self._generators, *saved_by_loader(data)])
        self._hidden_at_start: dict[str, Any] = {}
        self._changed: list[str] = []
        self._named = f"{type(data).__module__}.{type(data).__qualname__}"
        self._is_function = isinstance(data, type) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__"))
        self._is_iterator = isinstance(data, collections.abc.Iterator)
        if self._is_iterator and is_stateful_iterator(data):
            self._initial_state = data.get_state()

    def __repr__(self) -> str:
        return self._named

    def identity(self) -> dict[str, Any]:
        """Return what decides which batches it gives, as far as its attributes show; a snapshot of a run records it."""
        from purestep.data import loader_identity

        return loader_identity.identity(self._data, self._seed)

    def length(self) -> int | None:
        """Return `len` of the loader, or None where it has none."""
        if self._is_function:
            return None
        try:
            return len(self._data)
        except (TypeError, NotImplementedError, AttributeError):
            return None

    def open(self, epoch: int, batch: int, state: Any = None) -> Iterator[Any]:
        """Return an iterator over the batches of an epoch from number `batch` on.

        Args:
            epoch: 0 or more.
            batch: number of batches of the epoch that the run has read.
            state: what `state()` returned at this position, or, where `batch` is 0, at the end of the epoch before;
                None reads the first `batch` batches again and drops them.

        Raises:
            DataError: the state belongs to another kind of loader, or an iterator would have to begin again.
        """
        if epoch > 0 and self._position is None and has_persistent_workers(self._data):
            self._warn_unsaved("the state that its workers keep from one epoch to the next", "persistent_workers=False")
        if state is not None and self._position != (epoch, batch):
            self._resume(state, epoch, batch)
        if self._position != (epoch, batch) or (batch == 0 and self._ended):
            self._advance(epoch, batch)
        return self._read(self._iterator, epoch, batch)

    def state(self) -> object:
        """Return the loader's own state as of the last batch read, as a pytree of plain values and tensors."""
        if self._position is None:
            # Before its first epoch, torchdata's `state_dict` would start an iteration.
            return Saved(generators=list(self._base_seeds)).packed()
        if self._pending is not None:
            return self._pending.packed()
        if self._ended and self._current is not None and self._current.has_loader_state:
            # After StopIteration, some loaders return the state of the next epoch, and others that of a sampler which
            # does not know that it has ended. The state before it restores right with all of them.
            return self._current.replace(stop="ahead").packed()
        self._current = self._capture()
        return self._current.packed()

    def _capture(self) -> Saved:
        saved = Saved(self._position, generators=list(self._base_seeds))
        if is_stateful(self._data):
            saved = saved.replace(state_dict=pack(self._data.state_dict(), "the loader's state_dict()"))
            # The state has not changed since the epoch began: it says nothing of the position, so record where to
            # read on to from the state.
            if self._rolled_over is not None and tree.equal(saved.state_dict, self._rolled_over.state_dict):
                return self._rolled_over.replace(then=self._position)
        elif is_stateful_iterator(self._iterator):
            return saved.replace(get_state=pack(self._iterator.get_state(), "the iterator's get_state()"))
        elif self._hidden_at_start and not self._ended and self._at_length():
            self._read_past_end()  # the states in its components are then those of the next epoch
            self._ended = True
        changed = sorted({*self._changed, *self._hidden.changed()})
        stop = "past" if self._ended else ""
        return saved.replace(stop=stop, start=self._hidden_at_start, now=self._hidden.capture(), changed=changed)

    @property
    def seed(self) -> int:
        """The seed of the global generators while the loader works."""
        return self._seed

    def reseeded(self, seed: int) -> ThirdPartyLoader:
        """Return the same loader, not read yet, under another seed of the global generators."""
        return ThirdPartyLoader(self._data, seed=seed)

    def components(self) -> list[object]:
        """Return the loader, its sampler, batch sampler, the sampler of that, and the data set: each once."""
        return components_of(self._data)

    def close(self) -> None:
        """Drop the iterator, which ends the workers that only it keeps alive."""
        self._iterator, self._position = None, None
        self._current, self._pending, self._rolled_over = None, None, None

    # --- from one epoch to the next ----------------------------------------------------------------------------------

    def _at_length(self) -> bool:
        return self._position is not None and self._position[1] == self.length()

    def _resume(self, state: object, epoch: int, batch: int) -> None:
        """Go to the position where a state was taken, unless the loader is there already."""
        saved = self._checked(state)
        self._base_seeds = list(saved.generators)
        if self._position is not None and self._position == (saved.then or saved.place):
            return
        if saved.changed and (saved.has_loader_state or epoch > 0):  # epoch 0 is read again from its start
            self._warn_unsaved(
                ", ".join(saved.changed), "a loader and a data set whose state_dict has these attributes"
            )
            self._changed = list(saved.changed)
        if saved.place is None and saved.has_loader_state and batch == 0:
            what = f"its state at the end of epoch {epoch - 1}: an older version wrote this snapshot, without it"
            self._warn_unsaved(what, "resume=<the number of a snapshot inside of an epoch>")
        elif saved.has_loader_state:
            self._restore(saved.replace(place=saved.place or (epoch, batch)))
        elif saved.place is not None and saved.now:
            self._restore_hidden(saved, saved.place, ended=saved.stop != "" or saved.place[0] != epoch)
        if saved.then is not None:
            self._advance(*saved.then)

    def _restore(self, saved: Saved) -> None:
        epoch, batch = saved.place or (0, 0)
        self._start_epoch(epoch)
        self._current, self._pending, self._rolled_over, self._ended = None, None, None, False
        if saved.stop or batch == self.length():
            # The end of an epoch: the state is loaded when the next epoch opens, in `_leave_epoch`.
            self._iterator, self._pending = iter(()), saved
        elif (why := saved.unfit) is not None:
            self._hidden.restore(saved.start)
            self._hidden_at_start = saved.start
            self._iterator = self._replayed(epoch, batch, why)
        else:
            self._iterator = self._restored(epoch, saved)
        self._position = epoch, batch

    def _restore_hidden(self, saved: Saved, position: Position, ended: bool) -> None:
        """Restore the states in the components of a loader without its own: those at the position where the epoch has
        ended; else those of its start, from where the batches are read again."""
        self._start_epoch(position[0])
        self._hidden.restore(saved.now if ended else saved.start)
        self._hidden_at_start = saved.start
        self._iterator = iter(()) if ended else self._replayed(*position)
        self._current, self._position, self._ended = None, position, ended

    def _advance(self, epoch: int, batch: int) -> None:
        """Go to a position without a state: further in this epoch, or past its end to another one and into that."""
        if not self._ended and self._position is not None and self._position[0] == epoch and self._position[1] < batch:
            self._drop(epoch, self._position[1], batch)
        else:
            self._rolled_over = self._leave_epoch()
            self._start_epoch(epoch, self._rolled_over)
            self._hidden_at_start = self._hidden.capture()
            self._iterator = self._replayed(epoch, batch)
        self._position, self._ended = (epoch, batch), False

    def _leave_epoch(self) -> Saved | None:
        """End an epoch that was read to its last batch, and return the state to load again, if there is one."""
        saved, self._pending, self._current = self._pending, None, None
        if saved is None:
            if not self._ended and self._at_length():
                self._read_past_end()
            return None
        if saved.stop == "past" and saved.state_dict is not None:
            return saved
        self._iterator = self._restored(saved.place[0] if saved.place else 0, saved)
        # A loader that has another batch here took the end of its epoch for the start of the next one; loading the
        # state again makes it begin there once more. A loader with workers restarts at its data set in any case.
        rolls_over = self._read_past_end() and saved.state_dict is not None
        return saved if rolls_over and not getattr(self._data, "num_workers", 0) else None

    def _read_past_end(self) -> bool:
        """Ask for the batch after the last, at which loaders reset themselves; tell whether there was one."""
        epoch, batch = self._position or (0, 0)
        try:
            if batch and self._quiet >= _TRIED:
                self._unseeded(self._iterator, epoch, batch)
            else:
                self._next(self._iterator, epoch, batch)
        except StopIteration:
            return False
        return True

    # --- private -----------------------------------------------------------------------------------------------------

    def _read(self, iterator: Any, epoch: int, batch: int) -> Iterator[Any]:
        for number in itertools.count(batch):
            try:
                if number and self._quiet >= _TRIED and iterator is self._iterator:
                    iterator, item = self._unseeded(iterator, epoch, number)
                else:
                    item = self._next(iterator, epoch, number)
            except StopIteration:
                if iterator is self._iterator:
                    self._ended = True
                return
            # An older iterator of this source may still be read; it must not move the position of the newer one.
            if iterator is self._iterator:
                self._position, self._current = (epoch, number + 1), None
            yield item

    def _next(self, iterator: Any, epoch: int, number: int) -> Any:
        """Read a batch with the global generators seeded for it."""
        # With the first batch, samplers draw the seed of their order.
        call: Callable[[Any], Any] = (
            self._looked_at if number and 0 <= self._quiet < _TRIED and self._reads_again else next
        )
        try:
            return self._seeded(lambda: call(iterator), epoch, number)
        except StopIteration:
            raise
        except Exception as error:
            self._note(error, epoch, number)
            raise

    def _note(self, error: Exception, epoch: int, number: int) -> None:
        error.add_note(f"while batch {number} of epoch {epoch} was read; data: {self._named}")

    # --- loaders that draw nothing from the global generators: most of them -------------------------------------------

    @property
    def _reads_again(self) -> bool:
        """Whether the batches of an epoch can be read from its start once more: none but the sampler says which."""
        anew = not (self._is_iterator or self._is_function or is_stateful(self._data) or self._hidden_at_start)
        return anew and self.length() is not None

    def _looked_at(self, iterator: Any) -> Any:
        """Read a batch, and look whether that drew from the global generators."""
        with seeding.preserved() as seeded:
            item = next(iterator)
            self._quiet = -1 if seeded.moved() else self._quiet + 1
        return item

    def _unseeded(self, iterator: Any, epoch: int, number: int) -> tuple[Any, Any]:
        """Read a batch of a loader that drew nothing in many, and so needs no seeds; return its iterator, and the
        batch.

        One that does draw after all is read again from the start of the epoch, and is seeded from then on: of the
        batches before this one none has drawn, so they are the same.
        """
        outside = watch_all.states()
        try:
            item = next(iterator, _END)
        except BaseException as error:
            watch_all.put_back(outside)
            if isinstance(error, Exception):
                self._note(error, epoch, number)
            raise
        if watch_all.states() is outside or not watch_all.moved(outside):
            if item is _END:
                raise StopIteration
            return iterator, item
        watch_all.put_back(outside)
        self._quiet = -1
        self._start_epoch(epoch)
        self._iterator = self._fresh(epoch)
        self._drop(epoch, 0, number)
        return self._iterator, self._next(self._iterator, epoch, number)

    def _seeded(self, call: Callable[[], T], epoch: int, batch: int) -> T:
        with seeding.preserved():
            seeding.seed_globals(*seeding.fold_words(seeding.epoch_words(self._seed, "loader", epoch), batch))
            return call()

    def _fresh(self, epoch: int) -> Any:
        if not self._is_iterator:
            if epoch > 0 and not self._has_iterated and has_persistent_workers(self._data):
                # torch's loader draws a different number of seeds when it starts workers than when it reuses them, so
                # that the order of a later epoch depends on an earlier start: start them here as epoch 0 does.
                self._start_epoch(0)
                self._seeded(lambda: iter(self._data), 0, 0)
                self._start_epoch(epoch)
            self._has_iterated = True
            # Loaders draw seeds of their own when an iteration starts; those belong to the epoch as well.
            return self._seeded(lambda: iter(self._iterable(epoch)), epoch, 0)
        if self._initial_state is not None:
            self._data.set_state(self._initial_state)
        elif self._position is not None:
            raise DataError(
                explain(
                    "an iterator gives its batches once, and they are needed again",
                    where=f"data: {self._named}, read to {_shown(*self._position)}; asked for {_shown(epoch, 0)}",
                    why="a generator that has been read cannot begin again",
                    instead="pass the function that makes it: fit(step, state, lambda: make_batches(), ...)",
                )
            )
        return self._data

    def _iterable(self, epoch: int) -> Any:
        return iterable_of(self._data, epoch) if self._is_function else self._data

    def _restored(self, epoch: int, saved: Saved) -> Any:
        self._has_iterated, self._hidden_at_start = True, saved.start
        # The states in components are restored twice: those of the start of the epoch, because `iter` may use them (a
        # sampler permutes then), and those at the position, because loading a state and `iter` may change them.
        self._hidden.restore(saved.start)
        if saved.state_dict is not None:
            self._data.load_state_dict(unpack(saved.state_dict))
            iterator = self._seeded(lambda: iter(self._data), epoch, 0)
        else:
            iterator = self._data if self._is_iterator else self._seeded(lambda: iter(self._iterable(epoch)), epoch, 0)
            iterator.set_state(unpack(saved.get_state))
        self._hidden.restore(saved.now)
        return iterator

    def _replayed(self, epoch: int, batch: int, why: str = "it keeps no state that could be saved") -> Any:
        self._iterator = self._fresh(epoch)
        if batch and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                explain(
                    f"resuming inside an epoch reads its first {batch} batches again and drops them",
                    where=f"data: {self._named}",
                    why=f"{why}; if it gives other batches this time, the run differs",
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
                self._next(self._iterator, epoch, number)
            except StopIteration:
                raise DataError(
                    explain(
                        f"the epoch ended after {number} batches, but the run had read {batch} of it",
                        where=f"data: {self._named}, epoch {epoch}",
                        why="the loader gives fewer batches than before the resume",
                        instead="ps.data.batches, or a loader with state_dict, such as torchdata's StatefulDataLoader",
                    )
                ) from None

    def _checked(self, state: object) -> Saved:
        """The record that a state is, checked against this loader."""
        method = "state_dict" if is_stateful(self._data) else "get_state"
        if not fits(state, method, len(self._generators)):
            raise DataError(
                explain(
                    "the saved position is that of another kind of loader",
                    where=f"data: {self._named}, state: {str(state)[:120]}",
                    instead="the loader that the run was started with, or resume from the end of an epoch",
                )
            )
        return Saved.of(state)

    def _warn_unsaved(self, what: str, instead: str) -> None:
        warnings.warn(
            explain(
                "the loader continues without a part of its state",
                where=f"data: {self._named}, {what}",
                why="no snapshot holds it; batches that depend on it differ from those of an uninterrupted run",
                instead=instead,
            ),
            UnsavedStateWarning,
            stacklevel=5,
        )

    def _start_epoch(self, epoch: int, reloaded: Saved | None = None) -> None:
        """Set the epoch of samplers and data sets that have one, and seed the loader's generators for it.

        A state to load again is loaded between the two, because it may hold the epoch and the generators of the epoch
        before.
        """
        for component in components_of(self._data):
            if has_epoch(component):
                component.set_epoch(epoch)
        if reloaded is not None:
            self._data.load_state_dict(unpack(reloaded.state_dict))
        for generator, base in zip(self._generators, self._base_seeds, strict=True):
            first, second = seeding.epoch_words(base % 2**64, "generator", epoch)
            generator.manual_seed(base if epoch == 0 else first | second << 32)


def _shown(epoch: int, batch: int) -> str:
    return f"batch {batch} of epoch {epoch}"
