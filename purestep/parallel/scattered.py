"""One microbatch of ZeRO 2: parameters are whole on every rank, the sum of each gradient is split over the ranks.

Buckets of gradients are filled as the backward pass makes them, the last layers first, and each bucket is sent as it is
full: every rank gets the sum of its own parts, and lets go of the whole gradients.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Mapping
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from purestep import _torch
from purestep.grad import stop_gradient
from purestep.metrics import Metric
from purestep.microbatch import Accumulation, Context, Gradients, Tensors, Weight
from purestep.parallel.assignment import Shares
from purestep.parallel.fsdp import Sharded, ShardedExchange
from purestep.parallel.fsdp_order import Orders
from purestep.parallel.fsdp_units import Unit
from purestep.parallel.sync_batchnorm import synced
from purestep.parallel.zero import grouped
from purestep.precision.cast_params import Uncast
from purestep.sharding.spec import Spec
from purestep.sharding.step_account import BUCKETS
from purestep.state import TrainState, definition


class Scattered(Sharded):
    """The sums of one batch on ranks that hold whole parameters and split their gradients.

    Args:
        shares: who computes what.
        sums: what is added and divided.
        params: whole parameters.
        specs: where those are updated whose gradients are split.
        orders: not used here: buckets leave in one order.
    """

    def __init__(
        self, shares: Shares, sums: Accumulation, params: Tensors, specs: Mapping[str, Spec], orders: Orders
    ) -> None:
        super().__init__(shares, sums, {n: params[n] for n in specs}, orders)
        self.specs = specs

    def exchange(self, number: int, index: int, *, last: bool) -> ScatteredExchange:
        return ScatteredExchange(self, number, index, last)

    def buckets(self, like: Tensors) -> Buckets:
        """Return the buckets of gradients in the dtypes of some tensors, the last parameters first."""
        where = [(n, tuple(like[n].shape), like[n].dtype, spec) for n, spec in reversed(list(self.specs.items()))]
        rows = grouped(self.shares.plan, where, BUCKETS)
        units = [Unit(i, "", r, [row.name for row in r.rows]) for i, r in enumerate(rows)]
        mesh, axes = self.shares.plan.mesh, self.shares.plan.shard_axes
        return Buckets(units, mesh.group(*axes), mesh.size(*axes), self.sums.state.step.device)


@dataclasses.dataclass
class Buckets:
    """Gradients that travel together; see `fsdp.Travelling`."""

    units: list[Unit]
    group: dist.ProcessGroup | None
    count: int
    device: torch.device


class ScatteredExchange(ShardedExchange):
    """The exchange of one microbatch of a model whose parameters are whole and whose gradients are split."""

    sharded: Scattered
    collects = False
    repeatable = False
    gathers = ()

    # --- what a step calls, see `MicrobatchExchange` ---

    def tracked(self, cast: Uncast, params: Tensors) -> Tensors:
        self.cast = cast
        self._expect(params)
        return params

    def bound(
        self, tracked: Tensors, buffers: Tensors, around: Context | None
    ) -> tuple[Tensors, Tensors, Context | None]:
        # The hooks of leaves run inside the backward pass, so full buckets leave while it computes the next gradients.
        for name in self.split:
            tracked[name].register_hook(functools.partial(self._computed, name))
        return tracked, buffers, synced(self.shares, self.counts, self.factor, around)

    def plain(self, new: dict[str, Tensor], old: Tensors) -> dict[str, Tensor]:
        return new

    def forward_done(self, weight: Weight, buffers: Tensors, metrics: Mapping[str, Metric]) -> None:
        with _torch.no_torch_function(), torch.no_grad():
            self._begin(*stop_gradient((weight, dict(buffers), dict(metrics))))

    def backward_done(self, cast: Uncast, grads: Tensors) -> Tensors:
        with torch.no_grad():
            self._end(cast, grads)
        return grads

    def gathered(self, view: TrainState) -> TrainState:
        return view

    def taken(self, part: Gradients, view: TrainState) -> Gradients:
        self.cast = Uncast(definition(view).module)
        self._expect(part.grads)
        self._begin(part.weight, part.buffers, part.metrics)
        for name in self.home:
            self._fill(name, part.grads[name])
        self._end(self.cast, part.grads)
        return part

    # --- what happens to it ---

    def _expect(self, like: Tensors) -> None:
        """Prepare for gradients like these tensors."""
        self.parts = like
        self.units = self.sharded.units = self.sharded.buckets(like)
        self.home = {name: unit for unit in self.units.units for name in unit.trained}
        self.grads: dict[str, Tensor] = {}
        self.missing = [len(unit.trained) for unit in self.units.units]
        self.next = 0

    def _computed(self, name: str, grad: Tensor) -> Tensor:
        # What happens here is no operation of the model: no mode of it has to look.
        with _torch.no_torch_function(), torch.no_grad():
            self._fill(name, grad)
            # The bucket has it, and autograd would hold it until the backward pass ends: it gets one without memory.
            return grad.new_empty(()).expand(grad.shape)

    def _fill(self, name: str, grad: Tensor) -> None:
        self.grads[name] = grad
        self.missing[self.home[name].number] -= 1
        while self.next < len(self.missing) and not self.missing[self.next]:
            self._leave(self.units.units[self.next])

    def _leave(self, unit: Unit) -> None:
        """Send a bucket; parameters that the loss does not depend on have no gradient, which stands for zeros."""
        self.next = unit.number + 1
        self.take(unit, [self.grads.pop(name, None) for name in unit.trained])
        self.reduce(unit)

    def _end(self, cast: Uncast, grads: Any) -> None:
        for unit in self.units.units[self.next :]:
            self._leave(unit)
        self._finish(cast.reduced({n: grads[n] for n in self.sharded.whole}))
