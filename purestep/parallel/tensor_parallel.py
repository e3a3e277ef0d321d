"""Tensor parallelism inside of a step: parameters as DTensors over the model axes of a plan, everything else whole.

Gathered parameters come in as local parts and the loss goes out as a plain number, so nothing around a model knows. The
bits depend on the number of tensor-parallel ranks, because matrix products are cut.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypeVar, cast

from torch import Tensor, nn
from torch.nn.functional import scaled_dot_product_attention
from torch.overrides import TorchFunctionMode

from purestep import _torch, tree
from purestep.errors import StepError, explain
from purestep.sharding import placement
from purestep.sharding.plan import Plan
from purestep.sharding.spec import Spec, placements

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

T = TypeVar("T")


def is_tensor_parallel(plan: Plan | None) -> bool:
    """Tell whether several ranks compute each microbatch together."""
    return plan is not None and plan.mesh.size(*plan.model_axes) > 1


def _mesh(plan: Plan) -> tuple[DeviceMesh, dict[str, int]]:
    axes = tuple(a for a in plan.model_axes if plan.mesh.size(a) > 1)
    return plan.mesh.device_mesh[axes], {a: plan.mesh.size(a) for a in axes}


class Wrapped:
    """What binds a model to DTensors: made once for a microbatch.

    Args:
        plan: with model axes of more than one rank.
        split: split leaves by name, as they are at rest.
    """

    def __init__(self, plan: Plan, split: Mapping[str, Tensor]) -> None:
        self.mesh, self.sizes = _mesh(plan)
        self.placed: dict[str, tuple[Any, ...]] = {}
        for name, leaf in split.items():
            entries = [tuple(a for a in axes if a in self.sizes) for axes in placement.spec_of_leaf(leaf).entries]
            self.placed[name] = placements(Spec(*entries), self.sizes)
        self.whole = placements(Spec(), self.sizes)

    def __call__(self, name: str, value: Tensor) -> Tensor:
        """Return a parameter or a buffer as a DTensor; its gradient comes back placed like it."""
        from purestep.sharding._dtensor import DTensor

        return DTensor.from_local(value, self.mesh, self.placed.get(name, self.whole), run_check=False)


def loss_on(plan: Plan, loss_fn: Callable[..., Any]) -> Callable[..., Any]:
    """Return a loss function that gives the model its batch whole on every rank, and returns plain tensors."""
    mesh, sizes = _mesh(plan)
    whole = placements(Spec(), sizes)

    def wrapped(net: nn.Module, batch: object) -> object:
        from torch.distributed.tensor.experimental import implicit_replication

        from purestep.sharding._dtensor import DTensor

        def spread(x: object) -> object:
            return DTensor.from_local(x, mesh, whole, run_check=False) if isinstance(x, Tensor) else x

        with implicit_replication(), LocalAttention():
            out = loss_fn(net, tree.map(spread, batch))
            return _plain(out)

    wrapped.__name__ = getattr(loss_fn, "__name__", "loss_fn")
    return wrapped


def _plain(out: T) -> T:
    def leaf(x: object) -> object:
        if placement.is_split(x):
            return x.full_tensor()
        if dataclasses.is_dataclass(x) and not isinstance(x, type):
            return dataclasses.replace(x, **{f.name: leaf(getattr(x, f.name)) for f in dataclasses.fields(x)})
        return x

    return tree.map(leaf, out)


class LocalAttention(TorchFunctionMode):
    """Run attention on the heads of this rank: its kernels know no DTensors, and heads nothing of each other."""

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Sequence[type],
        args: Sequence[Any] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> object:
        kwargs = kwargs or {}
        if func is not scaled_dot_product_attention or not placement.is_split(args[0] if args else kwargs["query"]):
            return func(*args, **kwargs)
        query = args[0] if args else kwargs["query"]
        from purestep.sharding._dtensor import DTensor, Shard

        layout = _torch.layout_of(query)
        for p in layout.placements:
            if p.is_partial() or (isinstance(p, Shard) and p.dim not in (0, 1)):
                raise StepError(
                    explain(
                        "attention is split along a dim that its heads share",
                        where=f"query: {tree.describe(query)}, {layout.placements}",
                        why="a rank attends with its own heads, [batch, heads, length, width], split along 1",
                        instead='split the weights of q, k and v by rows, Spec("tensor"), and that of the output by '
                        'columns, Spec(None, "tensor"); one matrix for all three cannot be split',
                    )
                )

        def local(x: T) -> T:
            return cast(T, x.redistribute(placements=layout.placements).to_local()) if placement.is_split(x) else x

        parts = [local(x) for x in args[:3]] + list(args[3:])
        named = {k: local(x) if k in ("query", "key", "value") else x for k, x in kwargs.items()}
        return DTensor.from_local(func(*parts, **named), layout.mesh, layout.placements, run_check=False)
