"""What a torchmetrics metric keeps in private names; no other file of this room touches them.

Seen to work on torchmetrics 1.9.0. `Metric.add_state` and `Metric.metric_state` are public, but neither says what a
state begins with and how it is reduced, and nothing public turns the synchronization of `compute` off:

    _defaults, _reductions      by name, what `add_state` was given. Without them: nothing can be converted.
    _update_count, _computed    how often `update` was called, and the cached value of `compute`, which are no states.
    _to_sync                    whether `compute` gathers from other processes. Here states are merged before.
    _enable_compute_groups, _groups_checked, _groups
                                a collection compares values of states to share them between metrics. Without them:
                                make the collection with `compute_groups=False`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

if TYPE_CHECKING:
    from torchmetrics import Metric

# Attributes of a metric that change with every call, and are no part of its value.
PASSING = frozenset("_update_count _computed _forward_cache _is_synced _cache _to_sync _should_unsync _device".split())


def defaults(metric: Metric) -> Mapping[str, Any]:
    """Return what each state of a metric begins with: a tensor, or an empty list."""
    return metric._defaults


def reduction(metric: Metric, state: str) -> str:
    """Return how a state merges: "sum", "min", "max", "cat", "list" (of tensors), or "stack" (for `reduce`)."""
    from torchmetrics.utilities.data import dim_zero_cat, dim_zero_max, dim_zero_min, dim_zero_sum

    function: Any = metric._reductions[state]
    named = {dim_zero_sum: "sum", dim_zero_min: "min", dim_zero_max: "max", dim_zero_cat: "cat"}
    if function in named:
        return named[function]
    return "list" if isinstance(metric._defaults[state], list) else "stack"


def reduce(metric: Metric, state: str, stacked: Tensor) -> Tensor:
    """Return a state from those of several batches, stacked, as torchmetrics does with those of several processes."""
    function: Any = metric._reductions[state]
    return stacked if function is None else function(stacked)


def begin(metric: Metric, updates: int) -> None:
    """Forget what was computed, and that other processes exist."""
    metric._computed = None
    metric._update_count = updates
    metric._to_sync = False


def alone(root: nn.Module) -> None:
    """Let every metric of a collection keep its own states: sharing them is decided by comparing values."""
    for collection in root.modules():
        if hasattr(collection, "_enable_compute_groups"):
            collection._enable_compute_groups = False  # type: ignore[assignment]
            collection._groups_checked = False  # type: ignore[assignment]
            collection._groups = {}  # type: ignore[assignment]
