"""The types of a fault: `Fault`, the `Trial` that it works with, and `Lanes` for repeated faults in a run."""

from __future__ import annotations

import contextlib
import dataclasses
import random
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from purestep.testing import phases
from purestep.testing.lane import Lane, Outcome, Straight

_TRIES = 4  # processes within which a phase must occur; the last process of a run may lack it


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        name: name in the table.
        times: least number of injections.
        inject: injects the fault in a trial.
        needs_workers: whether the job must have worker processes.
        logged: whether `metrics.csv` must equal that of the undisturbed run.
        why_not: returns why the fault cannot be injected on this machine; "" if it can.
    """

    name: str
    times: int
    inject: Callable[[Trial], None]
    needs_workers: bool = False
    logged: bool = True
    why_not: Callable[[], str] = lambda: ""


@dataclasses.dataclass
class Trial:
    """The context in which a fault is injected.

    Attributes:
        lane: makes a new lane.
        base: the undisturbed run.
        seed: seed of the random moments.
        times: number of injections.
        stack: cleanup at the end of the fault.
        reached: number of phases of a save in which the fault was injected, and of all phases.
    """

    lane: Callable[[], Lane]
    base: Straight
    seed: int
    times: int
    stack: contextlib.ExitStack
    reached: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        self.draw = random.Random(self.seed)  # each fault draws its own moments

    def batches(self) -> Iterator[int]:
        """Yield random moments of the run, in batches; one for each time."""
        return (self.draw.randint(1, self.base.batches) for _ in range(self.times))


class Lanes:
    """Lanes with up to `strikes` faults each before their run is complete; then they finish undisturbed."""

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
        """Whether there are no failures."""
        return not any(lane.problems for lane in self._all)

    @property
    def _all(self) -> list[Lane]:
        return [*self.done, *([] if self.lane is None else [self.lane])]

    def next(self) -> Lane:
        """Return the lane for the next fault."""
        if self.lane is not None and (self.lane.complete or self.lane.injected >= self.strikes):
            self.end()
        if self.lane is None:
            self.lane = self.trial.lane()
        return self.lane

    def end(self) -> None:
        """Let the current lane finish."""
        if self.lane is not None:
            self.lane.end()
            self.done.append(self.lane)
            self.lane = None


Strike = Callable[[Lane, Mapping[str, Any]], Outcome]


def in_each_phase(trial: Trial, names: Sequence[str], sides: Sequence[str], strike: Strike, *, strikes: int) -> None:
    """Inject a fault before or after each of the phases at least once, then at random ones up to `trial.times`.

    Args:
        trial: the trial of the fault.
        names: names of the phases.
        sides: "before", "after", or both.
        strike: runs a process of a lane with a fault that waits for a trigger, the second argument.
        strikes: number of faults after which a lane may finish.
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
    """Return the names of the stages of a save for triggers."""
    return list(dict.fromkeys(f"stage {phases.coarse(name)}" for name in base.save_phases))
