"""The states of a torchmetrics metric: out of it after an update, merged, and back into it before `compute`."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from purestep import tree
from purestep.errors import MetricError, explain
from purestep.metrics import _torch

if TYPE_CHECKING:
    from torchmetrics import Metric as Theirs


def parts(root: nn.Module) -> list[tuple[str, Theirs]]:
    """The metrics inside of a metric, itself included, with the prefix of their states."""
    from torchmetrics import Metric

    found = [(f"{path}." if path else "", part) for path, part in root.named_modules() if isinstance(part, Metric)]
    return sorted(found, key=lambda pair: pair[0])


def constants(root: nn.Module) -> Iterator[tuple[str, Tensor]]:
    for path, part in parts(root):
        for name, default in _torch.defaults(part).items():
            if isinstance(default, Tensor):
                yield f"{path}{name}", default
        for name, buffer in part.named_buffers(recurse=False):
            yield f"{path}{name}", buffer


def taken(value: Any, kind: str, what: str) -> Any:
    """A state after one update, as it merges; nothing of it shares memory with the batch."""
    if kind in ("cat", "list") and isinstance(value, (list, tuple)):
        odd = next((x for x in value if not isinstance(x, Tensor)), None)
        if odd is not None:
            raise MetricError(
                explain(
                    f"{what} keeps {type(odd).__name__} in its state, which is no tensor",
                    why="states are tensors: they go to other ranks and into snapshots",
                    instead="compute it after the run, from ps.predict(..., to=directory)",
                )
            )
        if kind == "list":
            return tuple(x.clone() for x in value)
        return torch.cat([x.unsqueeze(0) if x.ndim == 0 else x for x in value]) if value else None
    if kind == "stack":
        return value.unsqueeze(0)
    return value


def kept(values: Sequence[Any], kind: str) -> Any:
    if kind == "list":
        return tuple(x for value in values for x in value)
    present = [value for value in values if value is not None]  # a batch without a sample that counts leaves None
    if len({value.shape[1:] for value in present}) > 1:
        raise MetricError(
            explain(
                "the states that torchmetrics keeps of two batches differ in their dims",
                where=", ".join(sorted({tree.describe(value) for value in present})),
                why="some of its metrics drop a dim of a batch of one sample, or of one label",
                instead="batches of at least two samples: drop_last=True, or another batch size",
            )
        )
    return torch.cat(present) if present else None


def loaded(part: Theirs, name: str, value: Any, default: Any, device: torch.device) -> Any:
    """A state as the metric computes with it."""
    kind = _torch.reduction(part, name)
    if kind == "list":
        return [x if isinstance(x, Tensor) else torch.tensor(x, device=device) for x in value]
    if kind == "cat" and isinstance(default, list):
        return [] if value is None else [value]
    if kind == "stack":
        return value[0] if value.shape[0] == 1 else _torch.reduce(part, name, value)
    if isinstance(value, Tensor):
        return value
    # A count that began as an integer may have become a floating-point sum.
    whole = isinstance(value, int) or default.is_floating_point()
    return torch.tensor(value, dtype=default.dtype if whole else torch.get_default_dtype(), device=device)


def numbers(value: Any, source: str) -> Any:
    """The value of a metric for a row of the log: a number, or a flat dict of numbers."""
    if isinstance(value, Mapping):
        row: dict[str, Any] = {}
        for key, inner in value.items():
            found = numbers(inner, source)
            row |= {f"{key}/{name}": x for name, x in found.items()} if isinstance(found, dict) else {str(key): found}
        return row
    if isinstance(value, Tensor) and value.numel() == 1:
        return value.reshape(())
    if isinstance(value, Tensor) and value.ndim == 1:
        return {str(i): x for i, x in enumerate(value.unbind())}
    if isinstance(value, (int, float)):
        return value
    shown = tree.describe(value) if isinstance(value, Tensor) else type(value).__name__
    raise MetricError(
        explain(
            "the value of this metric is no number and no dict of numbers",
            where=f"{source.partition('#')[0]}: {shown}",
            why="a row of the log holds numbers; `value()` of the merged metric returns all of it",
            instead="ps.metrics.from_torchmetrics(metric, pick=lambda value: {...})   # what of it goes to the log",
        )
    )
