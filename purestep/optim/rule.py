"""Base of most `scale_by_*` rules: named memory for each parameter, a count, and one formula over lists of tensors.

A rule names its memory and overrides `direction`; flattening, state and structure checks are here. The paths of the
state read `opt_state.scale_by_lion.mu['0.weight']`.
"""

from __future__ import annotations

from typing import Any, ClassVar

import torch
from torch import Tensor

from purestep import tree
from purestep.errors import OptimError, explain
from purestep.optim.base import GradientTransformation, need_params, new_count, same_leaves, wide
from purestep.optim.kernels import foreach as fx
from purestep.optim.named_states import parts

Memory = dict[str, list[Tensor]]


class Rule(GradientTransformation):
    """A transformation with one tensor per parameter under each name in `memory`.

    Attributes:
        memory: names of the remembered tensors, in order.
        needs_params: whether `direction` reads the parameters.
    """

    memory: ClassVar[tuple[str, ...]] = ()
    needs_params: ClassVar[bool] = False

    def initial(self, name: str, param: Tensor) -> Tensor:
        """Return the initial value of a memory; zeros unless overridden."""
        return torch.zeros_like(param)

    def direction(self, gs: list[Tensor], memory: Memory, t: Tensor, ps: list[Tensor]) -> tuple[list[Tensor], Memory]:
        """Return the updates and the new memory.

        Args:
            gs: gradients, in the dtypes of the memory.
            memory: the remembered tensors by name; never written to.
            t: the number of this update, from 1, as a float64 scalar.
            ps: the parameters, when `needs_params`, else an empty list.
        """
        raise OptimError(explain(f"{type(self).__name__} has no formula", instead="override `direction`"))

    def init(self, params: Any) -> Any:
        trees = [tree.map(lambda p, name=name: self.initial(name, p), params) for name in self.memory]
        return parts(("count", *self.memory), [new_count(params), *trees])

    def update(self, updates: Any, state: Any, params: Any = None, **extra: Any) -> tuple[Any, Any]:
        gs, treedef = tree.flatten(updates)
        memory = {name: same_leaves(getattr(state, name), treedef, updates, name) for name in self.memory}
        ps = same_leaves(need_params(params, self.name), treedef, updates, "params") if self.needs_params else []
        if self.memory:
            gs = fx.cast(gs, memory[self.memory[0]])
        count = state.count + 1
        us, memory = self.direction(gs, memory, wide(count), ps)
        trees = [tree.unflatten(treedef, memory[name]) for name in self.memory]
        return tree.unflatten(treedef, us), parts(("count", *self.memory), [count, *trees])
