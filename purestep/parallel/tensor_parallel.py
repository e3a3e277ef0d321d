"""Tensor parallelism inside of a step: which parameters of a model are split, and binding it to their parts.

Gathered parameters come in as this rank's plain parts and the loss goes out as a plain number, so nothing around a
model knows. `split_tensor` is what the model computes with.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from typing import Any, TypeVar

from torch import Tensor, nn

from purestep import tree
from purestep.microbatch import Context, both
from purestep.module_tensors import slots
from purestep.parallel import split_layers, split_math, split_positions, split_views
from purestep.parallel.absent import Absent
from purestep.parallel.per_model import PerModel
from purestep.parallel.split_tensor import is_split, split, whole
from purestep.parallel.team import Blocks, Team
from purestep.sharding.plan import Plan

__all__ = ["split_layers", "split_math", "split_views"]  # imported for the rules that they register

T = TypeVar("T")


class Splitter:
    """What binds a model to parts. Made by `splitter`, once for a plan and a model.

    Args:
        plan: with a tensor axis.
        module: the model.
    """

    def __init__(self, plan: Plan, module: nn.Module) -> None:
        axis, self.model = plan.tensor_axis, type(module).__name__
        self.team = Team(
            plan.mesh.group(axis),
            plan.parts,
            fast=plan.reduction == "fast",
            sequence=plan.sequence_parallel,
            context=plan.context,
            ring=plan.attention == "ring",
        )
        self.cuts: dict[str, tuple[int, Blocks]] = {}
        known = slots(module)
        for name, places in (known.params | known.buffers).items():
            tensors, key = places[0]
            shape = tuple(tensors[key].shape)
            found = plan.tensor_cut(name, shape) if isinstance(tensors[key], nn.Parameter) else None
            if found is not None:
                self.cuts[name] = found

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """Return a parameter as the model computes with it: a split one as its parts."""
        if name not in self.cuts or isinstance(value, Absent) or is_split(value):
            return value
        at, blocks = self.cuts[name]
        return split(self.team.parameter(value, at, blocks), at, blocks, self.team)

    def around(self, module: nn.Module, inner: Context | None) -> Context | None:
        """Return what makes the context that the model runs in: under context parallelism its input is cut there."""
        if not self.team.context:
            return inner
        return functools.partial(both, functools.partial(split_positions.cutting, self.team, module), inner)

    def bound(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return parameters or buffers as the model computes with them."""
        return {name: self(name, value) for name, value in tensors.items()}

    def kept(self, new: Mapping[str, Tensor], old: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return the buffers after a call as plain tensors: frozen parameters are those that were given."""
        split_positions.check_called(self.team, self.model)
        self.team.forget()
        return {name: old[name] if name in self.cuts else whole(value) for name, value in new.items()}


_splitters = PerModel(Splitter)


def splitter(plan: Plan, module: nn.Module) -> Splitter:
    """Return what binds a model to parts under a plan with a tensor axis."""
    return _splitters(plan, module)


def plain_loss(loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of a model and a batch that returns plain tensors, whole on every rank."""

    def wrapped(net: nn.Module, batch: object) -> object:
        return _plain(loss_fn(net, batch))

    wrapped.__name__ = getattr(loss_fn, "__name__", "loss_fn")
    return wrapped


def _plain(out: T) -> T:
    def leaf(x: Any) -> Any:
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return dataclasses.replace(x, **{f.name: leaf(getattr(x, f.name)) for f in dataclasses.fields(x)})
        return whole(x)

    return tree.map(leaf, out)
