"""Faults of the disk during a run: full, failing, read-only, forbidden, or with damaged files; real ones if possible.

File size limits, permissions, refused system calls and small file systems affect every line that writes, in Python or
not. The disk fails once in each stage of a save. If the fault can be undone, it is undone in every second process,
which must then take its next snapshots and end successfully.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from purestep.loop.resume import store_root
from purestep.snapshot.listing import Index
from purestep.testing import kernel, shims
from purestep.testing.lane import Lane, Outcome
from purestep.testing.trial import Fault, Trial, in_each_phase, stages

_TERMINATED = 143
_LIMITS = (0, 512, 4096)  # bytes: nothing, less than a page, and less than a snapshot
_SMALL = 8 << 20  # bytes of a small disk, in addition to the files of a run
_LATER = 2  # batches from a fault to its end
_STRIKES = 12  # faults in a lane


def _failing(
    prepare: Callable[[Trial, Lane], list[Mapping[str, Any]]],
    action: Callable[[Trial, Lane], Mapping[str, Any]],
    *,
    heals: bool,
) -> Callable[[Trial], None]:
    """Return a fault that strikes in each stage of a save.

    Args:
        prepare: returns the shims of a process besides the fault.
        action: returns the fault.
        heals: whether the fault can end within a process.
    """

    def inject(trial: Trial) -> None:
        number = 0

        def strike(lane: Lane, trigger: Mapping[str, Any]) -> Outcome:
            nonlocal number
            number += 1
            given = [*prepare(trial, lane), {**action(trial, lane), **trigger}, {"do": "count"}]
            if heals and number % 2 == 0:
                given.append({"do": "heal", "on": "batch", "later": _LATER})
            outcome = lane.go(*given, codes=(0, 1), verify=True)
            _went_on(trial, lane, outcome)
            return outcome

        in_each_phase(trial, stages(trial.base), ["before"], strike, strikes=_STRIKES)

    return inject


def _went_on(trial: Trial, lane: Lane, outcome: Outcome) -> None:
    """Check that a run whose disk failed goes on to its end, successfully if the fault was undone before."""
    if not any(outcome.values("injected after")) or "stop" in outcome.values("on_save_error"):
        return
    left = trial.base.batches - (outcome.values("resumed")[0] or 0)
    if max(outcome.values("batches"), default=0) != left:
        lane.problems.append(f"the disk failed, and the run did not go on\n{outcome.stderr[-2000:]}")
    kinds = [kind for kind, _ in outcome.facts if kind in ("injected", "healed")]
    if kinds == ["injected", "healed"] and outcome.code != 0:
        lane.problems.append(f"the disk was mended, and the run ended with {outcome.code}\n{outcome.stderr[-2000:]}")


def _plain(trial: Trial, lane: Lane) -> list[Mapping[str, Any]]:
    return []


def _with_permissions(trial: Trial, lane: Lane) -> list[Mapping[str, Any]]:
    lane.mend = lambda: shims.give_permission(lane.run_dir)
    return [{"do": "obey", "on": "start"}]


def _with_small_disk(trial: Trial, lane: Lane) -> list[Mapping[str, Any]]:
    if not lane.place.is_mount():
        kernel.mount(lane.place, _SMALL + 3 * trial.base.nbytes)
        trial.stack.callback(kernel.unmount, lane.place)
        lane.mend = lambda: (lane.place / "ballast").unlink(missing_ok=True)
    return []


def _refused(number: str) -> Callable[[Trial], None]:
    return _failing(_plain, lambda trial, lane: {"do": "refuse", "errno": number}, heals=False)


_cannot_grow = _failing(_plain, lambda trial, lane: {"do": "limit", "limit": trial.draw.choice(_LIMITS)}, heals=True)
_filled = _failing(
    _with_small_disk, lambda trial, lane: {"do": "fill", "ballast": str(lane.place / "ballast")}, heals=True
)
_forbidden = _failing(
    _with_permissions, lambda trial, lane: {"do": "forbid", "place": str(store_root(lane.run_dir))}, heals=True
)


# --- damaged files ----------------------------------------------------------------------------------------------------


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
    """Return a fault that damages each file of the newest snapshot in turn; a run may resume from the previous one."""

    def inject(trial: Trial) -> None:
        stopped = trial.lane()
        at = max(2, trial.base.batches - 2)
        stopped.go({"do": "signals", "on": "batch", "at": at, "signals": ["SIGTERM"]}, codes=(_TERMINATED,))
        stopped.injected = 0
        steps = stopped.durable()
        newest = Index(store_root(stopped.run_dir)).entries()[-1].path
        files = sorted(path.relative_to(stopped.run_dir) for path in newest.rglob("*") if path.is_file())
        for name in files:
            lane = trial.lane()
            shutil.copytree(stopped.run_dir, lane.run_dir)
            damage(lane.run_dir / name, trial.draw)
            lane.injected += 1
            lane.end(damaged=steps[-1:])
        stopped.end()

    return inject


FAULTS = (
    Fault("disk full: files cannot grow (EFBIG)", 20, _cannot_grow, logged=False),
    Fault("disk full: no room is left (ENOSPC)", 20, _filled, logged=False, why_not=kernel.small_disk_why_not),
    Fault(
        "the kernel refuses to write (ENOSPC)", 20, _refused("ENOSPC"), logged=False, why_not=kernel.refusing_why_not
    ),
    Fault("the disk fails (EIO)", 20, _refused("EIO"), logged=False, why_not=kernel.refusing_why_not),
    Fault("the disk turns read-only (EROFS)", 20, _refused("EROFS"), logged=False, why_not=kernel.refusing_why_not),
    Fault("no permission any more (EACCES)", 20, _forbidden, logged=False, why_not=kernel.permissions_why_not),
    Fault("a flipped bit in each file of a snapshot", 1, _damaged(_flip)),
    Fault("each file of a snapshot truncated", 1, _damaged(_truncate)),
    Fault("each file of a snapshot missing", 1, _damaged(_remove)),
)
