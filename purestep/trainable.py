"""`freeze` and `thaw`: which parameters are trained, changed between two runs, with their optimizer state.

A run keeps the structure of its state, so what trains is settled for its length. Between two runs a frozen parameter,
which lives in the buffers, moves to the params, or back; the optimizer state of all others goes on.
"""

from __future__ import annotations

from collections.abc import Collection
from typing import Any

from torch import Tensor

from purestep import tree
from purestep.arguments import checked
from purestep.donation import copied
from purestep.errors import ConfigError, OptimError, StepError, explain
from purestep.module_tensors import slots
from purestep.optim.base import GradientTransformation, check_transformation
from purestep.optim.state_access import Path, nodes
from purestep.sharding.placement import is_split
from purestep.state import TrainState, definition
from purestep.tree import Filter


@checked(ConfigError, failed=True)
def thaw(state: TrainState, names: Filter, tx: GradientTransformation) -> TrainState:
    """Return a state in which frozen parameters are trained.

    Their optimizer state begins anew, that of the others goes on. Give them a part of their own in `tx`
    (`ps.optim.partition`), with a learning rate of its own: its counters, for the bias correction of Adam say, then
    begin with them.

    Args:
        state: from `ps.init(..., frozen=...)` or a run; not split over processes.
        names: a filter of frozen parameters.
        tx: the transformation of the run to come; of a step with a precision policy it is `step.tx`. Where it is that
            of the run before, or has the same parts under the same labels, their state goes on.

    Returns:
        The state to begin another run with, with its own `run_dir`.

    Raises:
        StepError: no frozen parameter matches.
        OptimError: the optimizer state is that of another transformation.
        ConfigError: the state is split over processes.

    Examples:
        >>> import torch
        >>> import purestep as ps
        >>> tx = ps.optim.partition({"head": ps.optim.adam(1e-3), "body": ps.optim.adam(1e-5)},
        ...                         {"head": "1.*", "body": "*"})
        >>> model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2))
        >>> state = ps.init(model, tx, frozen="0.*")
        >>> list(state.params), list(thaw(state, "0.*", tx).params)
        (['1.weight', '1.bias'], ['0.weight', '0.bias', '1.weight', '1.bias'])
    """
    known = slots(definition(state).module).params
    moved = _matching(frozen_names(state), names, "frozen", state)
    own = {**state.params, **state.buffers}
    params = {name: own[name] for name in known if name in state.params or name in moved}
    buffers = {name: value for name, value in state.buffers.items() if name not in moved}
    return _with(state, params, buffers, tx, moved)


@checked(ConfigError, failed=True)
def freeze(state: TrainState, names: Filter, tx: GradientTransformation) -> TrainState:
    """Return a state in which some parameters are trained no more: they get no gradient and no optimizer state.

    Args:
        state: from `ps.init` or a run; not split over processes.
        names: a filter of parameters.
        tx: the transformation of the run to come, see `thaw`.

    Raises:
        StepError: no parameter matches, or all do.
        OptimError: the optimizer state is that of another transformation.
        ConfigError: the state is split over processes.

    Examples:
        >>> import torch
        >>> import purestep as ps
        >>> tx = ps.optim.adam(1e-3)
        >>> state = ps.init(torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 2)), tx)
        >>> list(freeze(state, "0.*", tx).params)
        ['1.weight', '1.bias']
    """
    moved = _matching(list(state.params), names, "trained", state)
    params = {name: value for name, value in state.params.items() if name not in moved}
    if not params:
        raise StepError(explain("the filter names= freezes all parameters", where=f"{names!r}"))
    buffers = {**state.buffers, **{name: state.params[name] for name in moved}}
    return _with(state, params, buffers, tx, ())


def frozen_names(state: TrainState) -> list[str]:
    """Return the names of the parameters of a state's model that are not trained; they are in its buffers."""
    known = slots(definition(state).module).params
    return [name for name in state.buffers if name in known]


def _matching(candidates: list[str], names: Filter, kind: str, state: TrainState) -> list[str]:
    if any(is_split(leaf) for leaf in tree.leaves(state)):
        raise ConfigError(
            explain(
                "a state that is split over processes cannot change what it trains",
                instead="state = plan.place(ps.thaw(plan.gather(state), names, tx))",
            )
        )
    found = [name for name in candidates if tree.matches(names, name)]
    if not found:
        shown = ", ".join(candidates[:8]) or "none"
        raise StepError(explain(f"names= matches no {kind} parameter", where=f"{names!r}; {kind}: {shown}"))
    return found


def _with(
    state: TrainState,
    params: dict[str, Tensor],
    buffers: dict[str, Tensor],
    tx: GradientTransformation,
    new: Collection[str],
) -> TrainState:
    check_transformation(tx)
    opt_state = _carried(state.opt_state, tx.init(params), set(state.params), set(params), set(new))
    return state.replace(params=params, buffers=buffers, opt_state=opt_state)


def _carried(old: Any, fresh: Any, before: set[str], after: set[str], new: set[str]) -> Any:
    """Return a fresh optimizer state with the leaves of the old one in their places.

    What belongs to new parameters alone, counters included, stays fresh.
    """
    fresh = copied(fresh)  # each leaf a tensor of its own, found again by its id
    leaves = {path: leaf for path, leaf in nodes(old) if isinstance(leaf, Tensor)}
    there = {path: leaf for path, leaf in nodes(fresh) if isinstance(leaf, Tensor)}
    lost = [path for path in leaves if path not in there and path[-1] not in before - after]
    if lost:
        raise OptimError(
            explain(
                "the optimizer state is that of another transformation",
                where=f"it has {'.'.join(lost[0])}, for which tx has no place",
                instead="tx: that of the run before, with the same labels where it has parts",
            )
        )
    trained: dict[Path, set[str]] = {}  # by node of the fresh state: the parameters that have state in it
    for path in there:
        if path and path[-1] in after:
            for depth in range(len(path)):
                trained.setdefault(path[:depth], set()).add(path[-1])

    def value(path: Path, leaf: Tensor) -> Tensor:
        alone = any(trained.get(path[:depth], before) <= new for depth in range(len(path)))
        kept = leaves.get(path)
        fits = kept is not None and kept.shape == leaf.shape and kept.dtype == leaf.dtype
        return kept if fits and not alone and kept is not None else leaf

    chosen = {id(leaf): value(path, leaf) for path, leaf in nodes(fresh) if isinstance(leaf, Tensor)}
    return tree.map(lambda leaf: chosen[id(leaf)] if isinstance(leaf, Tensor) else leaf, fresh)
