"""Making DTensors out of parts, and the private names of torch that it takes.

Importing this file imports torch's DTensor, which takes seconds: functions that need it import it where they are
called. Seen to work on torch 2.11.0, 2.13.0 and 2.14.1.

    DTensorSpec, TensorMeta what a DTensor is made of. `DTensor.from_local(run_check=False, shape=..., stride=...)` does
                            the same with an autograd node and twenty times the time, for each leaf of each step.
    StridedShard            a dim that a later axis of the mesh splits before an earlier one. Without it: such specs
                            have no DTensor, and products of plans would have to order their mesh axes otherwise.
    Placement               `Home` is one of our own, that torch only carries. torch 2.11 asks its own rules before
                            `AtHome`, and refuses `x + y` of such tensors; copies and casts, which purestep needs, go.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor as DTensor
from torch.distributed.tensor import Placement as Placement
from torch.distributed.tensor import Replicate as Replicate
from torch.distributed.tensor import Shard as Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec as DTensorSpec
from torch.distributed.tensor._dtensor_spec import TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

from purestep import tree
from purestep._torch import from_part, layout_of, local_tensor
from purestep.errors import ConfigError, explain

__all__ = ["StridedShard"]


class Home(Placement):
    """The whole tensor on one coordinate of a mesh axis, and nothing of it on the others."""

    def __init__(self, coordinate: int) -> None:
        super().__init__()
        self.coordinate = coordinate

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Home) and other.coordinate == self.coordinate

    def __hash__(self) -> int:
        return hash((Home, self.coordinate))

    def __reduce__(self) -> tuple[type[Home], tuple[int]]:
        return Home, (self.coordinate,)

    def __repr__(self) -> str:
        return f"Home({self.coordinate})"


class AtHome(DTensor):
    """A DTensor with `Home` on some axis: of torch's operations it takes those that go element by element.

    torch does not know that placement. Each rank computes with what it has, so `x.to(dtype)` or `x.clone()` of a state
    at rest is what it is of any other tensor.
    """

    @classmethod
    def __torch_dispatch__(  # type: ignore[override]  # torch's stub of it is no classmethod
        cls, func: Any, types: Sequence[type], args: Sequence[Any] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        given = [x for x in tree.leaves((tuple(args), kwargs or {})) if isinstance(x, cls)]
        first = given[0]
        mixed = any(x.shape != first.shape or x.placements != first.placements for x in given)

        def part(x: Any) -> Any:
            return local_tensor(x) if isinstance(x, cls) else x

        out = func(*tree.map(part, tuple(args)), **tree.map(part, dict(kwargs or {})))
        if mixed or not isinstance(out, Tensor) or out.shape != local_tensor(first).shape:
            _refuse(func, first)
        if any(out is local_tensor(x) for x in given):
            return next(x for x in given if local_tensor(x) is out)
        known = layout_of(first)
        return from_part(cls, out, known if out.dtype == first.dtype else with_dtype(known, out.dtype))


def _refuse(func: Any, x: Tensor) -> NoReturn:
    raise ConfigError(
        explain(
            "an operation needs the whole of a tensor that one stage of a pipeline has",
            where=f"{func} of {list(x.shape)}",
            instead="plan.gather(state)   # the whole state on every rank",
        )
    )


def layout(
    mesh: DeviceMesh,
    placements: Sequence[Placement],
    shape: Sequence[int],
    strides: tuple[int, ...],
    dtype: torch.dtype,
) -> DTensorSpec:
    """Return the spec of a DTensor."""
    return DTensorSpec(mesh, tuple(placements), tensor_meta=TensorMeta(torch.Size(shape), strides, dtype))


def with_dtype(known: DTensorSpec, dtype: torch.dtype) -> DTensorSpec:
    """Return the spec of the same placement in another dtype."""
    meta = known.tensor_meta
    if meta is None:
        return known
    return DTensorSpec(known.mesh, known.placements, tensor_meta=meta._replace(dtype=dtype))
