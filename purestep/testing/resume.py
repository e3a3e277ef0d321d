"""`check_resume`: the proof that a run stopped anywhere and resumed has the bits of the straight one, contract 2."""

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
    """Return all of a loop state that must not depend on interruptions: everything but the clock."""
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

    The run is made once straight, and for each k once stopped after k batches, thrown away, and resumed from its
    snapshot with everything made anew. Train state, data cursor, callbacks' states and metrics have to be equal bit
    for bit.

    Args:
        make: returns the keyword arguments of `fit` (step, state, train, callbacks, ...) afresh, without `until` and
            `run_dir`.
        batches: length of the run.
        at: the moments k to stop at; all of 1 ... batches - 1 by default.
        run_dir: directory for the runs; a temporary one by default.

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
