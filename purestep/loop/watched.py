"""What callbacks wait for, compared with what there will be: a name that never comes is a wait for ever.

Names of sets are known from the start, those of metrics from the dry runs before the first step. A callback says with
`watches()` which metrics it needs, as they are logged.
"""

from __future__ import annotations

import difflib
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from purestep.errors import ConfigError, MetricError, explain

Known = Mapping[str, Collection[str] | None]


def _watched(callbacks: Sequence[Any], *, ranked: bool) -> list[tuple[Any, str]]:
    """Return each callback with each metric that it waits for, and by which it ranks.

    Ranks may go by any row, and a callback of the user's may log what it likes.
    """
    ranked = ranked and all(type(callback).__module__.startswith("purestep.") for callback in callbacks)
    chosen = [c for c in callbacks if ranked or not hasattr(c, "keep")]
    return [(callback, name) for callback in chosen for name in getattr(callback, "watches", tuple)()]


def check_sets(callbacks: Sequence[Any]) -> None:
    """Refuse a wait for metrics of a set that nothing evaluates.

    Raises:
        ConfigError: with the callback and the sets that there are.
    """
    evaluated = [c.name for c in callbacks if hasattr(c, "evaluate")]
    for callback, name in _watched(callbacks, ranked=False):
        part = name.split("/")[0]
        if part in (*evaluated, "train"):
            continue
        sets = ", ".join(f"{other}/..." for other in evaluated)
        raise ConfigError(
            explain(
                f"{callback.name!r} watches {name!r}, which no callback evaluates",
                where=f"evaluated: {sets or 'nothing'}",
                why="it would wait for it for ever",
                instead=f"ps.callbacks.evaluate(loss_fn, data, name={part!r})",
            )
        )


def check_names(callbacks: Sequence[Any], known: Known) -> None:
    """Refuse a wait for a metric that its set does not have.

    Args:
        callbacks: of the run.
        known: names of the metrics of each set, None where they are not known.

    Raises:
        MetricError: with the metrics that there are.
    """
    for callback, name in _watched(callbacks, ranked=True):
        part, _, metric = name.partition("/")
        names = known.get(part)
        if names is None:
            continue
        bare = metric.removesuffix("_epoch") if part == "train" else metric
        # A metric that computes to several numbers logs each below its own name.
        if any(bare == n or bare.startswith(f"{n}/") for n in names):
            continue
        suffix = metric[len(bare) :]
        near = difflib.get_close_matches(bare, names, n=1, cutoff=0.0) or [""]
        raise MetricError(
            explain(
                f"{callback.name!r} watches {name!r}, which is not among the metrics of {part!r}",
                where=f"{part}: {', '.join(sorted(names))}",
                why="it would wait for it for ever",
                instead=f"{part}/{near[0]}{suffix}",
            )
        )
