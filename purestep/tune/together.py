"""`Together`: which runs of a sweep train in one mapped step, and which in turn, and why."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from collections.abc import Callable, Sequence

from purestep.loop.cadence import Until
from purestep.loop.result import Result
from purestep.loop.run import Run
from purestep.record.experiment import Experiment
from purestep.tune.grid import Member
from purestep.tune.perform import TrainAll
from purestep.tune.table import INTERRUPTED, Sweep
from purestep.tune.vmapped import groups_of, train_together

VMAPPED = "vmapped"


class Together:
    """Which runs of a sweep train together, and how. All of them count, whichever are done already.

    Args:
        members: of the sweep.
        make: the experiment of a member.
        start: its run, from its experiment, until an end (None: that of the experiment).
    """

    def __init__(
        self,
        members: Sequence[Member],
        make: Callable[[Member], Experiment],
        start: Callable[[Member, Experiment, Until | None], Run],
    ) -> None:
        self._start = start
        self._made: dict[str, Experiment] = {}
        for member in members:
            with contextlib.suppress(Exception):  # its run says what is wrong
                self._made[member.name] = make(member)
        self._groups = groups_of(self._made)

    def how(self, member: Member) -> str:
        """Say how a run trains."""
        if any(member.name in group for group in self._groups.together):
            return VMAPPED
        return f"in turn: {self._groups.alone.get(member.name, 'it could not be made')}"

    def turns(self, todo: Sequence[Member]) -> list[list[Member]]:
        """Return the runs in the order in which they train: those of a group at once."""
        groups = [[member for member in todo if member.name in group] for group in self._groups.together]
        return [*filter(None, groups), *([member] for member in todo if self.how(member) != VMAPPED)]

    def train(self, turn: Sequence[Member], rung: Sequence[Member], until: Until | None) -> list[Result | Exception]:
        """Train runs of one group; return their results, or the errors that ended them.

        Args:
            turn: the runs, of `turns`.
            rung: all runs that train until this end, also those that are there. Those of the group have a seat each, so
                that a run which is resumed has the seat that it had.
            until: where they end; None for where their experiments say.
        """
        group = next(group for group in self._groups.together if turn[0].name in group)
        seats = {member.name: seat for seat, member in enumerate(one for one in rung if one.name in group)}
        experiments = {seats[member.name]: self._made[member.name] for member in turn}
        starts = {seats[member.name]: functools.partial(self._start_of, member, until) for member in turn}
        found = train_together(self._made[group[0]].step, experiments, starts, len(seats))
        return [found[seats[member.name]] for member in turn]

    def _start_of(self, member: Member, until: Until | None, experiment: Experiment) -> Run:
        return self._start(member, experiment, until)

    def told(self, found: Sweep, members: Sequence[Member]) -> Sweep:
        """Return the table with how each run trains."""
        how = {member.run_dir: self.how(member) for member in members}
        return dataclasses.replace(
            found, rows=tuple(dataclasses.replace(row, how=how[row.run_dir]) for row in found.rows)
        )


def trains(
    together: Together | None,
    alone: Callable[[Member, Until | None], Result | Exception],
    code_of: Callable[[Member, Result | Exception], int],
) -> TrainAll:
    """Return what trains the runs of a sweep in this process: those of a group at once, the others one after the other.

    After a signal no other run is started.

    Args:
        together: which train together; None for none.
        alone: trains one run; returns its result, or the error that ended it.
        code_of: the exit code for what came of a run; told once of each.
    """

    def train_all(todo: Sequence[Member], rung: Sequence[Member], until: Until | None) -> int:
        code = 0
        for turn in [[member] for member in todo] if together is None else together.turns(todo):
            if together is None or together.how(turn[0]) != VMAPPED:
                results = [alone(turn[0], until)]
            else:
                results = together.train(turn, rung, until)
            ended = 0
            for member, result in zip(turn, results, strict=True):
                ended = max(ended, code_of(member, result))
            code = max(code, ended)
            if ended in INTERRUPTED:
                break
        return code

    return train_all
