"""`check_pure`: the proof that a step is a pure function, contract 1."""

from __future__ import annotations

import copy
import random as python_random
from collections.abc import Callable
from typing import Any

import numpy as np
import torch

from purestep import tree
from purestep.arguments import checked
from purestep.errors import ConfigError
from purestep.preflight import hidden_attributes
from purestep.preflight.dry_run import models_of
from purestep.step_protocol import facts_of


@checked(ConfigError, failed=True)
def check_pure(step: Callable[[Any, Any], Any], state: object, batch: object) -> None:
    """Prove that a step is pure, by calling it twice: contract 1.

    The step must not change its inputs bitwise or write into their memory, must not advance the generators of Python,
    numpy and torch, must return the same bits both times, and must change no attribute of a model the second time (the
    first call may build a cache).

    Args:
        step: any function of (state, batch): a training step, hand-written or made, or an evaluation step.
        state: a state for the step.
        batch: a batch for the step.

    Raises:
        AssertionError: the step is not pure; the message names the change and its path.

    Examples:
        >>> check_pure(lambda state, batch: (state + batch, {}), torch.zeros(()), torch.ones(()))
        >>> check_pure(lambda state, batch: (state.add_(batch), {}), torch.zeros(()), torch.ones(()))
        Traceback (most recent call last):
        ...
        AssertionError: the step changed its input state:
          state: float32[], 1 differ, max abs 1, 1065353216 ulp
    """
    if facts_of(step).donate:
        raise AssertionError(
            "a donating step consumes its state, which is what purity forbids\n"
            "  check the same step without donation: ps.testing.check_pure(ps.jit(step), state, batch)"
        )
    before = copy.deepcopy((tree.leaves(state), tree.leaves(batch)))
    modules = models_of(step, (state,))
    generators, attributes = _generators(), [hidden_attributes.attributes(modules)]
    first = step(state, batch)
    attributes.append(hidden_attributes.attributes(modules))
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
    attributes.append(hidden_attributes.attributes(modules))
    changes = hidden_attributes.changed(attributes[1], attributes[2])
    if changes:
        raise AssertionError(hidden_attributes.message(changes))
    found = tree.diff(first, again, "output")
    if found:
        changes = hidden_attributes.changed(attributes[0], attributes[1])
        told = "".join(f"\n  the first time it changed {change}" for change in changes[:4])
        raise AssertionError(f"the step gave other bits the second time:\n  {found[0]}{told}")


def _generators() -> dict[str, Any]:
    numpy_state: Any = np.random.get_state()
    states = {
        "python": hash(python_random.getstate()),
        "numpy": (numpy_state[1].tobytes(), *numpy_state[2:]),
        "torch": torch.random.get_rng_state().numpy().tobytes(),
    }
    if torch.cuda.is_initialized():
        states["torch on CUDA"] = [s.numpy().tobytes() for s in torch.cuda.get_rng_state_all()]
    return states
