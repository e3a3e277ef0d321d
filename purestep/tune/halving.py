"""Successive halving: where runs stop to be compared, which go on, and the file that remembers it."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

from purestep.errors import ConfigError, explain
from purestep.loggers.base import write_atomically
from purestep.loop.cadence import Until, UntilEpochs, UntilSteps, epochs, steps
from purestep.record.summary import is_run
from purestep.tune.grid import Member

LEDGER = (
    "sweep.json"  # in the root: which runs went on after each rung, so that a resumed sweep decides it no other way
)


@dataclasses.dataclass(frozen=True)
class Halving:
    """Successive halving: at each end but the last, only the best runs go on.

    Attributes:
        factor: one of so many goes on.
        ends: where the runs stop to be compared, the last where they end.
        metric: by which.
        mode: whether "min" or "max" is better.
    """

    factor: int
    ends: tuple[Until, ...]
    metric: str
    mode: Literal["min", "max"]

    def best(self, values: Mapping[str, float]) -> list[str]:
        """Return the names of those that go on, the best first; one that is not finite is behind all that are.

        Examples:
            >>> halving = Halving(3, (), "loss", "min")
            >>> halving.best({"a": 0.3, "b": float("nan"), "c": 0.1, "d": 0.2})
            ['c', 'd']
        """
        sign = 1.0 if self.mode == "min" else -1.0
        order = sorted(values, key=lambda name: sign * values[name] if math.isfinite(values[name]) else math.inf)
        return order[: -(-len(order) // self.factor)]


def rungs(end: Until | None, members: int, factor: int) -> tuple[Until, ...]:
    """Return the ends of successive halving: the last is `end`, each before it has one `factor`-th of the budget.

    Raises:
        ConfigError: `end` is not in steps or epochs, or has too few of them.

    Examples:
        >>> [str(end) for end in rungs(epochs(9), members=9, factor=3)]
        ['1 epochs', '3 epochs', '9 epochs']
    """
    if not isinstance(end, (UntilEpochs, UntilSteps)):
        raise ConfigError(
            explain(
                "halving divides the length of a run, which is a number of steps or of epochs",
                where=f"until={end}",
                instead="ps.tune.sweep(..., until=ps.epochs(9), halving=3)",
            )
        )
    count = 0
    while members > 1:
        members, count = -(-members // factor), count + 1
    make = epochs if isinstance(end, UntilEpochs) else steps
    lengths = [-(-end.n // factor**power) for power in range(count, -1, -1)]
    if len(set(lengths)) < len(lengths):
        raise ConfigError(
            explain(
                "the runs are too short for so many rungs",
                where=f"until={end}, halving={factor}: rungs at {', '.join(map(str, lengths))}",
                instead=f"until=ps.{make.__name__}({factor**count}), or halving={factor + 1}",
            )
        )
    return tuple(make(length) for length in lengths)


class Ledger:
    """What was decided at each rung, in a file of the root."""

    def __init__(self, root: Path, members: Sequence[Member], halving: Halving) -> None:
        self.path = root / LEDGER
        asked = {
            "members": [member.name for member in members],
            "ends": [str(end) for end in halving.ends],
            "factor": halving.factor,
            "metric": halving.metric,
            "mode": halving.mode,
        }
        self.told: dict[str, Any] = {**asked, "rungs": []}
        if not self.path.exists():
            trained = [member.name for member in members if is_run(member.run_dir)]
            if trained:
                raise ConfigError(
                    explain(
                        "this directory holds runs that were not stopped at the rungs",
                        where=f"{root}: {', '.join(trained[:5])}",
                        why="runs are compared after the same part of their length",
                        instead="another root",
                    )
                )
            self._save()
            return
        try:
            told = json.loads(self.path.read_text())
        except ValueError as error:
            raise ConfigError(explain("the record of a sweep cannot be read", where=str(self.path))) from error
        changed = [name for name, value in asked.items() if told.get(name) != value]
        if changed:
            raise ConfigError(
                explain(
                    "this directory holds another sweep",
                    where=f"{self.path}: another {', '.join(changed)}",
                    why="which runs went on was decided among those of that sweep",
                    instead="another root, or the same arguments",
                )
            )
        self.told = told

    def kept(self, number: int) -> list[str] | None:
        rungs = self.told["rungs"]
        return list(rungs[number]["kept"]) if number < len(rungs) else None

    def write(self, number: int, values: Mapping[str, float], kept: Sequence[str]) -> None:
        shown = {name: value if math.isfinite(value) else str(value) for name, value in values.items()}
        self.told["rungs"].append({"end": self.told["ends"][number], "values": shown, "kept": list(kept)})
        self._save()

    def _save(self) -> None:
        self.path.parent.mkdir(parents=True, exist_ok=True)
        write_atomically(self.path, json.dumps(self.told, indent=1))
