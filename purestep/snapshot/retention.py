"""Preservation policies: which snapshots stay on disk.

A policy is a frozen value that selects from (step, metrics) records; it never touches a file. `Store` asks it after a
new snapshot is durable, and deletes what it does not select.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Literal

from purestep.arguments import Name, checked
from purestep.errors import ConfigError, SnapshotError, explain

Record = tuple[int, Mapping[str, float]]
Mode = Literal["min", "max"]


@dataclass(frozen=True)
class Keep:
    """Base of the policies. `a | b` preserves what either preserves."""

    argument_hint: ClassVar[str] = "ps.snapshot.latest(3), ps.snapshot.best('val/loss') or ps.snapshot.all_()"

    def select(self, records: Sequence[Record]) -> set[int]:
        """Return the steps to preserve.

        Args:
            records: (step, metrics) of every snapshot, in order of step.
        """
        return {step for step, _ in records}

    def most(self) -> int | None:
        """Return how many snapshots it preserves at most, None when there is no bound. The newest comes on top."""
        return None

    def metrics(self) -> tuple[str, ...]:
        """Return the names of the metrics that it ranks by."""
        return ()

    def __or__(self, other: Keep) -> Keep:
        if not isinstance(other, Keep):
            return NotImplemented
        return Either((*_parts(self), *_parts(other)))


def _parts(keep: Keep) -> tuple[Keep, ...]:
    return keep.parts if isinstance(keep, Either) else (keep,)


@dataclass(frozen=True)
class Everything(Keep):
    """Preserves every snapshot."""

    def __repr__(self) -> str:
        return "all_()"


@dataclass(frozen=True)
class Latest(Keep):
    """Preserves the last `n`."""

    n: int

    def select(self, records: Sequence[Record]) -> set[int]:
        return {step for step, _ in records[-self.n :]}

    def most(self) -> int | None:
        return self.n

    def __repr__(self) -> str:
        return f"latest({self.n})"


@dataclass(frozen=True)
class Best(Keep):
    """Preserves the `n` with the best value of a metric."""

    metric: str
    n: int
    mode: Mode

    def select(self, records: Sequence[Record]) -> set[int]:
        return set(ranking(records, self.metric, self.mode)[: self.n])

    def most(self) -> int | None:
        return self.n

    def metrics(self) -> tuple[str, ...]:
        return (self.metric,)

    def __repr__(self) -> str:
        return f"best({self.metric!r}, {self.n}, {self.mode!r})"


@dataclass(frozen=True)
class EverySteps(Keep):
    """Preserves the steps that `n` divides."""

    n: int

    def select(self, records: Sequence[Record]) -> set[int]:
        return {step for step, _ in records if step % self.n == 0}

    def __repr__(self) -> str:
        return f"every_steps({self.n})"


@dataclass(frozen=True)
class Either(Keep):
    """Preserves what any of its parts preserves."""

    parts: tuple[Keep, ...]

    def select(self, records: Sequence[Record]) -> set[int]:
        return set().union(*(part.select(records) for part in self.parts))

    def most(self) -> int | None:
        counts = [part.most() for part in self.parts]
        return None if None in counts else sum(n for n in counts if n is not None)

    def metrics(self) -> tuple[str, ...]:
        return tuple(name for part in self.parts for name in part.metrics())

    def __repr__(self) -> str:
        return " | ".join(repr(part) for part in self.parts)


def ranking(records: Sequence[Record], metric: str, mode: Mode) -> list[int]:
    """Return the steps that have the metric, best first; of equal values the earlier step is better.

    A record without the metric, or with a NaN, is no candidate.

    Examples:
        >>> ranking([(1, {"loss": 0.5}), (2, {"loss": float("nan")}), (3, {}), (4, {"loss": 0.2})], "loss", "min")
        [4, 1]
    """
    # (value, step) sorts equal values by step, the earlier first; NaN would make the order depend on the input.
    sign = {"min": 1.0, "max": -1.0}[_checked_mode(mode)]
    candidates = [(sign * m[metric], step) for step, m in records if metric in m and not math.isnan(m[metric])]
    return [step for _, step in sorted(candidates)]


@checked(SnapshotError)
def all_() -> Keep:
    """Preserve every snapshot.

    Examples:
        >>> sorted(all_().select([(1, {}), (2, {})]))
        [1, 2]
    """
    return Everything()


@checked(SnapshotError)
def latest(n: int = 1) -> Keep:
    """Preserve the last `n` snapshots.

    Args:
        n: how many, at least 1.

    Raises:
        ConfigError: `n` is below 1.

    Examples:
        >>> sorted(latest(2).select([(1, {}), (2, {}), (3, {})]))
        [2, 3]
    """
    return Latest(_checked_count("latest", n))


@checked(SnapshotError)
def best(metric: Name, n: int = 1, mode: Mode = "min") -> Keep:
    """Preserve the `n` snapshots with the best value of a metric.

    A snapshot without that metric, or whose value is NaN, is never among them; of equal values the earlier is better.

    Args:
        metric: the name under which the value was saved.
        n: how many, at least 1.
        mode: "min" when smaller is better, "max" when larger is.

    Raises:
        ConfigError: `n` is below 1, or `mode` is neither "min" nor "max".

    Examples:
        >>> policy = best("val/loss", 1) | latest(1)
        >>> policy
        best('val/loss', 1, 'min') | latest(1)
        >>> sorted(policy.select([(1, {"val/loss": 0.1}), (2, {"val/loss": 0.3}), (3, {"val/loss": 0.2})]))
        [1, 3]
    """
    return Best(metric, _checked_count("best", n), _checked_mode(mode))


@checked(SnapshotError)
def every_steps(n: int) -> Keep:
    """Preserve the snapshots whose step is a multiple of `n`.

    Raises:
        ConfigError: `n` is below 1.

    Examples:
        >>> sorted(every_steps(10).select([(5, {}), (10, {}), (20, {})]))
        [10, 20]
    """
    return EverySteps(_checked_count("every_steps", n))


def _checked_count(name: str, n: int) -> int:
    if isinstance(n, bool) or not isinstance(n, int) or n < 1:
        what = f"{name}() preserves a whole number of snapshots, at least 1"
        raise ConfigError(explain(what, where=f"n = {n!r}", instead=f"{name}(..., n=1), or leave that policy out"))
    return n


def _checked_mode(mode: Mode) -> Mode:
    if mode not in ("min", "max"):
        raise ConfigError(explain("mode is neither 'min' nor 'max'", where=f"mode = {mode!r}", instead='mode="min"'))
    return mode
