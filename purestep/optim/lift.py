"""Any `torch.optim.Optimizer` class as a pure transformation, third-party ones too.

An update makes the optimizer over copies, loads the state into it, lets it step, and reads the changed values back. So
optimizers that rebind their state work, as do those that write into it; the public
`torch.optim.swap_in_optimizer_params_and_state` would lose rebound tensors. Unlike the optimizers of this package, a
lifted one cannot be traced or mapped.
"""

from __future__ import annotations

import dataclasses
import inspect as python_inspect
from collections import defaultdict
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from torch import Tensor

from purestep import _torch, transforms, tree
from purestep.arguments import NonNegative, checked
from purestep.errors import OptimError, explain
from purestep.optim.base import (
    GradientTransformation,
    Scalar,
    ScalarOrSchedule,
    StepNumber,
    need_params,
    new_count,
    same_leaves,
    transformation,
    value_at,
)
from purestep.optim.kernels import foreach as fx
from purestep.optim.masks import by_name
from purestep.optim.schedules.base import ScheduleBase
from purestep.optim.weight_decay import fixed_filter
from purestep.tree import static

Slots = dict[str, dict[str, Tensor]]


@tree.pytree
class LiftedState:
    """`slots`: the optimizer's per-parameter state, `{key: {parameter: tensor}}`; `groups`: numbers in its param
    groups.

    `numbers`: keys that the optimizer keeps as Python numbers; `first_differs`: whether the first update of a new
    optimizer differs from an update from the initial state.
    """

    count: Tensor
    slots: Slots
    groups: dict[str, dict[str, Tensor]]
    numbers: tuple[str, ...] = static()
    first_differs: bool = static()


T = TypeVar("T")
_CARDS = ("cuda", "xpu")  # devices on which torch's optimizers can keep their numbers


@transformation
class Lift(GradientTransformation):
    optimizer: type[torch.optim.Optimizer]
    learning_rate: ScalarOrSchedule | None = None
    arguments: tuple[tuple[str, Any], ...] = ()
    param_groups: tuple[tuple[tuple[str, Any], ...], ...] = ()

    def init(self, params: Any) -> LiftedState:
        named = by_name(params)
        with torch.no_grad():
            initial, group_values, numbers = self._discover(named)
            differs = self._first_differs(named, initial, group_values, numbers)
        return LiftedState(new_count(params), initial, group_values, numbers, differs)

    def update(
        self, updates: Any, state: Any, params: Any = None, *, step: StepNumber | None = None, **extra: Any
    ) -> tuple[Any, Any]:
        gs, treedef = tree.flatten(updates)
        ps = same_leaves(need_params(params, repr(self)), treedef, updates, "params")
        if ps and all(p.is_meta for p in ps):
            # A dry run on meta tensors: nothing is computed, and every shape is known.
            return tree.map(torch.empty_like, params), dataclasses.replace(state, count=state.count + 1)
        self._check_context(gs, ps)
        named, grads = by_name(params), by_name(updates)
        moved, slots, groups = self._stepped(named, grads, state, step)
        if state.first_differs:
            fresh, first, first_groups = self._stepped(named, grads, state, step, anew=True)
            new = state.count == 0
            moved, slots, groups = fx.select_tree(new, (fresh, first, first_groups), (moved, slots, groups))
        us = fx.sub([moved[name] for name in named], list(named.values()))
        following = LiftedState(state.count + 1, slots, groups, state.numbers, state.first_differs)
        return tree.unflatten(treedef, us), following

    def _check_context(self, gs: list[Tensor], ps: list[Tensor]) -> None:
        if transforms.active() or _torch.dispatch_modes() > 0:
            raise OptimError(
                explain(
                    "a lifted torch optimizer cannot be traced or mapped",
                    where=repr(self),
                    why="it reads numbers on the host and writes in place, as torch's optimizers do",
                    instead="one of purestep.optim's own optimizers, or an eager step",
                )
            )

    def _stepped(
        self,
        named: dict[str, Tensor],
        grads: dict[str, Tensor],
        state: LiftedState,
        step: StepNumber | None,
        *,
        anew: bool = False,
    ) -> tuple[dict[str, Tensor], Slots, dict[str, dict[str, Tensor]]]:
        """Let the optimizer take one step over copies, from the state, or (`anew`) as a new optimizer."""
        copies = _copied({name: p.detach() for name, p in named.items()})
        given = _copied({name: grads[name].detach().to(copy.dtype) for name, copy in copies.items()})
        for name, copy in copies.items():
            copy.requires_grad_().grad = given[name]
        optimizer = self._made(copies, step)
        if not anew:
            read = _on_host(({k: v for k, v in state.slots.items() if k in state.numbers}, state.groups))
            own = _copied({k: v for k, v in state.slots.items() if k not in state.numbers})
            for key, values in state.slots.items():
                for name in values:
                    number = key in state.numbers
                    optimizer.state[copies[name]][key] = read[0][key][name].item() if number else own[key][name]
            for index, values in read[1].items():
                optimizer.param_groups[int(index)].update({k: v.item() for k, v in values.items()})
        _step(optimizer)
        groups = {
            index: {key: _tensor(optimizer.param_groups[int(index)][key], like) for key, like in values.items()}
            for index, values in state.groups.items()
        }
        return {n: c.detach() for n, c in copies.items()}, _slots(optimizer, copies), groups

    def _made(self, copies: dict[str, Tensor], step: StepNumber | None) -> torch.optim.Optimizer:
        arguments = {name: _argument_at(value, step, name) for name, value in self.arguments}
        # On a card torch counts steps on the host unless told otherwise, and would read each parameter's count there.
        capturable = self._counts_on_card(copies)
        if capturable:
            arguments["capturable"] = True
            # What torch chooses by itself for plain tensors on a card; the choice is then the same wherever they live.
            if self._takes("foreach"):
                arguments["foreach"] = True
        if self.learning_rate is not None:
            rate = value_at(self.learning_rate, step)
            arguments["lr"] = rate if capturable and isinstance(rate, Tensor) else float(rate)
        members: list[list[Tensor]] = [[] for _ in range(len(self.param_groups) + 1)]
        for name, copy in copies.items():
            found = (i for i, group in enumerate(self.param_groups) if tree.matches(dict(group)["params"], name))
            members[next(found, len(self.param_groups))].append(copy)
        options = [{k: v for k, v in group if k != "params"} for group in self.param_groups] + [{}]
        groups = [{"params": m, **o} for m, o in zip(members, options, strict=True) if m]
        return self.optimizer(groups, **arguments)

    def _counts_on_card(self, copies: dict[str, Tensor]) -> bool:
        """Tell whether the optimizer can keep its numbers on the card, where the parameters are, and was not told to or
        not to."""
        if not copies or any(copy.device.type not in _CARDS for copy in copies.values()):
            return False
        return self._takes("capturable") and "fused" not in dict(self.arguments)

    def _takes(self, option: str) -> bool:
        """Tell whether the class takes an option that it was not given."""
        return option in python_inspect.signature(self.optimizer).parameters and option not in dict(self.arguments)

    def _discover(self, named: dict[str, Tensor]) -> tuple[Slots, dict[str, dict[str, Tensor]], tuple[str, ...]]:
        """Find the initial state: the values that the optimizer first stores under each key, before later writes."""
        copies = {name: p.detach().clone().requires_grad_() for name, p in named.items()}
        for copy in copies.values():
            copy.grad = torch.zeros_like(copy)
        optimizer = self._made(copies, 0)
        # Some optimizers, such as Adagrad, fill their state in the constructor and expect it in a step.
        made = {copy: _FirstValues(values) for copy, values in optimizer.state.items()}
        optimizer.state = defaultdict(_FirstValues, made)
        before = [{k: v for k, v in g.items() if _is_number(v)} for g in optimizer.param_groups]
        _step(optimizer)
        slots: Slots = {}
        numbers = []
        for name, copy in copies.items():
            for key, value in getattr(optimizer.state.get(copy), "first", {}).items():
                slots.setdefault(key, {})[name] = _tensor(value, None)
                if _is_number(value) and key not in numbers:
                    numbers.append(key)
        groups = {}
        for index, (old, group) in enumerate(zip(before, optimizer.param_groups, strict=True)):
            changed = {k: _tensor(v, None) for k, v in old.items() if group[k] != v}
            if changed:
                groups[str(index)] = changed
        return slots, groups, tuple(numbers)

    def _first_differs(self, named: dict[str, Tensor], slots: Slots, groups: Any, numbers: tuple[str, ...]) -> bool:
        """Tell whether a new optimizer's first step differs from a step from the found initial state."""
        grads = {n: torch.sin(torch.arange(1.0, p.numel() + 1)).reshape(p.shape).to(p) for n, p in named.items()}
        start = LiftedState(torch.zeros(()), slots, groups, numbers, False)
        fresh = self._stepped(named, grads, start, 0, anew=True)
        continued = self._stepped(named, grads, start, 0)
        if tree.structure(fresh[1]) != tree.structure(continued[1]) or tree.structure(continued[1]) != tree.structure(
            slots
        ):
            raise OptimError(
                explain(
                    "this optimizer's state does not keep its structure from one step to the next",
                    where=repr(self),
                    why="a state of another structure cannot be restored, compared or selected",
                    instead="one of purestep.optim's own optimizers",
                )
            )
        return not tree.equal(fresh, continued)

    def hyperparams(self, state: Any, step: StepNumber | None = None) -> dict[str, Scalar]:
        return {} if self.learning_rate is None else {"learning_rate": value_at(self.learning_rate, step)}

    def __repr__(self) -> str:
        shown = [f"torch optimizer {self.optimizer.__name__}"]
        if self.learning_rate is not None:
            shown.append(f"lr={self.learning_rate!r}")
        return f"lift({', '.join(shown + [f'{k}={v!r}' for k, v in self.arguments])})"


@checked(OptimError)
def lift(
    optimizer: Any,
    lr: NonNegative[ScalarOrSchedule] | None = None,
    *,
    param_groups: Sequence[dict[str, Any]] = (),
    **arguments: Any,
) -> GradientTransformation:
    """Make any torch optimizer class a pure transformation.

    Args:
        optimizer: the class, `torch.optim.ASGD` or a third party's; not an instance.
        lr: its learning rate: a number, or a schedule of the number of applied updates; None for the class's default.
        param_groups: torch's param groups, with a filter of dotted names in place of the parameters: `[{"params":
            "*bias", "weight_decay": 0.0}]`. The first match wins; the other parameters form a last group.
        **arguments: the other arguments of the class. A number may be replaced by a schedule of `ps.optim`, also within
            a tuple such as `betas`.

    Returns:
        A transformation with the state `LiftedState(count, slots, groups)`; `update` needs `params`. It runs eagerly
        only. Adding its updates gives torch's parameters exactly, unless a parameter more than doubles or halves in an
        update: then up to rounding.

    Raises:
        OptimError: not an optimizer class, one that needs a closure, or one whose state changes its structure.

    Examples:
        >>> tx = lift(torch.optim.SGD, lr=0.1, momentum=0.9)
        >>> params = {"w": torch.ones(2)}
        >>> updates, state = tx.update(params, tx.init(params), params)
        >>> updates, state.slots["momentum_buffer"]
        ({'w': tensor([-0.1000, -0.1000])}, {'w': tensor([1., 1.])})

    Reference: `torch.optim.Optimizer`.
    """
    if not (isinstance(optimizer, type) and issubclass(optimizer, torch.optim.Optimizer)):
        where, instead = f"{type(optimizer).__name__}", "lift(torch.optim.SGD, lr=0.1, momentum=0.9)"
        raise OptimError(
            explain("lift takes the class of a torch optimizer, and its arguments", where=where, instead=instead)
        )
    closure = python_inspect.signature(optimizer.step).parameters.get("closure")
    if closure is not None and closure.default is python_inspect.Parameter.empty:
        raise OptimError(
            explain(
                f"{optimizer.__name__} needs a closure that evaluates the loss again",
                why="it decides during a step how often to call it, and keeps lists that grow in its state",
                instead="optim.lbfgs(), with tx.update(..., value_fn=lambda params: loss)",
            )
        )
    for group in param_groups:
        if "params" not in group:
            raise OptimError(
                explain("a param group has no filter", where=repr(group), instead='{"params": "*bias", "lr": 0.1}')
            )
    groups = tuple(tuple((k, fixed_filter(v)) for k, v in group.items()) for group in param_groups)
    return Lift(optimizer, lr, tuple(arguments.items()), groups)


def _argument_at(value: Any, step: StepNumber | None, name: str) -> Any:
    """Return an argument at a step: schedules are called, other functions (a closure, a hook) are arguments."""
    if isinstance(value, tuple):
        return tuple(_argument_at(item, step, name) for item in value)
    return float(value_at(value, step, name)) if isinstance(value, ScheduleBase) else value


class _FirstValues(dict[str, Any]):
    """A parameter's state that keeps a copy of the first value under each key."""

    def __init__(self, values: Mapping[str, Any] | None = None) -> None:
        super().__init__()
        self.first: dict[str, Any] = {}
        for key, value in (values or {}).items():
            self[key] = value

    def __setitem__(self, key: str, value: Any) -> None:
        if key not in self.first and value is not None:
            self.first[key] = value.detach().clone() if isinstance(value, Tensor) else value
        super().__setitem__(key, value)


def _copied(values: T) -> T:
    """Return a tree of copies."""
    leaves, structure = tree.flatten(values)
    return tree.unflatten(structure, fx.copies(leaves))


def _on_host(values: T) -> T:
    """Return a tree of numbers on the CPU, read from a card at once."""
    leaves, structure = tree.flatten(values)
    if len({leaf.device for leaf in leaves}) != 1 or leaves[0].device.type not in _CARDS:
        return tree.map(Tensor.cpu, values)
    wide = torch.stack([leaf.to(torch.float64) for leaf in leaves]).cpu()
    return tree.unflatten(structure, [x.to(leaf.dtype) for x, leaf in zip(wide, leaves, strict=True)])


def _step(optimizer: torch.optim.Optimizer) -> None:
    try:
        optimizer.step()
    except (RuntimeError, TypeError, ValueError, AttributeError, LookupError) as error:
        name = type(optimizer).__name__
        raise OptimError(
            explain(f"the lifted {name} failed in its step", why=f"{type(error).__name__}: {error}")
        ) from error


def _slots(optimizer: torch.optim.Optimizer, copies: dict[str, Tensor]) -> Slots:
    slots: Slots = {}
    for name, copy in copies.items():
        for key, value in optimizer.state.get(copy, {}).items():
            if value is not None:
                slots.setdefault(key, {})[name] = _tensor(value, None)
    return slots


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _tensor(value: Any, like: Tensor | None) -> Tensor:
    if isinstance(value, Tensor):
        return value.detach()
    if _is_number(value):
        kind = torch.float64 if isinstance(value, float) else torch.int64
        return torch.tensor(value, dtype=kind if like is None else like.dtype)
    raise OptimError(
        explain(
            f"an optimizer keeps a {type(value).__name__} in its state",
            why="only tensors and numbers can be kept by value",
        )
    )
