"""Making DTensors out of parts, and the private names of torch that it takes.

Importing this file imports torch's DTensor, which takes seconds: functions that need it import it where they are
called. Seen to work on torch 2.11.0, 2.13.0 and 2.14.1.

    DTensorSpec, TensorMeta what a DTensor is made of. `DTensor.from_local(run_check=False, shape=..., stride=...)` does
                            the same with an autograd node and twenty times the time, for each leaf of each step.
    StridedShard            a dim that a later axis of the mesh splits before an earlier one. Without it: such specs
                            have no DTensor, and products of plans would have to order their mesh axes otherwise.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor as DTensor
from torch.distributed.tensor import Placement as Placement
from torch.distributed.tensor import Replicate as Replicate
from torch.distributed.tensor import Shard as Shard
from torch.distributed.tensor._dtensor_spec import DTensorSpec as DTensorSpec
from torch.distributed.tensor._dtensor_spec import TensorMeta
from torch.distributed.tensor.placement_types import _StridedShard as StridedShard

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
