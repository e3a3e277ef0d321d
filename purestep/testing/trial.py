"""What a fault is, what it gets to work with, and lanes that are struck again and again until their run is complete."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from purestep.testing import phases
from purestep.testing.lane import Lane, Outcome, Straight

_TRIES = 4  # processes in which a phase has to come up; only the last of a run may lack it


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        name: in the table.
        times: how often it is injected at least.
        inject: what is done.
        needs_workers: whether the job has to have worker processes.
        logged: whether `metrics.csv` has to be that of the undisturbed run.
        why_not: says why it cannot be injected on this machine; "" where it can.
    """

    name: str
    times: int
    inject: Callable[[Trial], None]
    needs_workers: bool = False
    logged: bool = True
    why_not: Callable[[], str] = lambda: ""


@dataclasses.dataclass
class Trial:
    """What a fault gets: new lanes, the undisturbed run, how often to strike, and where to say what it reached.

    Attributes:
        lane: makes a new lane.
        base: the undisturbed run.
        seed: of the random moments.
        times: how often to strike.
        stack: what is undone when the fault is done with.
        reached: phases of a save that were struck, and those there are.
    """

    lane: Callable[[], Lane]
    base: Straight
    seed: int
    times: int
    stack: contextlib.ExitStack
    reached: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)  # every fault has moments of its own

    def batches(self) -> Iterator[int]:
        """Yield random moments of the run, in batches; one for each time."""
        return (self.draw.randint(1, self.base.batches) for _ in range(self.times))


class Lanes:
    """Lanes that are struck until their run is complete, or often enough; then they finish undisturbed."""

    def __init__(self, trial: Trial, *, strikes: int) -> None:
        self.trial, self.strikes = trial, strikes
        self.done: list[Lane] = []
        self.lane: Lane | None = None

    @property
    def struck(self) -> int:
        """Faults so far."""
        return sum(lane.injected for lane in self._all)

    @property
    def well(self) -> bool:
        """Whether nothing has gone wrong."""
        return not any(lane.problems for lane in self._all)

    @property
    def _all(self) -> list[Lane]:
        return [*self.done, *([] if self.lane is None else [self.lane])]

    def next(self) -> Lane:
        """Return the lane to strike."""
        if self.lane is not None and (self.lane.complete or self.lane.injected >= self.strikes):
            self.end()
        if self.lane is None:
            self.lane = self.trial.lane()
        return self.lane

    def end(self) -> None:
        """Let the present lane finish."""
        if self.lane is not None:
            self.lane.end()
            self.done.append(self.lane)
            self.lane = None


Strike = Callable[[Lane, Mapping[str, Any]], Outcome]


def in_each_phase(trial: Trial, names: Sequence[str], sides: Sequence[str], strike: Strike, *, strikes: int) -> None:
    """Strike before or after each of some phases, once at least, and then at random ones until it is often enough.

    Args:
        trial: of the fault.
        names: of the phases.
        sides: "before", "after", or both.
        strike: runs a process of a lane with a fault that waits for a trigger, the second argument.
        strikes: after how many a lane may finish.
    """
    every = [(name, side) for name in names for side in sides]
    waiting, tries, lanes = deque(every), 0, Lanes(trial, strikes=strikes)
    while lanes.well and (waiting or lanes.struck < trial.times):
        name, side = waiting[0] if waiting else trial.draw.choice(every)
        lane, at = lanes.next(), 1 if waiting else trial.draw.randint(1, 2)
        if strike(lane, {"on": side, "phase": name, "at": at, "run_dir": str(lane.run_dir)}).values("injected"):
            tries = 0
            if waiting:
                waiting.popleft()
        elif (tries := tries + 1) == _TRIES:
            lane.problems.append(f"in {_TRIES} processes there was no moment {side} {name!r}")
    lanes.end()
    trial.reached = len(every) - len(waiting), len(every)


def stages(base: Straight) -> list[str]:
    """Return the stages of a save, as triggers know them."""
    return list(dict.fromkeys(f"stage {phases.coarse(name)}" for name in base.save_phases))
