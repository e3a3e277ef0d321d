"""The processes that write one store together, and how they come to one answer.

Each rank reports what it found; from the same reports every rank draws the same conclusion. Reports travel through a
function that the caller gives; in the background of a save, where that is not allowed, see `meeting`.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from purestep.errors import ConfigError, CorruptSnapshot, SnapshotError, TemplateMismatch, TreeError, explain
from purestep.snapshot.codec import JSON

_ERRORS: dict[str, type[Exception]] = {
    cls.__name__: cls for cls in (TemplateMismatch, CorruptSnapshot, SnapshotError, TreeError)
}


def _alone(value: JSON) -> list[JSON]:
    return [value]


@dataclass(frozen=True)
class Ranks:
    """The processes that call a `Store` together, with the same arguments and in the same order.

    Args:
        rank: number of this process, from 0.
        size: number of processes.
        exchange: given a small JSON value, returns those of all ranks in their order; every rank calls it at once. Only
            the thread that calls the store calls it.
        timeout: seconds that a save waits for the parts of other ranks.

    Raises:
        ConfigError: the rank is not one of `size`, or several ranks have no exchange.

    Example:
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
        """Return the answer of rank 0, which alone is asked, on every rank."""
        return self.exchange(answer() if self.rank == 0 else None)[0]

    def together(self, work: Callable[[], Any]) -> Any:
        """Do something on every rank, and return what it gave here; when it fails on one, it fails on all.

        Raises:
            TreeError, SnapshotError: the work raised it on some rank, which the message names.
        """
        result, error = None, None
        try:
            result = work()
        except Exception as caught:
            error = caught
        self.agree(error)
        return result

    def agree(self, error: Exception | None) -> None:
        """Raise on every rank what any of them met; nothing when none met anything."""
        reports = self.exchange(None if error is None else [type(error).__name__, str(error)])
        if error is not None and (self.size == 1 or all(report == reports[self.rank] for report in reports)):
            raise error
        met = [(rank, *report) for rank, report in enumerate(reports) if report is not None]
        if met:
            kinds = [kind for _, kind, _ in met]
            cls = next((_ERRORS[name] for name in _ERRORS if name in kinds), SnapshotError)
            raise cls("\n".join(f"rank {rank}: {text}" for rank, _, text in met)) from error
