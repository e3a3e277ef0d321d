"""`check_resume`: the proof that a run stopped anywhere and resumed has the bits of the undisturbed one, contract 2."""

from __future__ import annotations

import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from purestep import callbacks as callbacks_
from purestep import tree
from purestep.arguments import Location, checked
from purestep.errors import ConfigError
from purestep.loop.cadence import every, steps
from purestep.loop.events import LoopState
from purestep.loop.options import RunArguments
from purestep.loop.roles import SnapshotPolicy
from purestep.loop.run import Run


def comparable(loop: LoopState) -> dict[str, Any]:
    """Return the parts of a loop state that must not depend on interruptions: all but the clock."""
    return {
        "train": loop.train,
        "cursor": loop.cursor,
        "callbacks": loop.callbacks,
        "metrics": dict(loop.status.metrics),
        "sums": loop.status.sums,
        "due": loop.status.due,
    }


@checked(ConfigError, failed=True)
def check_resume(
    make: Callable[[], dict[str, Any]],
    *,
    batches: int,
    at: Sequence[int] | None = None,
    run_dir: Location | None = None,
) -> None:
    """Prove that a run stopped anywhere and resumed has the bits of the undisturbed run: contract 2.

    The run is executed once without interruption, and for each k once stopped after k batches and resumed from its
    snapshot, with all objects made anew. Train state, data cursor, callbacks' states and metrics must be equal bit for
    bit.

    Args:
        make: returns new keyword arguments of `fit` (step, state, train, callbacks, ...), without `until` and
            `run_dir`.
        batches: length of the run in batches.
        at: the numbers k of batches to stop at; by default 1 ... batches - 1.
        run_dir: directory of the runs; a temporary one by default.

    Raises:
        AssertionError: with the first paths that differ.
    """
    with tempfile.TemporaryDirectory() as temporary:
        root = Path(run_dir or temporary)
        straight = _run(make, batches, root / "straight")
        for k in range(1, batches) if at is None else at:
            where = root / f"stopped-at-{k}"
            _run(make, k, where)
            resumed = _run(make, batches, where)
            found = tree.diff(comparable(resumed), comparable(straight), "loop")
            if found:
                shown = "\n".join(f"  {difference}" for difference in found[:10])
                raise AssertionError(
                    f"stopped after {k} batches and resumed, the run differs from the straight one:\n{shown}"
                )


def _run(make: Callable[[], dict[str, Any]], batches: int, run_dir: Path) -> LoopState:
    options = make()
    own = list(options.pop("callbacks", ()))
    if not any(isinstance(c, SnapshotPolicy) for c in own):
        own.append(callbacks_.snapshots(every=every.steps(batches)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run = Run(RunArguments(**options, callbacks=own, until=steps(batches), run_dir=run_dir))
        for _ in run:
            pass
    return run.loop
