"""What a plan makes of a model once, and every step, evaluation and microbatch then uses."""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any, Generic, TypeVar

import torch.distributed as dist
from torch import nn

from purestep.distributed.mesh import world_size
from purestep.sharding.plan import Plan

T = TypeVar("T")


class PerModel(Generic[T]):
    """Remembers what `make` returns for a plan and a model, as long as the model lives and the job has this group.

    Args:
        make: a function of a plan and a model.
    """

    def __init__(self, make: Callable[[Plan, nn.Module], T]) -> None:
        self._make = make
        self._made: weakref.WeakKeyDictionary[nn.Module, dict[Any, T]] = weakref.WeakKeyDictionary()

    def __call__(self, plan: Plan, module: nn.Module) -> T:
        world = dist.group.WORLD if world_size() > 1 else None  # joins the processes that torchrun started
        known = self._made.setdefault(module, {})
        if (world, plan) not in known:
            known[world, plan] = self._make(plan, module)
        return known[world, plan]
