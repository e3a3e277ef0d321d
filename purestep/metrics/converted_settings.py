"""What a torchmetrics metric is besides its states: a digest of its settings, and whether an update changes them."""

from __future__ import annotations

import enum
import hashlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from purestep import tree
from purestep.errors import MetricError, explain
from purestep.metrics import _torch
from purestep.metrics.converted_states import parts


def attributes(root: nn.Module) -> dict[str, Any]:
    """What a metric holds besides its states, by path."""
    found = {}
    for path, part in parts(root):
        states = set(_torch.defaults(part))
        for name, value in vars(part).items():
            if name not in states and name not in _torch.PASSING:
                found[f"{path}{name}"] = _plain(value)
    return found


def check_attributes(metric: nn.Module, before: dict[str, Any], after: dict[str, Any]) -> None:
    changed = sorted(name for name in before.keys() | after.keys() if before.get(name) != after.get(name))
    if changed:
        raise MetricError(
            explain(
                f"{type(metric).__name__} keeps something of a batch outside of its states",
                where=", ".join(changed),
                why="what is no state is not merged over batches and ranks, and is in no snapshot",
                instead="declare it with add_state in the metric's __init__",
            )
        )


def digest(metric: nn.Module, pick: Callable[[Any], Any] | None) -> str:
    """A digest of the settings of a metric, the same in every process."""
    facts = [(path, type(part).__qualname__) for path, part in parts(metric)]
    text = repr((facts, sorted(attributes(metric).items()), _plain(pick)))
    return hashlib.sha256(text.encode()).hexdigest()[:12]


def _plain(value: Any) -> Any:
    """A value as text that is equal for equal settings; what is changed in place is seen by it, too."""
    if isinstance(value, Tensor):
        return ("tensor", str(value.dtype), tree.digest(value) if not value.is_meta else tuple(value.shape))
    if isinstance(value, Mapping):
        return sorted(((str(k), _plain(v)) for k, v in value.items()), key=lambda pair: pair[0])
    if isinstance(value, (list, tuple)):
        return [_plain(v) for v in value]
    if isinstance(value, (set, frozenset)):
        return sorted(str(_plain(v)) for v in value)
    if isinstance(value, enum.Enum):
        return (type(value).__qualname__, value.name)
    if value is None or isinstance(value, (bool, int, float, str, bytes)):
        return value
    if callable(value) and not isinstance(value, nn.Module):
        return tree.stable_name(value)
    return type(value).__qualname__
