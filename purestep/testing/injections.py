"""The faults of the harness: killed processes, faults of the environment, and those of `disks`. `ALL` is the table.

A fault works on lanes: it disturbs some processes of a run and lets the last one finish. `lane` checks the results.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

from purestep.testing import disks, phases, powercut
from purestep.testing.lane import Lane, Outcome, facts_of
from purestep.testing.trial import Fault, Lanes, Trial, in_each_phase

_KILLED, _INTERRUPTED, _TERMINATED = -9, 130, 143
_KILLS_A_RUN = 25
_IN_AN_EVALUATION = 2  # the first evaluated batch may belong to the check before the run
_MOMENT = 0.02  # seconds: about the time in which code outside of Python writes the arrays of a snapshot


# --- processes that die -----------------------------------------------------------------------------------------------


def _kill_at_random(trial: Trial) -> None:
    lanes = Lanes(trial, strikes=_KILLS_A_RUN)
    while lanes.well and lanes.struck < trial.times:
        lane = lanes.next()
        lane.go(kill_after=0.45 * trial.draw.random() * trial.base.seconds, codes=(_KILLED, 0), verify=True)
    lanes.end()


def _kill_in_saves(trial: Trial) -> None:
    """Kill before and after each operation of a save in turn; then shortly after random operations."""
    struck: set[Any] = set()

    def strike(lane: Lane, trigger: Mapping[str, Any]) -> Outcome:
        kill = {"do": "kill", **trigger}
        if (trigger["on"], trigger["phase"]) in struck:
            kill["delay"] = _MOMENT * trial.draw.random()
        outcome = lane.go(kill, codes=(_KILLED, 0), verify=True)
        if outcome.values("injected"):
            struck.add((trigger["on"], trigger["phase"]))
        return outcome

    in_each_phase(trial, trial.base.save_phases, ["before", "after"], strike, strikes=_KILLS_A_RUN)


def _kill_while_saved_again(trial: Trial) -> None:
    """Kill before or after operations of a save that replaces the snapshot of the same position.

    A signal during an evaluation saves a position whose evaluation is still due. The next process evaluates and saves
    the position again. A training without evaluations saves no position twice; it is killed at random moments.
    """

    def interrupted() -> Lane:
        lane = trial.lane()
        signals = {"do": "signals", "on": "evaluate", "at": _IN_AN_EVALUATION, "signals": ["SIGTERM"]}
        lane.go(signals, codes=(_TERMINATED, 0))
        return lane

    lane = interrupted()
    traced = lane.go({"do": "trace", "run_dir": str(lane.run_dir)}, verify=True).values("os")
    lane.end()
    again = [name for name in dict.fromkeys(traced) if phases.in_save(name)]
    if not again:
        _kill_at_random(trial)
    moments = [(name, side) for name in again for side in ("before", "after")]
    for name, side in trial.draw.sample(moments, min(trial.times, len(moments))):
        lane = interrupted()
        kill = {"do": "kill", "on": side, "phase": name, "at": 1, "run_dir": str(lane.run_dir)}
        lane.go(kill, codes=(_KILLED, 0), verify=True)
        lane.end()


def _power_cut(trial: Trial) -> None:
    lanes = Lanes(trial, strikes=5)
    while lanes.well and lanes.struck < trial.times:
        lane = lanes.next()
        at = trial.draw.randint(1, len(trial.base.operations))
        under = {"run_dir": str(lane.run_dir)}
        record = {"do": "record", "shadow": str(lane.shadow), **under}
        outcome = lane.go(record, {"do": "kill", "on": "os", "at": at, **under}, codes=(_KILLED, 0), verify=True)
        if outcome.code == _KILLED:
            number = lanes.struck
            powercut.cut(lane.run_dir, lane.shadow, seed=trial.seed + number, durable_only=number % 2 == 0)
    lanes.end()


def _signalled(signals: list[str], codes: tuple[int, ...]) -> Callable[[Trial], None]:
    def inject(trial: Trial) -> None:
        for at in trial.batches():
            lane = trial.lane()
            lane.go({"do": "signals", "on": "batch", "at": at, "signals": signals}, codes=codes)
            lane.end()

    return inject


def _kill_worker(trial: Trial) -> None:
    for at in trial.batches():
        lane = trial.lane()
        # Batches that were fetched ahead still arrive, so the run may reach its end.
        lane.go({"do": "kill_worker", "on": "batch", "at": at}, codes=(0, 1))
        lane.end()


# --- faults of the environment ----------------------------------------------------------------------------------------


def _clock_backwards(trial: Trial) -> None:
    back = {"do": "clock", "on": "start"}
    for at in trial.batches():
        lane = trial.lane()
        lane.go(back, {"do": "kill", "on": "batch", "at": at}, codes=(_KILLED,))
        lane.end(back)
        lane.injected = min(lane.injected, 1)  # one run on such a clock counts once, with its kill and second process


def _raising(on: str, codes: tuple[int, ...]) -> Callable[[Trial], None]:
    def inject(trial: Trial) -> None:
        for at in trial.batches():
            lane = trial.lane()
            lane.go({"do": "raise", "on": on, "at": max(1, at // 4)}, codes=codes)
            lane.end()

    return inject


def _stdout(place: str) -> Callable[[Trial], None]:
    def inject(trial: Trial) -> None:
        for at in trial.batches():
            lane = trial.lane()
            lane.go({"do": "signals", "on": "batch", "at": at, "signals": ["SIGTERM"]}, stdout=place)
            # Python exits with 120 if the last flush of stdout fails; the training is not affected.
            lane.go(stdout=place, codes=(0, 1, 120))
            lane.end()

    return inject


def _two_at_once(trial: Trial) -> None:
    for at in trial.batches():
        lane = trial.lane()
        gate = lane.place / "gate"
        first, said = lane.begin({"do": "wait", "on": "batch", "at": at, "until": str(gate)})
        while not any(kind == "waiting" for kind, _ in facts_of(said)) and first.poll() is None:
            time.sleep(0.002)
        second = lane.go(codes=(1,))
        lane.injected += 1
        if "another process is running in this run directory" not in second.stderr:
            lane.problems.append(f"the second run was not refused\n{second.stderr[-2000:]}")
        if at % 2:
            first.kill()  # the lock of a dead process is released
        gate.write_text("")
        lane.outcome(first, said)
        gate.unlink()
        lane.end()


ALL = (
    Fault("SIGKILL at a random moment", 110, _kill_at_random),
    Fault("SIGKILL in each phase of a save", 110, _kill_in_saves),
    Fault("SIGKILL while a position is saved again", 24, _kill_while_saved_again),
    Fault("power cut, un-fsynced writes dropped", 30, _power_cut),
    Fault("SIGTERM", 5, _signalled(["SIGTERM"], (_TERMINATED,))),
    Fault("SIGINT", 3, _signalled(["SIGINT"], (_INTERRUPTED,))),
    Fault("SIGINT twice", 3, _signalled(["SIGINT", "SIGINT"], (-2, _INTERRUPTED))),
    Fault("a worker process killed", 2, _kill_worker, needs_workers=True),
    *disks.FAULTS,
    Fault("the clock runs backwards", 3, _clock_backwards),
    Fault("a logger raises", 3, _raising("log", (0,)), logged=False),
    Fault("a callback raises", 3, _raising("react", (1,))),
    Fault("stdout is full", 2, _stdout("/dev/full")),
    Fault("stdout is closed", 2, _stdout("closed")),
    Fault("no reader of stdout any more", 2, _stdout("broken")),
    Fault("two runs in one directory", 3, _two_at_once),
)
