"""The processes that write one store together, and how they get the same results and errors.

Each rank sends its result to all; from the same results every rank computes the same answer. The caller passes the
function that exchanges them; the background thread of a save may not call it, and uses the files of `rank_messages`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TypeVar

from purestep.errors import ConfigError, CorruptSnapshot, SnapshotError, TemplateMismatch, TreeError, explain
from purestep.snapshot.codec import JSON

T = TypeVar("T")
_ERRORS: dict[str, type[Exception]] = {
    cls.__name__: cls for cls in (TemplateMismatch, CorruptSnapshot, SnapshotError, TreeError, ConfigError)
}


def _alone(value: JSON) -> list[JSON]:
    return [value]


@dataclass(frozen=True)
class Ranks:
    """The processes that call a `Store` together, with the same arguments and in the same order.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        exchange: returns the JSON values that all ranks have passed to it, in order of the ranks; a collective: every
            rank calls it. It is called only in the thread that calls the store.
        timeout: seconds that a save waits for the shards of other ranks.

    Raises:
        ConfigError: the rank is not one of `size`, or several ranks have no exchange.

    Examples:
        >>> Ranks()
        Ranks(rank=0, size=1, timeout=600.0)
    """

    rank: int = 0
    size: int = 1
    exchange: Callable[[JSON], list[JSON]] = field(default=_alone, repr=False)
    timeout: float = 600.0

    def __post_init__(self) -> None:
        if not 0 <= self.rank < self.size or (self.size > 1 and self.exchange is _alone):
            what = "ranks are numbered from 0, and exchange values when there are several"
            instead = "Ranks(world.rank(), world.size(), world.gather)"
            raise ConfigError(explain(what, where=repr(self), instead=instead))

    def from_first(self, answer: Callable[[], JSON]) -> JSON:
        """Call a function on rank 0 only, and return its result on every rank."""
        return self.exchange(answer() if self.rank == 0 else None)[0]

    def together(self, work: Callable[[], T]) -> T:
        """Call a function on every rank, and return its result of this rank; if it fails on one, it fails on all.

        Raises:
            TreeError, SnapshotError: the function raised it on some rank, which the message names.
        """
        try:
            result = work()
        except Exception as error:
            self.raise_everywhere(error)
            raise
        self.raise_everywhere(None)
        return result

    def raise_everywhere(self, error: Exception | None) -> None:
        """Raise the error of any rank on every rank. Every rank calls it; without an error it returns."""
        reports = self.exchange(None if error is None else [type(error).__name__, str(error)])
        if error is not None and (self.size == 1 or all(report == reports[self.rank] for report in reports)):
            raise error
        failed = [(rank, *report) for rank, report in enumerate(reports) if report is not None]
        if failed:
            kinds = [kind for _, kind, _ in failed]
            cls = next((_ERRORS[name] for name in _ERRORS if name in kinds), SnapshotError)
            raise cls("\n".join(f"rank {rank}: {text}" for rank, _, text in failed)) from error
