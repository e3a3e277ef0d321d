"""Sources made of sources: side by side, one after the other, shortened, or cut from an endless one.

Owns `zip`, `concat`, `take` and `stream`. Each is again a source, resumes wherever its parts do, and holds no position
of its own.
"""

from __future__ import annotations

import builtins
import itertools
from collections.abc import Iterator
from typing import Any, Literal

from purestep import tree
from purestep.arguments import checked
from purestep.data.batches import Batches, limit
from purestep.data.source import Source, as_source
from purestep.errors import DataError, explain

Mode = Literal["shortest", "cycle", "pad"]


class _Part:
    """A source within another one, with the state that it has to be opened with next; None once it was."""

    def __init__(self, source: Source) -> None:
        self.source = source
        self.held: Any = None

    def open(self, epoch: int, batch: int) -> Iterator[Any]:
        """Open it with the state that is held. Where the length is known, nothing is read past the last batch: how a
        source leaves its epoch is its own affair."""
        held, self.held = self.held, None
        batches = self.source.open(epoch, batch, held)
        length = self.source.length()
        return batches if length is None else itertools.islice(batches, max(length - batch, 0))

    def state(self) -> Any:
        return self.source.state() if self.held is None else self.held


class Zipped:
    """Sources side by side; see `zip`."""

    def __init__(self, parts: Any, mode: Mode) -> None:
        leaves, self._structure = tree.flatten(parts)
        self._parts = [_Part(as_source(leaf)) for leaf in leaves]
        self._mode = mode
        self._paths = tree.paths(parts, "parts")

    def length(self) -> int | None:
        """Return the number of batches of an epoch."""
        lengths = [part.source.length() for part in self._parts]
        known = [n for n in lengths if n is not None]
        if len(known) < len(lengths):
            return None
        return min(known) if self._mode == "shortest" else max(known)

    def open(self, epoch: int, batch: int, state: Any = None) -> Iterator[Any]:
        """Return an iterator over trees of batches."""
        _hold(self._parts, state)
        if self._mode == "shortest":
            return _side_by_side([part.open(epoch, batch) for part in self._parts], self._structure)
        lengths = [n for n in (part.source.length() for part in self._parts) if n is not None]
        columns = [
            self._column(part, epoch, batch, length, max(lengths))
            for part, length in builtins.zip(self._parts, lengths, strict=True)
        ]
        return _side_by_side(columns, self._structure)

    def state(self) -> Any:
        """Return the states of the parts."""
        return _states(self._parts)

    def identity(self) -> dict[str, Any]:
        """Return the parts and how they are zipped; a snapshot of a run records it."""
        return {
            "parts": dict(builtins.zip(self._paths, (part.source for part in self._parts), strict=True)),
            "mode": self._mode,
        }

    def close(self) -> None:
        """Close the parts."""
        for part in self._parts:
            _close(part.source)

    def _column(self, part: _Part, epoch: int, batch: int, length: int, longest: int) -> Iterator[Any]:
        if self._mode == "pad":
            if batch < length:
                yield from part.open(epoch, batch)
            for _ in range(max(batch, length), longest):
                yield None
            return
        # Each pass over a shorter source is an epoch of its own, so that it is shuffled anew.
        passes = -(-longest // length)
        position = batch
        while position < longest:
            turn, offset = divmod(position, length)
            for item in part.open(epoch * passes + turn, offset):
                yield item
                position += 1
                if position == longest:
                    return
            if position % length:
                _refuse_short(part.source, position % length, length)


@checked(DataError)
def zip(parts: Any, *, mode: Mode = "shortest") -> Source:
    """Read several sources side by side: each batch is a tree of their batches.

    Args:
        parts: pytree whose leaves are sources, or anything `as_source` takes (lists are nodes of the tree).
        mode: how long an epoch is. "shortest" ends with the first source that ends; "cycle" lasts as long as the
            longest and starts the others again, each time in a new order; "pad" as well, and gives None where one has
            ended.

    Raises:
        DataError: there are no parts, or "cycle" or "pad" meets a source of unknown or no length.

    Example:
        >>> import torch
        >>> from purestep.data import batches
        >>> pair = zip({"a": batches(torch.arange(4), 2, shuffle=False), "b": batches(torch.arange(2), 2)}, mode="pad")
        >>> pair.length(), list(pair.open(0, 1, None))
        (2, [{'a': tensor([2, 3]), 'b': None}])
    """
    if mode not in ("shortest", "cycle", "pad"):
        raise DataError(explain("zip has no such mode", where=f"mode={mode!r}", instead='"shortest", "cycle" or "pad"'))
    zipped = Zipped(parts, mode)
    if not zipped._parts:
        raise DataError(explain("there is nothing to zip", where=f"parts: {parts!r}"))
    for path, part in builtins.zip(zipped._paths, zipped._parts, strict=True):
        if mode != "shortest":
            _known(part.source, path, f'mode="{mode}" repeats or pads the shorter sources', positive=True)
    return zipped


class Concatenated:
    """Sources one after the other; see `concat`."""

    def __init__(self, parts: list[Source]) -> None:
        self._parts = [_Part(part) for part in parts]

    def length(self) -> int | None:
        """Return the number of batches of all parts, or None where the last one's is not known."""
        lengths = [part.source.length() for part in self._parts]
        return None if any(n is None for n in lengths) else sum(n for n in lengths if n is not None)

    def open(self, epoch: int, batch: int, state: Any = None) -> Iterator[Any]:
        """Return an iterator over the batches of all parts from number `batch` on."""
        first, offset = 0, batch
        while first < len(self._parts) - 1 and offset >= (length := self._parts[first].source.length() or 0):
            first, offset = first + 1, offset - length
        if isinstance(state, dict):  # of an older version, which kept the state of one part only
            state = [state["state"] if i == state["part"] and offset else None for i in range(len(self._parts))]
        _hold(self._parts, state)
        return self._run(epoch, first, offset)

    def state(self) -> Any:
        """Return the states of the parts."""
        return _states(self._parts)

    def identity(self) -> dict[str, Any]:
        """Return the parts; a snapshot of a run records it."""
        return {"parts": [part.source for part in self._parts]}

    def close(self) -> None:
        """Close the parts."""
        for part in self._parts:
            _close(part.source)

    def _run(self, epoch: int, first: int, offset: int) -> Iterator[Any]:
        for part in self._parts[first:]:
            yield from part.open(epoch, offset)
            offset = 0


@checked(DataError)
def concat(*parts: Any) -> Source:
    """Read several sources one after the other in each epoch.

    Args:
        parts: sources, or anything `as_source` takes.

    Raises:
        DataError: there are no parts, or one but the last is of unknown length.

    Example:
        >>> list(concat([1, 2], [3]).open(0, 1, None))
        [2, 3]
    """
    if not parts:
        raise DataError(explain("there is nothing to concatenate", instead="concat(first, second)"))
    sources = [as_source(part) for part in parts]
    for number, source in enumerate(sources[:-1]):
        _known(source, f"parts[{number}]", "a position is counted across all parts", positive=False)
    return Concatenated(sources)


class Taken:
    """The first batches of each epoch of a source; see `take`."""

    def __init__(self, source: Source, count: int) -> None:
        self._source, self._count = source, count

    def length(self) -> int | None:
        """Return the number of batches of an epoch."""
        length = self._source.length()
        return self._count if length is None else min(length, self._count)

    def open(self, epoch: int, batch: int, state: Any = None) -> Iterator[Any]:
        """Return an iterator over the batches from number `batch` on."""
        if batch >= self._count:
            return iter(())
        # range comes first, so that the batch after the last is never fetched.
        pairs = builtins.zip(range(batch, self._count), self._source.open(epoch, batch, state), strict=False)
        return (item for _, item in pairs)

    def state(self) -> Any:
        """Return the state of the source."""
        return self._source.state()

    def identity(self) -> dict[str, Any]:
        """Return the source and the batches an epoch; a snapshot of a run records it."""
        return {"source": self._source, "count": self._count}

    def close(self) -> None:
        """Close the source."""
        _close(self._source)


@checked(DataError)
def take(data: Any, n: int | float) -> Source:
    """Limit each epoch to its first `n` batches, or to a fraction of them. For `Batches` it is their `take`.

    Args:
        data: a source, or anything `as_source` takes.
        n: an int counts batches, a float in [0, 1] is a share, which needs a known length.

    Example:
        >>> list(take([1, 2, 3], 2).open(0, 0, None))
        [1, 2]
    """
    source = as_source(data)
    if isinstance(source, Batches):
        return source.take(n)
    length = source.length()
    if isinstance(n, float):
        length = _known(source, "data", f"{n} is a share of the length", positive=False)
    return Taken(source, limit(n, length if length is not None else 2**63 - 1))


class Stream:
    """Epochs cut from the one endless epoch of a source; see `stream`."""

    def __init__(self, source: Source, count: int) -> None:
        self._source, self._count = source, count

    def length(self) -> int:
        """Return the number of batches of an epoch."""
        return self._count

    def open(self, epoch: int, batch: int, state: Any = None) -> Iterator[Any]:
        """Return an iterator over the batches of an epoch from number `batch` on."""
        if batch >= self._count:
            return iter(())
        opened = self._source.open(0, epoch * self._count + batch, state)
        return (item for _, item in builtins.zip(range(batch, self._count), opened, strict=False))

    def state(self) -> Any:
        """Return the state of the source."""
        return self._source.state()

    def identity(self) -> dict[str, Any]:
        """Return the source and the batches an epoch; a snapshot of a run records it."""
        return {"source": self._source, "count": self._count}

    def close(self) -> None:
        """Close the source."""
        _close(self._source)


@checked(DataError)
def stream(data: Any, n: int) -> Source:
    """Call every `n` batches of an endless source an epoch. Each epoch goes on where the one before ended.

    Args:
        data: a source without an end, such as a grain loader with `num_epochs=None`.
        n: batches an epoch, 1 or more.

    Example:
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
    for items in builtins.zip(*iterators, strict=False):
        yield tree.unflatten(structure, items)


def _known(source: Source, path: str, why: str, *, positive: bool) -> int:
    length = source.length()
    if length is None or (positive and length == 0):
        shown = "unknown length" if length is None else "no batches"
        raise DataError(
            explain(
                f"a source of {shown} does not fit here",
                where=path,
                why=why,
                instead="limit it first: ps.data.take(source, 1000)",
            )
        )
    return length


def _refuse_short(source: Source, given: int, length: int) -> None:
    raise DataError(
        explain(
            "a source ended before its length",
            where=f"data: {source!r}, after {given} of {length} batches",
            why='mode="cycle" finds its place by the length of each pass; a stream that was left in the middle of one '
            "may give the rest of it only",
            instead="ps.data.stream(source, n) of an endless source, or a source that begins anew each time",
        )
    )


def _hold(parts: list[_Part], states: list[Any] | None) -> None:
    for part, state in builtins.zip(parts, [None] * len(parts) if states is None else states, strict=True):
        part.held = state


def _states(parts: list[_Part]) -> list[Any] | None:
    states = [part.state() for part in parts]
    return None if all(state is None for state in states) else states


def _close(source: Source) -> None:
    close = getattr(source, "close", None)
    if close is not None:
        close()
