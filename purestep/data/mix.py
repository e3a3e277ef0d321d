"""Sources made of sources: side by side, one after the other, limited, or an endless one divided into epochs.

Owns `zip`, `concat`, `take` and `stream`. Each is again a source, resumes wherever its sources do, and keeps no
position of its own.
"""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Iterator, Sequence
from typing import Any, Literal, NoReturn

from purestep import tree
from purestep.arguments import checked
from purestep.data.batches import Batches, limit
from purestep.data.per_rank import PerRank
from purestep.data.source import Source, as_source, close
from purestep.errors import DataError, explain

Mode = Literal["shortest", "cycle", "pad"]


class _Member:
    """A source within another one, with the state that its next `open` is to pass to it; None after that `open`."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.next_state: object = None

    def open(self, epoch: int, batch: int) -> Iterator[Any]:
        """Open it with `next_state`. Where its length is known, it is never asked for the batch after the last: then
        the source decides itself how it leaves the epoch, at its next `open`."""
        state, self.next_state = self.next_state, None
        batches = self.source.open(epoch, batch, state)
        length = self.source.length()
        return batches if length is None else itertools.islice(batches, max(length - batch, 0))

    def state(self) -> object:
        # A member that was not opened yet has the state of the snapshot, not that of its source.
        return self.source.state() if self.next_state is None else self.next_state


class Zipped:
    """Sources side by side; see `zip`."""

    def __init__(self, sources: Any, mode: Mode) -> None:
        leaves, self._structure = tree.flatten(sources)
        self._members = [_Member(as_source(leaf)) for leaf in leaves]
        self._mode = mode
        self._paths = tree.paths(sources, "sources")

    def length(self) -> int | None:
        """Return the number of batches of an epoch."""
        lengths = [member.source.length() for member in self._members]
        known = [length for length in lengths if length is not None]
        if len(known) < len(lengths):
            return None
        return min(known) if self._mode == "shortest" else max(known)

    def open(self, epoch: int, batch: int, state: Sequence[object] | None = None) -> Iterator[Any]:
        """Return an iterator over trees of batches."""
        _set_states(self._members, state)
        if self._mode == "shortest":
            return _side_by_side([member.open(epoch, batch) for member in self._members], self._structure)
        lengths = [n for n in (member.source.length() for member in self._members) if n is not None]
        columns = [
            self._column(member, epoch, batch, length, max(lengths))
            for member, length in builtins.zip(self._members, lengths, strict=True)
        ]
        return _side_by_side(columns, self._structure)

    def state(self) -> object:
        """Return the states of the sources."""
        return _states(self._members)

    def identity(self) -> dict[str, Any]:
        """Return the sources and how they are zipped; a snapshot of a run records it."""
        paths = [path.replace("sources", "parts", 1) for path in self._paths]  # as older snapshots name them
        return {
            "parts": dict(builtins.zip(paths, (member.source for member in self._members), strict=True)),
            "mode": self._mode,
        }

    def close(self) -> None:
        """Close the sources."""
        for member in self._members:
            close(member.source)

    def _column(self, member: _Member, epoch: int, batch: int, length: int, longest: int) -> Iterator[Any]:
        if self._mode == "pad":
            if batch < length:
                yield from member.open(epoch, batch)
            for _ in range(max(batch, length), longest):
                yield None
            return
        # Each pass over a shorter source is an epoch of its own, so that it is shuffled anew. Every epoch of the zip
        # uses the same number of these epochs, so a position in it determines the pass and the offset.
        passes = -(-longest // length)
        position = batch
        while position < longest:
            number, offset = divmod(position, length)
            for item in member.open(epoch * passes + number, offset):
                yield item
                position += 1
                if position == longest:
                    return
            if position % length:
                _refuse_short(member.source, position % length, length)


@checked(DataError)
def zip(sources: Any, *, mode: Mode = "shortest") -> Source:
    """Read several sources side by side: each batch is a tree of their batches.

    Args:
        sources: pytree whose leaves are sources, or anything `as_source` takes (lists are nodes of the tree).
        mode: how long an epoch is. "shortest" ends with the first source that ends; "cycle" lasts as long as the
            longest and starts the others again, each time in a new order; "pad" lasts as long too, and has None in
            place of the batches of a source that has ended.

    Raises:
        DataError: there are no sources, or for "cycle" or "pad" one has no known length, or no batches.

    Examples:
        >>> import torch
        >>> from purestep.data import batches
        >>> pair = zip({"a": batches(torch.arange(4), 2, shuffle=False), "b": batches(torch.arange(2), 2)}, mode="pad")
        >>> pair.length(), list(pair.open(0, 1, None))
        (2, [{'a': tensor([2, 3]), 'b': None}])
    """
    if mode not in ("shortest", "cycle", "pad"):
        raise DataError(explain("zip has no such mode", where=f"mode={mode!r}", instead='"shortest", "cycle" or "pad"'))
    zipped = Zipped(sources, mode)
    if not zipped._members:
        raise DataError(explain("there is nothing to zip", where=f"sources: {sources!r}"))
    for path, member in builtins.zip(zipped._paths, zipped._members, strict=True):
        if mode != "shortest":
            _known(member.source, path, f'mode="{mode}" repeats or pads the shorter sources', positive=True)
    return zipped


class Concatenated:
    """Sources one after the other; see `concat`."""

    def __init__(self, sources: list[Source]) -> None:
        self._members = [_Member(source) for source in sources]

    def length(self) -> int | None:
        """Return the number of batches of all sources, or None where that of the last one is not known."""
        lengths = [member.source.length() for member in self._members]
        return None if any(n is None for n in lengths) else sum(n for n in lengths if n is not None)

    def open(self, epoch: int, batch: int, state: dict[str, Any] | Sequence[object] | None = None) -> Iterator[Any]:
        """Return an iterator over the batches of all sources from number `batch` on."""
        # Skip the sources that end before this batch; the last one may have no known length.
        first, offset = 0, batch
        while first < len(self._members) - 1 and offset >= (length := self._members[first].source.length() or 0):
            first, offset = first + 1, offset - length
        if isinstance(state, dict):  # of an older version, which kept the state of one source only
            state = [state["state"] if i == state["part"] and offset else None for i in range(len(self._members))]
        _set_states(self._members, state)
        return self._run(epoch, first, offset)

    def state(self) -> object:
        """Return the states of the sources."""
        return _states(self._members)

    def identity(self) -> dict[str, Any]:
        """Return the sources; a snapshot of a run records it."""
        return {"parts": [member.source for member in self._members]}

    def close(self) -> None:
        """Close the sources."""
        for member in self._members:
            close(member.source)

    def _run(self, epoch: int, first: int, offset: int) -> Iterator[Any]:
        for member in self._members[first:]:
            yield from member.open(epoch, offset)
            offset = 0


@checked(DataError)
def concat(*sources: Any) -> Source:
    """Read several sources one after the other in each epoch.

    Args:
        sources: sources, or anything `as_source` takes. All but the last have a known length.

    Raises:
        DataError: there are no sources, or one but the last is of unknown length.

    Examples:
        >>> list(concat([1, 2], [3]).open(0, 1, None))
        [2, 3]
    """
    if not sources:
        raise DataError(explain("there is nothing to concatenate", instead="concat(first, second)"))
    adapted = [as_source(source) for source in sources]
    for number, source in enumerate(adapted[:-1]):
        _known(source, f"sources[{number}]", "a position is counted across all sources", positive=False)
    return Concatenated(adapted)


class Taken:
    """The first batches of each epoch of a source; see `take`."""

    def __init__(self, source: Source, count: int) -> None:
        self._source, self._count = source, count

    def length(self) -> int | None:
        """Return the number of batches of an epoch."""
        length = self._source.length()
        return self._count if length is None else min(length, self._count)

    def open(self, epoch: int, batch: int, state: object = None) -> Iterator[Any]:
        """Return an iterator over the batches from number `batch` on."""
        if batch >= self._count:
            return iter(())
        # range comes first, so that zip never fetches the batch after the last.
        pairs = builtins.zip(range(batch, self._count), self._source.open(epoch, batch, state), strict=False)
        return (item for _, item in pairs)

    def state(self) -> object:
        """Return the state of the source."""
        return self._source.state()

    def identity(self) -> dict[str, Any]:
        """Return the source and the batches an epoch; a snapshot of a run records it."""
        return {"source": self._source, "count": self._count}

    def close(self) -> None:
        """Close the source."""
        close(self._source)


@checked(DataError)
def take(data: Any, n: int | float) -> Source:
    """Limit each epoch to its first `n` batches, or to a fraction of them. For `Batches` and `per_rank` it is their
    own `take`, under which each rank still reads its shard only.

    Args:
        data: a source, or anything `as_source` takes.
        n: an int counts batches, a float in [0, 1] is a fraction of the epoch, which needs a known length.

    Raises:
        DataError: `n` is negative, a float above 1, or a fraction of less than one batch or of an unknown length.

    Examples:
        >>> list(take([1, 2, 3], 2).open(0, 0, None))
        [1, 2]
    """
    source = as_source(data)
    if isinstance(source, (Batches, PerRank)):
        return source.take(n)
    length = source.length()
    if isinstance(n, float):
        length = _known(source, "data", f"{n} is a fraction of the length", positive=False)
    return Taken(source, limit(n, length if length is not None else 2**63 - 1))


class Stream:
    """The one endless epoch of a source, divided into epochs; see `stream`."""

    def __init__(self, source: Source, count: int) -> None:
        self._source, self._count = source, count

    def length(self) -> int:
        """Return the number of batches of an epoch."""
        return self._count

    def open(self, epoch: int, batch: int, state: object = None) -> Iterator[Any]:
        """Return an iterator over the batches of an epoch from number `batch` on."""
        if batch >= self._count:
            return iter(())
        # For the source there is one epoch, so its position counts through all epochs of the stream.
        opened = self._source.open(0, epoch * self._count + batch, state)
        return (item for _, item in builtins.zip(range(batch, self._count), opened, strict=False))

    def state(self) -> object:
        """Return the state of the source."""
        return self._source.state()

    def identity(self) -> dict[str, Any]:
        """Return the source and the batches an epoch; a snapshot of a run records it."""
        return {"source": self._source, "count": self._count}

    def close(self) -> None:
        """Close the source."""
        close(self._source)


@checked(DataError)
def stream(data: Any, n: int) -> Source:
    """Divide an endless source into epochs of `n` batches. Each epoch continues where the one before ended.

    Args:
        data: a source without an end, such as a grain loader with `num_epochs=None`.
        n: batches an epoch, 1 or more.

    Raises:
        DataError: `n` is not a whole number of 1 or more.

    Examples:
        >>> import itertools
        >>> numbers = stream(itertools.count, 3)
        >>> [list(numbers.open(epoch, 0, None)) for epoch in range(2)]
        [[0, 1, 2], [3, 4, 5]]
    """
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        raise DataError(
            explain("an epoch of a stream has 1 or more batches", where=f"n={n!r}", instead="stream(loader, 1000)")
        )
    return Stream(as_source(data), n)


def _side_by_side(iterators: list[Iterator[Any]], structure: Any) -> Iterator[Any]:
    # Not strict: under "shortest" the first iterator that ends is the end of the epoch.
    for items in builtins.zip(*iterators, strict=False):
        yield tree.unflatten(structure, items)


def _known(source: Source, path: str, why: str, *, positive: bool) -> int:
    length = source.length()
    if length is None or (positive and length == 0):
        shown = "unknown length" if length is None else "no batches"
        raise DataError(
            explain(
                f"a source of {shown} cannot be combined with others",
                where=path,
                why=why,
                instead="limit it first: ps.data.take(source, 1000)",
            )
        )
    return length


def _refuse_short(source: Source, count: int, length: int) -> NoReturn:
    raise DataError(
        explain(
            "a source ended before its length",
            where=f"data: {source!r}, after {count} of {length} batches",
            why='mode="cycle" computes its position from the length of each pass; a stream that was left in the middle '
            "of a pass may continue with the rest of it only",
            instead="ps.data.stream(source, n) of an endless source, or a source that starts each epoch at its begin",
        )
    )


def _set_states(members: list[_Member], states: Sequence[object] | None) -> None:
    for member, state in builtins.zip(members, [None] * len(members) if states is None else states, strict=True):
        member.next_state = state


def _states(members: list[_Member]) -> list[object] | None:
    states = [member.state() for member in members]
    return None if all(state is None for state in states) else states
