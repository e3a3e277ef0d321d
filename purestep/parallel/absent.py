"""`Absent`: what stands in a module for a parameter that is not gathered. It has a shape, and refuses to be computed
with.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from purestep.errors import ConfigError, explain
from purestep.recompute import recomputing
from purestep.sharding.plan import Plan

_KNOWN = {"shape", "dtype", "device", "requires_grad", "ndim", "layout", "is_leaf", "is_cuda", "is_sparse"}
_ASKED = {Tensor.size, Tensor.dim, Tensor.numel, Tensor.is_floating_point, Tensor.is_complex, Tensor.__hash__}


class Absent(Tensor):
    """A parameter of a unit that is not running."""

    parameter: str
    unit: str

    @classmethod
    def of(cls, name: str, shape: Sequence[int], like: Tensor, plan: Plan) -> Absent:
        """Return the stand-in of a parameter of a shape, in the dtype and on the device of its local part."""
        made = torch.zeros((), dtype=like.dtype, device=like.device).expand(shape).as_subclass(cls)
        made.parameter, made.unit = name, plan.unit(name)
        return made

    @classmethod
    def __torch_function__(
        cls,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        asked = getattr(func, "__self__", None)
        if func in _ASKED or (getattr(func, "__name__", "") == "__get__" and getattr(asked, "__name__", "") in _KNOWN):
            return super().__torch_function__(func, types, args, kwargs or {})
        given = [*args, *(kwargs or {}).values()]
        found = [x for y in given for x in (y if isinstance(y, (tuple, list)) else (y,)) if isinstance(x, Absent)]
        name = found[0].__dict__["parameter"] if found else "a parameter"
        unit = found[0].__dict__["unit"] if found else ""
        if recomputing():
            raise _inside(name, unit, getattr(func, "__name__", repr(func)))
        raise ConfigError(
            explain(
                f"the parameter {name!r} was used while its unit {unit!r} was not running",
                where=f"in {getattr(func, '__name__', func)}",
                why="the parameters of a unit are whole during the call of its submodule only; elsewhere this rank "
                "has a part of them",
                instead=f"call the submodule {unit!r} itself, as model.{unit}(x)\n"
                "or fsdp(units=...) with globs of the submodules to gather by themselves; parameters of no unit are "
                "whole during the whole call of the model: fsdp(units=())",
            )
        )


def _inside(name: str, unit: str, where: str) -> ConfigError:
    return ConfigError(
        explain(
            f"a checkpoint inside of the unit {unit!r} uses its parameter {name!r} in the backward pass",
            where=f"in {where}",
            why="what it recomputes runs outside of the unit, where this rank has a part of its parameters",
            instead=f"a checkpoint around the call of the unit: ps.checkpoint(model.get_submodule({unit!r}), x)\n"
            "or fsdp(units=...) with globs of the submodules that are called inside of the checkpoint\n"
            "or fsdp(units=()), where all parameters are whole during the whole call of the model",
        )
    )
