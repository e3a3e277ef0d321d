"""`LocalBatch`: one rank's rows of a global batch, and the arithmetic of which rows those are.

Owns the cut of a batch into microbatches. It reads no data and knows no process group: loaders cut with it what they
read, steps cut with it what they are given.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence
from typing import Any, Protocol, Self, TypeVar, cast

import numpy as np
import torch

from purestep import tree
from purestep.arguments import checked
from purestep.errors import ConfigError, StepError, explain
from purestep.tree import pytree, static

T = TypeVar("T")


MOST_MICROBATCHES = 2**16  # each costs a call, the empty ones of a small batch too


class Shares(Protocol):
    """What is asked of a plan here: which of V microbatches this rank computes."""

    def microbatches(self, count: int, /) -> tuple[int, ...]: ...


def microbatch_sizes(samples: int, parts: int) -> list[int]:
    """Return the sizes of the microbatches: equal, or with the first ones larger by one sample.

    Examples:
        >>> microbatch_sizes(10, 4)
        [3, 3, 2, 2]
    """
    base, rest = divmod(samples, parts)
    return [base + (i < rest) for i in range(parts)]


@functools.lru_cache(maxsize=256)
def rows(samples: int, parts: int, indices: tuple[int, ...]) -> np.ndarray:
    """Return the rows of a global batch that make up some of its microbatches, in their order: int64[n].

    Where all of them are empty (a batch of fewer samples than microbatches), the rows of microbatch 0 stand in, because
    a rank that shares gathered parameters has to run the model in any case. `LocalBatch.pieces` does not count them.

    Args:
        samples: of the global batch, 1 or more.
        parts: number of microbatches.
        indices: which of them.

    Examples:
        >>> rows(10, 4, (1, 3)).tolist()
        [3, 4, 5, 8, 9]
        >>> rows(2, 4, (3,)).tolist()
        [0]
    """
    sizes = microbatch_sizes(samples, parts)
    chosen = indices if any(sizes[i] for i in indices) else (0,)
    starts = np.concatenate([[0], np.cumsum(sizes)])
    numbers = np.concatenate([np.arange(starts[i], starts[i + 1], dtype=np.int64) for i in chosen])
    numbers.flags.writeable = False  # it is kept, and the next caller gets the same array
    return numbers


@pytree
class LocalBatch:
    """The rows of a global batch that one rank computes, in the order of its microbatches.

    A step with a plan takes it in place of the global batch. `local_batch` cuts one; the loaders of a run read nothing
    else.

    Attributes:
        data: pytree like the batch, with this rank's rows as dim 0; leaves without dims are whole.
        samples: number of samples of the global batch.
        microbatches: number of microbatches that the global batch is cut into.
    """

    data: Any
    samples: int = static()
    microbatches: int = static()

    def pieces(self, indices: Sequence[int]) -> list[tuple[int, Any, int]]:
        """Cut the rows into microbatches: `(index, data, samples)` of each that is not empty.

        Args:
            indices: the microbatches that this rank computes, `plan.microbatches(V)`.

        Examples:
            >>> local = LocalBatch(torch.arange(5), samples=10, microbatches=4)
            >>> [(index, data.tolist(), size) for index, data, size in local.pieces((0, 3))]
            [(0, [0, 1, 2], 3), (3, [3, 4], 2)]
        """
        sizes = microbatch_sizes(self.samples, self.microbatches)
        cut, start = [], 0
        for index in indices:
            if sizes[index]:
                cut.append((index, piece(self.data, start, start + sizes[index]), sizes[index]))
                start += sizes[index]
        return cut

    def spare(self, indices: Sequence[int]) -> Any:
        """Return a microbatch to run the model on and throw away, for a rank that has fewer of them than the others."""
        sizes = microbatch_sizes(self.samples, self.microbatches)
        first = next((i for i in indices if sizes[i]), 0)
        return piece(self.data, 0, sizes[first])

    def replace(self, **changes: object) -> Self:
        """Return the same with other fields."""
        values = {"data": self.data, "samples": self.samples, "microbatches": self.microbatches}
        return type(self)(**values | changes)


@checked(ConfigError, failed=True)
def local_batch(batch: object, plan: Shares, microbatches: int) -> LocalBatch:
    """Cut this rank's rows from a global batch.

    Args:
        batch: pytree of tensors with the same size of dim 0, the same on every rank. Leaves without dims go to all. A
            `LocalBatch` is returned as it is.
        plan: says which microbatches this rank computes.
        microbatches: number of microbatches of the whole batch.

    Raises:
        StepError: leaves differ in their number of samples, or a `LocalBatch` was cut for another number of
            microbatches.

    Examples:
        >>> class Second:
        ...     def microbatches(self, count):
        ...         return tuple(range(count // 2, count))
        >>> local_batch({"x": torch.arange(7)}, Second(), 4)
        LocalBatch(data={'x': tensor([4, 5, 6])}, samples=7, microbatches=4)
    """
    if isinstance(batch, LocalBatch):
        if batch.microbatches != microbatches:
            raise StepError(
                explain(
                    "a LocalBatch was cut for another number of microbatches",
                    where=f"LocalBatch: {batch.microbatches} microbatches, step: {microbatches}",
                    instead=f"local_batch(batch, plan, {microbatches})",
                )
            )
        return batch
    if not callable(getattr(plan, "microbatches", None)) or not 1 <= microbatches <= MOST_MICROBATCHES:
        what = f"local_batch needs a plan, and from 1 to {MOST_MICROBATCHES} microbatches"
        raise ConfigError(explain(what, where=f"plan={plan!r:.80}, microbatches={microbatches!r}"))
    samples = check_samples(batch, microbatches)
    indices = plan.microbatches(microbatches)
    if len(indices) == microbatches:
        return LocalBatch(batch, samples, microbatches)
    return LocalBatch(take_rows(batch, rows(samples, microbatches, tuple(indices))), samples, microbatches)


def check_samples(batch: object, parts: int) -> int:
    """Return the number of samples of a batch that is to be cut; one without leaves counts as one sample.

    Raises:
        StepError: leaves differ in it, or none has dims.
    """
    leaves = tree.leaves(batch)
    counts = [int(leaf.shape[0]) if getattr(leaf, "ndim", 0) else None for leaf in leaves]
    known = [n for n in counts if n is not None]
    if not leaves:
        return 1
    if known and len(set(known)) == 1:
        return known[0]
    shown = [f"{p}: {tree.describe(x)}" for p, x in zip(tree.paths(batch, "batch"), leaves, strict=True)]
    if not known:
        raise StepError(explain("the batch has no tensor with dims, so it cannot be cut", where=", ".join(shown[:5])))
    uneven = [text for text, n in zip(shown, counts, strict=True) if n not in (None, known[0])]
    raise StepError(
        explain(
            f"the leaves of a batch differ in their number of samples, so it cannot be cut into {parts} parts",
            where=f"{', '.join(uneven[:5])}; the first leaf has {known[0]}",
            instead="give every tensor of the batch the samples as dim 0, or make shared values 0-d",
        )
    )


def piece(batch: T, start: int, stop: int) -> T:
    """Return some rows of every leaf that has dims, each at an aligned address.

    The bits of a matrix product depend on where its operands lie (modulo 16 bytes, seen in `linear` on CPUs); whether a
    microbatch is a part of a larger tensor or one of its own must not show.
    """
    return tree.map(lambda x: aligned(x[start:stop]) if getattr(x, "ndim", 0) else x, batch)


def aligned(leaf: T) -> T:
    """Return a tensor whose first element lies at a multiple of 64 bytes of its storage: itself, or a copy."""
    if (
        type(leaf) is torch.Tensor
        and (tensor := cast(torch.Tensor, leaf)).storage_offset() * tensor.element_size() % 64
    ):
        return cast(T, tensor.clone())
    return leaf


def take_rows(batch: T, numbers: np.ndarray) -> T:
    """Return rows of every leaf that has dims, in ascending runs; cut and joined, they keep their memory format."""
    breaks = np.flatnonzero(np.diff(numbers) != 1) + 1
    runs = [slice(int(run[0]), int(run[-1]) + 1) for run in np.split(numbers, breaks)]

    def take(leaf: Any) -> Any:
        if not getattr(leaf, "ndim", 0):
            return leaf
        pieces = [leaf[run] for run in runs]
        if len(pieces) == 1:
            return pieces[0]
        return torch.cat(pieces) if isinstance(leaf, torch.Tensor) else np.concatenate(pieces)

    return tree.map(take, batch)
