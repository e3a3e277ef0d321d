"""The faults of the harness: each says how often it is injected, and how.

A fault works on lanes: it disturbs some processes of a run and lets the last one finish. What has to hold is checked by
`lane`.
"""

from __future__ import annotations

import dataclasses
import random
import re
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path

from purestep.loop.resume import store_root
from purestep.testing import powercut
from purestep.testing.lane import Lane, Straight, facts_of

_KILLED, _INTERRUPTED, _TERMINATED = -9, 130, 143
_KILLS_A_RUN = 25
_COMMIT = re.compile(r"rename /snapshots/\d+\.purestep-tmp")


@dataclasses.dataclass(frozen=True)
class Trial:
    """What a fault gets: new lanes, the undisturbed run, and how often to strike."""

    lane: Callable[[], Lane]
    base: Straight
    seed: int
    times: int

    @property
    def draw(self) -> random.Random:
        """A generator that starts anew each time."""
        return random.Random(self.seed)

    def batches(self) -> Iterator[int]:
        """Yield random moments of the run, in batches; one for each time."""
        draw = self.draw
        return (draw.randint(1, self.base.batches) for _ in range(self.times))


@dataclasses.dataclass(frozen=True)
class Fault:
    """A fault.

    Attributes:
        name: in the table.
        times: how often it is injected.
        inject: what is done.
        needs_workers: whether the job has to have worker processes.
        logged: whether `metrics.csv` has to be that of the undisturbed run.
    """

    name: str
    times: int
    inject: Callable[[Trial], None]
    needs_workers: bool = False
    logged: bool = True


# --- processes that die -----------------------------------------------------------------------------------------------


def _kill_at_random(trial: Trial) -> None:
    draw, lanes = trial.draw, _Lanes(trial)
    while lanes.goes_on():
        lane = lanes.next()
        lane.go(kill_after=0.45 * draw.random() * trial.base.seconds, codes=(_KILLED, 0), verify=True)
    lanes.end()


def _kill_in_saves(trial: Trial) -> None:
    """Before and after each operation of a process's first two saves in turn, then at random ones."""
    saves = [name for name in trial.base.operations if "/snapshots" in name]
    commits = [i for i, name in enumerate(saves) if _COMMIT.match(name)]
    first = 2 * (commits[min(2, len(commits)) - 1] + 3)
    draw, lanes = trial.draw, _Lanes(trial)
    while lanes.goes_on():
        lane = lanes.next()
        at = lanes.struck + 1 if lanes.struck < first else draw.randint(1, 2 * len(saves))
        shim = {"do": "kill", "on": "save", "at": at, "run_dir": str(lane.run_dir)}
        lane.go(shim, codes=(_KILLED, 0), verify=True)
    lanes.end()


def _power_cut(trial: Trial) -> None:
    draw, lanes = trial.draw, _Lanes(trial, kills=5)
    while lanes.goes_on():
        lane = lanes.next()
        at = draw.randint(1, len(trial.base.operations))
        under = {"run_dir": str(lane.run_dir)}
        record = {"do": "record", "shadow": str(lane.shadow), **under}
        outcome = lane.go(record, {"do": "kill", "on": "os", "at": at, **under}, codes=(_KILLED, 0), verify=True)
        if outcome.code == _KILLED:
            number = lanes.struck
            powercut.cut(lane.run_dir, lane.shadow, seed=trial.seed + number, durable_only=number % 2 == 0)
    lanes.end()


class _Lanes:
    """Lanes that are struck until their run is complete, or often enough."""

    def __init__(self, trial: Trial, *, kills: int = _KILLS_A_RUN) -> None:
        self.trial, self.kills = trial, kills
        self.done: list[Lane] = []
        self.lane: Lane | None = None

    @property
    def struck(self) -> int:
        """Faults so far."""
        return sum(lane.injected for lane in self.done) + (0 if self.lane is None else self.lane.injected)

    def goes_on(self) -> bool:
        """Tell whether to strike again: not often enough yet, and nothing has gone wrong."""
        lanes = [*self.done, *([] if self.lane is None else [self.lane])]
        return self.struck < self.trial.times and not any(lane.problems for lane in lanes)

    def next(self) -> Lane:
        """Return the lane to strike."""
        if self.lane is not None and (self.lane.complete or self.lane.injected >= self.kills):
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


# --- disks that fail --------------------------------------------------------------------------------------------------


def _failing(name: str) -> Callable[[Trial], None]:
    """From a random operation on every change fails; in half of the runs the disk recovers later."""

    def inject(trial: Trial) -> None:
        draw = trial.draw
        for number in range(trial.times):
            lane = trial.lane()
            at = draw.randint(1, 2 * len(trial.base.operations))
            shims = [{"do": "fail", "on": "os", "at": at, "errno": name, "run_dir": str(lane.run_dir)}]
            if number % 2:
                shims.append({"do": "heal", "on": "batch", "at": draw.randint(1, trial.base.batches)})
            lane.go(*shims, codes=(0, 1))
            lane.end()

    return inject


def _file_size_limit(trial: Trial) -> None:
    """RLIMIT_FSIZE: files cannot grow beyond a limit that a snapshot exceeds. Half of the runs get the room back."""
    for number, at in enumerate(trial.batches()):
        lane = trial.lane()
        shims: list[dict[str, object]] = [{"do": "limit", "on": "batch", "at": at, "limit": 1024}]
        if number % 2:
            shims.append({"do": "heal", "on": "batch", "at": at + 2, "limit": None})
        lane.go(*shims, codes=(0, 1))
        lane.end()


def _flip(path: Path, draw: random.Random) -> None:
    content = bytearray(path.read_bytes())
    if content:
        content[draw.randrange(len(content))] ^= 1 << draw.randrange(8)
        path.write_bytes(content)


def _truncate(path: Path, draw: random.Random) -> None:
    content = path.read_bytes()
    path.write_bytes(content[: draw.randrange(len(content))] if content else b"")


def _remove(path: Path, draw: random.Random) -> None:
    path.unlink()


def _damaged(damage: Callable[[Path, random.Random], None]) -> Callable[[Trial], None]:
    """Spoil each file of the newest snapshot in turn; the run goes on from it, if it is whole, or the one before."""

    def inject(trial: Trial) -> None:
        draw, stopped = trial.draw, trial.lane()
        at = max(2, trial.base.batches - 2)
        stopped.go({"do": "signals", "on": "batch", "at": at, "signals": ["SIGTERM"]}, codes=(_TERMINATED,))
        stopped.injected = 0
        steps = stopped.durable()
        newest = store_root(stopped.run_dir) / str(steps[-1])
        files = sorted(path.relative_to(stopped.run_dir) for path in newest.rglob("*") if path.is_file())
        for name in files:
            lane = trial.lane()
            shutil.copytree(stopped.run_dir, lane.run_dir)
            damage(lane.run_dir / name, draw)
            lane.injected += 1
            lane.end(damaged=steps[-1:])
        stopped.end()

    return inject


# --- the world around -------------------------------------------------------------------------------------------------


def _clock_backwards(trial: Trial) -> None:
    back = {"do": "clock", "on": "start"}
    for at in trial.batches():
        lane = trial.lane()
        lane.go(back, {"do": "kill", "on": "batch", "at": at}, codes=(_KILLED,))
        lane.end(back)
        lane.injected = min(lane.injected, 1)  # one run on such a clock: the kill, and its second process, are no more


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
            # Python says 120 when the last flush of its output fails; the training does not care.
            lane.go(stdout=place, codes=(0, 1, 120))
            lane.end()

    return inject


def _two_at_once(trial: Trial) -> None:
    for at in trial.batches():
        lane = trial.lane()
        gate = lane.run_dir.with_name(f"{lane.run_dir.name}.gate")
        first, said = lane.begin({"do": "wait", "on": "batch", "at": at, "until": str(gate)})
        while not any(kind == "waiting" for kind, _ in facts_of(said)):
            if first.ended(0.002):
                break
        second = lane.go(codes=(1,))
        lane.injected += 1
        if "another process is running in this run directory" not in second.stderr:
            lane.problems.append(f"the second run was not refused\n{second.stderr[-2000:]}")
        if at % 2:
            first.signal(9)  # the lock of a dead process does not last
        gate.write_text("")
        lane.outcome(first, said)
        lane.end()


ALL = (
    Fault("SIGKILL at a random moment", 120, _kill_at_random),
    Fault("SIGKILL in each phase of a save", 100, _kill_in_saves),
    Fault("power cut, un-fsynced writes dropped", 30, _power_cut),
    Fault("SIGTERM", 5, _signalled(["SIGTERM"], (_TERMINATED,))),
    Fault("SIGINT", 3, _signalled(["SIGINT"], (_INTERRUPTED,))),
    Fault("SIGINT twice", 3, _signalled(["SIGINT", "SIGINT"], (-2, _INTERRUPTED))),
    Fault("a worker process killed", 2, _kill_worker, needs_workers=True),
    Fault("disk full (ENOSPC)", 6, _failing("ENOSPC")),
    Fault("files cannot grow (RLIMIT_FSIZE)", 4, _file_size_limit, logged=False),
    Fault("disk fails (EIO)", 4, _failing("EIO"), logged=False),
    Fault("directory becomes read-only (EROFS)", 4, _failing("EROFS"), logged=False),
    Fault("a flipped bit in each file of a snapshot", 1, _damaged(_flip)),
    Fault("each file of a snapshot truncated", 1, _damaged(_truncate)),
    Fault("each file of a snapshot missing", 1, _damaged(_remove)),
    Fault("the clock runs backwards", 3, _clock_backwards),
    Fault("a logger raises", 3, _raising("log", (0,)), logged=False),
    Fault("a callback raises", 3, _raising("react", (1,))),
    Fault("stdout is full", 2, _stdout("/dev/full")),
    Fault("stdout is closed", 2, _stdout("closed")),
    Fault("two runs in one directory", 3, _two_at_once),
)
