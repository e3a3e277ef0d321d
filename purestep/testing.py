"""Proofs for users: that a step is pure, that a run resumes with the same bits, that trees are equal.

Used on our own examples and tests; every function raises AssertionError with the first path that differs.
"""

from __future__ import annotations

import copy
import random as python_random
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from purestep import callbacks as callbacks_
from purestep import tree
from purestep.loop.cadence import every, steps
from purestep.loop.events import LoopState
from purestep.loop.run import Run


def assert_trees_equal(actual: Any, expected: Any, root: str = "") -> None:
    """Raise AssertionError unless two trees have the same paths and the same bits; the message lists each difference.

    Example:
        >>> assert_trees_equal({"w": torch.ones(2)}, {"w": torch.ones(2)})
    """
    found = tree.diff(actual, expected, root)
    if found:
        shown = "\n".join(f"  {difference}" for difference in found[:20])
        more = f"\n  ... and {len(found) - 20} more" if len(found) > 20 else ""
        raise AssertionError(f"the trees differ at {len(found)} paths:\n{shown}{more}")


def assert_trees_close(actual: Any, expected: Any, *, rtol: float = 1e-5, atol: float = 1e-8, root: str = "") -> None:
    """Raise AssertionError unless two trees have the same paths and values that are close.

    Example:
        >>> assert_trees_close({"w": torch.ones(2)}, {"w": torch.ones(2) + 1e-7})
    """
    left, right = tree.paths(actual, root), tree.paths(expected, root)
    if left != right:
        raise AssertionError(f"the trees have different paths:\n{tree.diff(actual, expected, root)}")
    for path, a, b in zip(left, tree.leaves(actual), tree.leaves(expected), strict=True):
        try:
            torch.testing.assert_close(torch.as_tensor(a), torch.as_tensor(b), rtol=rtol, atol=atol)
        except AssertionError as error:
            raise AssertionError(f"{path}: {error}") from None


def check_pure(step: Callable[[Any, Any], Any], state: Any, batch: Any) -> None:
    """Prove that a step is pure, by calling it twice: contract 1.

    It must leave its inputs bitwise unchanged and unaliased in place, the python, numpy and torch generators unmoved,
    and give the same bits both times.

    Args:
        step: any function of (state, batch): a training step, hand-written or made, or an evaluation step.
        state: a state it takes.
        batch: a batch it takes.

    Raises:
        AssertionError: it is not pure; the message says what changed, with the path.

    Example:
        >>> check_pure(lambda state, batch: (state + batch, {}), torch.zeros(()), torch.ones(()))
        >>> check_pure(lambda state, batch: (state.add_(batch), {}), torch.zeros(()), torch.ones(()))
        Traceback (most recent call last):
        ...
        AssertionError: the step changed its input state:
          state: float32[], 1 differ, max abs 1, 1065353216 ulp
    """
    if getattr(step, "donate", False):
        raise AssertionError(
            "a donating step consumes its state, which is what purity forbids\n"
            "  check the same step without donation: ps.testing.check_pure(ps.jit(step), state, batch)"
        )
    before = copy.deepcopy((tree.leaves(state), tree.leaves(batch)))
    generators = _generators()
    first = step(state, batch)
    for name, now in _generators().items():
        if now != generators[name]:
            raise AssertionError(
                f"the step drew from the global generator of {name}\n"
                "  instead: draw from a key, ps.random.fold_in(state.rng, state.step)"
            )
    for name, value, old in (("state", state, before[0]), ("batch", batch, before[1])):
        same = tree.unflatten(tree.structure(value), old)
        found = tree.diff(same, value, name)
        if found:
            raise AssertionError(f"the step changed its input {name}:\n  {found[0]}")
    again = step(state, batch)
    found = tree.diff(first, again, "output")
    if found:
        raise AssertionError(f"the step gave other bits the second time:\n  {found[0]}")


def _generators() -> dict[str, Any]:
    numpy_state = np.random.get_state(legacy=False)
    states = {
        "python": hash(python_random.getstate()),
        "numpy": (numpy_state["state"]["key"].tobytes(), numpy_state["state"]["pos"]),
        "torch": torch.random.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_initialized():
        states["torch on CUDA"] = [s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()]
    return states


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


def check_resume(
    make: Callable[[], dict[str, Any]],
    *,
    batches: int,
    at: Sequence[int] | None = None,
    run_dir: str | Path | None = None,
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
    if not any(hasattr(c, "keep") for c in own):
        own.append(callbacks_.snapshots(every=every.steps(batches)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)
        run = Run(**options, callbacks=own, until=steps(batches), run_dir=run_dir)
        for _ in run:
            pass
    return run.loop
