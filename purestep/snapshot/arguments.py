"""What a save may be given besides its tree: a step, metrics, info. Each is checked before anything is copied."""

from __future__ import annotations

import json
import operator
from collections.abc import Mapping

from purestep.errors import SnapshotError, explain
from purestep.snapshot.codec import JSON


def checked_step(step: int) -> int:
    """Return a step as an int; refuse what is not a whole number from 0 up."""
    try:
        number = operator.index(step)
    except TypeError:
        number = -1
    if number < 0 or isinstance(step, bool):
        raise SnapshotError(explain("the step of a snapshot is a whole number from 0 up", where=f"step = {step!r}"))
    return number


def checked_metrics(metrics: Mapping[str, float]) -> Mapping[str, float]:
    """Return metrics as floats under strings; refuse what cannot be."""
    try:
        return {_text(name): float(value) for name, value in metrics.items()}
    except (TypeError, ValueError, RuntimeError) as error:
        what, instead = "metrics of a snapshot are numbers under names", 'metrics={"val/loss": 0.5}'
        raise SnapshotError(
            explain(what, where=f"metrics = {metrics!r:.200}", why=str(error), instead=instead)
        ) from error


def _text(name: str) -> str:
    if not isinstance(name, str):
        raise TypeError(f"the name {name!r} is not a string")
    return name


def frozen_json(info: Mapping[str, JSON]) -> Mapping[str, JSON]:
    """Return a copy of what JSON keeps of a value; refuse what it cannot write."""
    try:
        return json.loads(json.dumps(dict(info)))
    except (TypeError, ValueError) as error:
        what, instead = "info cannot be written as JSON", "put tensors and arrays into the tree that is saved"
        raise SnapshotError(
            explain(what, where=f"info = {str(info)[:200]}", why=str(error), instead=instead)
        ) from error
