"""Loaders that are not ours, as sources: resumed from their own state where they have one, by skipping where not.

Owns the adapters behind `as_source`. It knows protocols (`state_dict`, `get_state`, `set_epoch`), not packages, and
imports none of them. What such a source saves is `saved`'s business.
"""

from __future__ import annotations

import collections.abc
import itertools
import warnings
from collections.abc import Callable, Iterator
from typing import Any

from purestep import tree
from purestep.data import seeds
from purestep.data.hidden import Hidden
from purestep.data.parts import (
    base_seed,
    called,
    generators_of,
    is_stateful,
    keeps_state,
    keeps_workers,
    named_parts,
    parts_of,
    saved_by_loader,
)
from purestep.data.portable import pack, unpack
from purestep.data.saved import Place, Saved, fits
from purestep.errors import DataError, explain


class ReplayWarning(UserWarning):
    """A resume inside an epoch reads the first batches again and drops them, for lack of a state."""


class UnsavedStateWarning(UserWarning):
    """A loader keeps something that no snapshot holds, so that the resumed run may differ from the straight one."""


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
    """Any loader or iterable as a source; see `as_source` for what it does with which.

    A loader may carry its state from one epoch into the next. So an epoch is left as a `for` statement leaves it, by
    asking for the batch after the last, and a state of the end of an epoch is restored there, and left in the same way.
    """

    def __init__(self, data: Any, *, seed: int = 0) -> None:
        self._data = data
        self._seed = seed
        self._iterator: Any = None
        self._position: Place | None = None
        self._ended = False
        self._begun = False
        self._warned = False
        self._initial: Any = None
        self._looked: Saved | None = None
        self._pending: Saved | None = None
        self._rolled: Saved | None = None
        self._generators = generators_of(data)
        self._bases = [base_seed(data, g, seed) for g in self._generators]
        self._hidden = Hidden(named_parts(data), known=[*self._generators, *saved_by_loader(data)])
        self._start: dict[str, Any] = {}
        self._changed: list[str] = []
        self._named = f"{type(data).__module__}.{type(data).__qualname__}"
        self._function = isinstance(data, type) or not (hasattr(data, "__iter__") or hasattr(data, "__getitem__"))
        self._one_shot = isinstance(data, collections.abc.Iterator)
        if self._one_shot and keeps_state(data):
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
            state: what `state()` returned there, or, where `batch` is 0, at the end of the epoch before; None replays.

        Raises:
            DataError: the state belongs to another kind of loader, or an iterator would have to begin again.
        """
        if epoch > 0 and self._position is None and keeps_workers(self._data):
            self._warn_of("what the workers keep from one epoch to the next", "persistent_workers=False")
        if state is not None and self._position != (epoch, batch):
            self._adopt(state, epoch, batch)
        if self._position != (epoch, batch) or (batch == 0 and self._ended):
            self._go_to(epoch, batch)
        return self._read(self._iterator, epoch, batch)

    def state(self) -> Any:
        """Return the loader's own state as of the last batch given, as a pytree of plain values and tensors."""
        if self._position is None:
            # Asked before its first epoch, torchdata would start an iteration to answer.
            return Saved(generators=list(self._bases)).packed()
        if self._pending is not None:
            return self._pending.packed()
        if self._ended and self._looked is not None and self._looked.own:
            # Some loaders take the state after the end for the next epoch, and a sampler that has ended for one that
            # goes on. The state before the end is safe with all.
            return self._looked.replace(stop="ahead").packed()
        self._looked = self._look()
        return self._looked.packed()

    def _look(self) -> Saved:
        saved = Saved(self._position, generators=list(self._bases))
        if is_stateful(self._data):
            saved = saved.replace(state_dict=pack(self._data.state_dict(), "the loader's state_dict()"))
            if self._rolled is not None and tree.equal(saved.state_dict, self._rolled.state_dict):
                return self._rolled.replace(then=self._position)
        elif keeps_state(self._iterator):
            return saved.replace(get_state=pack(self._iterator.get_state(), "the iterator's get_state()"))
        elif self._start and not self._ended and self._at_length():
            self._read_past_end()  # what is found in its parts is then that of the next epoch
            self._ended = True
        changed = sorted({*self._changed, *self._hidden.changed()})
        stop = "past" if self._ended else ""
        return saved.replace(stop=stop, start=self._start, now=self._hidden.capture(), changed=changed)

    def parts(self) -> list[Any]:
        """Return the loader, its sampler, batch sampler, that one's sampler, and the data set: each once."""
        return parts_of(self._data)

    def close(self) -> None:
        """Forget the iterator, which ends the workers that only it keeps alive."""
        self._iterator, self._position = None, None
        self._looked, self._pending, self._rolled = None, None, None

    # --- from one epoch to the next ----------------------------------------------------------------------------------

    def _at_length(self) -> bool:
        return self._position is not None and self._position[1] == self.length()

    def _adopt(self, state: Any, epoch: int, batch: int) -> None:
        """Go where a state was taken, unless this is the place."""
        saved = self._checked(state)
        self._bases = list(saved.generators)
        if self._position is not None and self._position == (saved.then or saved.place):
            return
        if saved.changed and (saved.own or epoch > 0):  # the first epoch is read again from its start
            self._warn_of(", ".join(saved.changed), "a loader and a data set with state_dict for what they keep")
            self._changed = list(saved.changed)
        if saved.place is None and saved.own and batch == 0:
            why = f"what it had at the end of epoch {epoch - 1}: this snapshot is of a version that did not note it"
            self._warn_of(why, "resume=<the number of a snapshot inside of an epoch>")
        elif saved.own:
            self._restore(saved.replace(place=saved.place or (epoch, batch)))
        elif saved.place is not None and saved.now:
            self._restore_hidden(saved, saved.place, over=saved.stop != "" or saved.place[0] != epoch)
        if saved.then is not None:
            self._go_to(*saved.then)

    def _restore(self, saved: Saved) -> None:
        epoch, batch = saved.place or (0, 0)
        self._announce(epoch)
        self._looked, self._pending, self._rolled, self._ended = None, None, None, False
        if saved.stop or batch == self.length():
            self._iterator, self._pending = iter(()), saved
        elif (why := saved.unfit) is not None:
            self._hidden.put_back(saved.start)
            self._start = saved.start
            self._iterator = self._replayed(epoch, batch, why)
        else:
            self._iterator = self._restored(epoch, saved)
        self._position = epoch, batch

    def _restore_hidden(self, saved: Saved, place: Place, over: bool) -> None:
        """Put back what the parts of a loader keep that saves nothing: at the place, or to read up to it again."""
        self._announce(place[0])
        self._hidden.put_back(saved.now if over else saved.start)
        self._start = saved.start
        self._iterator = iter(()) if over else self._replayed(*place)
        self._looked, self._position, self._ended = None, place, over

    def _go_to(self, epoch: int, batch: int) -> None:
        """Go on to a place without a state: in this epoch, or by way of its end to the start of another one."""
        if not self._ended and self._position is not None and self._position[0] == epoch and self._position[1] < batch:
            self._drop(epoch, self._position[1], batch)
        else:
            self._rolled = self._leave()
            self._announce(epoch, self._rolled)
            self._start = self._hidden.capture()
            self._iterator = self._replayed(epoch, batch)
        self._position, self._ended = (epoch, batch), False

    def _leave(self) -> Saved | None:
        """End the epoch that was read to its last batch, and return the state to load again, if there is one."""
        saved, self._pending, self._looked = self._pending, None, None
        if saved is None:
            if not self._ended and self._at_length():
                self._read_past_end()
            return None
        if saved.stop == "past" and saved.state_dict is not None:
            return saved
        self._iterator = self._restored(saved.place[0] if saved.place else 0, saved)
        # A loader with a batch here has taken the end of its epoch for the start of the next one, and begins there when
        # it is given the state again. One with workers begins at its data set, so that what is left is of no account.
        rolls = self._read_past_end() and saved.state_dict is not None and not getattr(self._data, "num_workers", 0)
        return saved if rolls else None

    def _read_past_end(self) -> bool:
        """Ask for the batch after the last, which is when loaders put themselves back; tell whether there was one."""
        epoch, batch = self._position or (0, 0)
        try:
            self._next(self._iterator, epoch, batch)
        except StopIteration:
            return False
        return True

    # --- private -----------------------------------------------------------------------------------------------------

    def _read(self, iterator: Any, epoch: int, batch: int) -> Iterator[Any]:
        for number in itertools.count(batch):
            try:
                item = self._next(iterator, epoch, number)
            except StopIteration:
                if iterator is self._iterator:
                    self._ended = True
                return
            if iterator is self._iterator:
                self._position, self._looked = (epoch, number + 1), None
            yield item

    def _next(self, iterator: Any, epoch: int, number: int) -> Any:
        try:
            return self._seeded(lambda: next(iterator), epoch, number)
        except StopIteration:
            raise
        except Exception as error:
            error.add_note(f"while batch {number} of epoch {epoch} was read; data: {self._named}")
            raise

    def _seeded(self, call: Callable[[], Any], epoch: int, batch: int) -> Any:
        with seeds.preserved():
            seeds.seed_globals(*seeds.fold_words(seeds.epoch_words(self._seed, "loader", epoch), batch))
            return call()

    def _fresh(self, epoch: int) -> Any:
        if not self._one_shot:
            if epoch > 0 and not self._begun and keeps_workers(self._data):
                # It draws other numbers when it starts its workers than when it finds them, and so another order.
                self._announce(0)
                self._seeded(lambda: iter(self._data), 0, 0)
                self._announce(epoch)
            self._begun = True
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
        return called(self._data, epoch) if self._function else self._data

    def _restored(self, epoch: int, saved: Saved) -> Any:
        self._begun, self._start = True, saved.start
        self._hidden.put_back(saved.start)
        if saved.state_dict is not None:
            self._data.load_state_dict(unpack(saved.state_dict))
            iterator = self._seeded(lambda: iter(self._data), epoch, 0)
        else:
            iterator = self._data if self._one_shot else self._seeded(lambda: iter(self._call(epoch)), epoch, 0)
            iterator.set_state(unpack(saved.get_state))
        self._hidden.put_back(saved.now)
        return iterator

    def _replayed(self, epoch: int, batch: int, why: str = "it keeps no state that could be saved") -> Any:
        self._iterator = self._fresh(epoch)
        if batch and not self._warned:
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
                self._next(self._iterator, epoch, number)
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
        own = "state_dict" if is_stateful(self._data) else "get_state"
        if not fits(state, own, len(self._generators)):
            raise DataError(
                explain(
                    "the saved position is that of another kind of loader",
                    where=f"data: {self._named}, state: {str(state)[:120]}",
                    instead="the loader that the run was started with, or resume from the end of an epoch",
                )
            )
        return Saved.of(state)

    def _warn_of(self, what: str, instead: str) -> None:
        warnings.warn(
            explain(
                "the loader goes on without a part of its state",
                where=f"data: {self._named}, {what}",
                why="no snapshot holds it; where batches depend on it, they are others than those of a straight run",
                instead=instead,
            ),
            UnsavedStateWarning,
            stacklevel=5,
        )

    def _announce(self, epoch: int, again: Saved | None = None) -> None:
        """Tell the epoch to samplers and data sets that ask for it, and point the loader's generators at it.

        Where a state is to be loaded again, that comes between the two: it may hold the epoch and the generators of the
        epoch before.
        """
        for part in parts_of(self._data):
            set_epoch = getattr(part, "set_epoch", None)
            if callable(set_epoch):
                set_epoch(epoch)
        if again is not None:
            self._data.load_state_dict(unpack(again.state_dict))
        for generator, base in zip(self._generators, self._bases, strict=True):
            first, second = seeds.epoch_words(base % 2**64, "generator", epoch)
            generator.manual_seed(base if epoch == 0 else first | second << 32)


def _place(epoch: int, batch: int) -> str:
    return f"batch {batch} of epoch {epoch}"
