"""`evaluate`: the metrics of one or several data sets, computed by the evaluation callback of a run."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np
from torch import Tensor

from purestep import tree
from purestep.arguments import Count, Name, checked
from purestep.callbacks.evaluate import EvaluateCallback
from purestep.callbacks.evaluate import evaluate as callback
from purestep.errors import ConfigError, explain
from purestep.loop.checks import check_counts
from purestep.loop.ranks import Ranks
from purestep.loop.signals import Signals
from purestep.sharding.plan import Plan, check_plan
from purestep.step import make_eval
from purestep.step_protocol import AnyStep, facts_of
from purestep.views import Block, Table, View


class Evaluation(View, dict[str, float]):
    """Metrics by name, `<set>/<metric>`, as a run logs them. It prints as a table with a column for each set.

    Examples:
        >>> print(Evaluation({"val/loss": 0.25, "val/accuracy": 0.5, "test/loss": 1.5}))
                     val  test
        loss      0.2500   1.5
        accuracy  0.5000
    """

    def view(self) -> list[Block]:
        """Return the blocks of the display."""
        sets = list(dict.fromkeys(name.partition("/")[0] for name in self))
        names = list(dict.fromkeys(name.partition("/")[2] for name in self))
        rows = [[name, *(_shown(self.get(f"{of}/{name}")) for of in sets)] for name in names]
        return [Table(["", *sets], rows, right=range(1, len(sets) + 1))]


def _shown(value: float | None) -> str:
    if value is None:
        return ""
    text = f"{value:.4g}"
    # Trailing zeros align the decimals of a column: 0.2500 above 0.1234.
    return f"{value:.4f}" if 1e-3 <= abs(value) < 1 else text


@checked(ConfigError, failed=True)
def evaluate(
    state: Any,
    loss_fn: Callable[..., Any],
    data: object,
    *,
    name: Name = "val",
    of: Callable[[Any], Any] | None = None,
    plan: Plan | None = None,
    limit: Count | None = None,
) -> Evaluation:
    """Evaluate a state on one or several sets: the numbers that `ps.callbacks.evaluate` logs in a run.

    Args:
        state: a train state; it is not changed.
        loss_fn: the loss function of `make_step`, or an evaluation step from `make_eval`, jitted or not.
        data: data as for `fit`, or a dict of data sets by name. Each is read from its beginning, in the order of its
            epoch 0.
        name: name of the set if `data` is one set: the metrics are `<name>/<metric>`.
        of: a pure function from the state to the state that is evaluated: `of=ps.optim.averaged`.
        plan: plan of the ranks that evaluate together. Every rank calls `evaluate`, computes some of the batches and
            gets the same metrics. A state that the plan has not placed yet is placed.
        limit: the most batches of each set, None for all.

    Raises:
        ConfigError: `loss_fn` does not take two arguments, or `data` is an empty dict.
        DataError: a set has no batches.

    Examples:
        >>> import torch
        >>> import purestep as ps
        >>> def loss_fn(net, batch):
        ...     return (net(batch["x"]) - batch["y"]).square().mean()
        >>> state = ps.init(lambda: torch.nn.Linear(1, 1), ps.optim.sgd(0.1))
        >>> one = ps.data.batches({"x": torch.ones(5, 1), "y": torch.zeros(5, 1)}, 2, drop_last=False)
        >>> list(evaluate(state, loss_fn, {"val": one, "test": one}))
        ['val/loss', 'test/loss']
    """
    check_plan(plan, "ps.evaluate")
    check_counts(1, limit=limit)
    sets: dict[Any, Any] = dict(data) if isinstance(data, Mapping) else {name: data}
    if any(not isinstance(key, str) or not key for key in sets) or not sets:
        raise ConfigError(
            explain(
                "data= is one set, or a dict of them"
                if isinstance(data, Mapping)
                else "name= is that of the set, a string",
                where=f"data: {sets!r}"[:200] if isinstance(data, Mapping) else f"name={name!r}"[:200],
                instead='ps.evaluate(state, loss_fn, {"val": val, "test": test})',
            )
        )
    for key, columns in sets.items() if isinstance(data, Mapping) else ():
        if isinstance(columns, (Tensor, np.ndarray)):
            raise ConfigError(
                explain(
                    "data= is batches, or a dict of such sets, and this is a dict of tensors",
                    where=f"data[{key!r}]: {tree.describe(columns)}",
                    why="tensors do not say how many samples make a batch",
                    instead="ps.data.batches(data, batch_size=256, shuffle=False, drop_last=False)",
                )
            )
    step = loss_fn if facts_of(loss_fn).evaluates else make_eval(loss_fn)
    if plan is not None and isinstance(step, AnyStep):
        step = step.under(plan)
    performers = [callback(step, source, name=key, of=of) for key, source in sets.items()]
    ranks = Ranks.of_inference(step)
    with ranks:
        placed, outside = ranks.placed(state), ranks.outside(Signals())
        row = Evaluation()
        for performer in performers:
            chosen: EvaluateCallback = performer if limit is None else performer.limited(limit)
            row.update(ranks.evaluate(chosen, placed, outside))
    return row
