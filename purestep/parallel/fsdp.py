"""One microbatch of a model whose parameters are split over ranks: its gathers, and the sums of its gradients."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import weakref
from collections.abc import Callable, Collection, Hashable, Iterator, Mapping
from typing import Protocol

import torch
import torch.distributed as dist
from torch import Tensor, nn

from purestep import _torch
from purestep.distributed import collectives
from purestep.grad import stop_gradient
from purestep.metrics import Metric
from purestep.microbatch import Accumulation, Context, Gradients, Partial, Tensors, Weight, both
from purestep.parallel import expert_parallel, tensor_parallel
from purestep.parallel.assignment import Shares
from purestep.parallel.compressed import scatter_sum, sum_into
from purestep.parallel.expert_parallel import Taking
from purestep.parallel.expert_sums import ExpertSums
from purestep.parallel.fsdp_order import Orders
from purestep.parallel.fsdp_units import Session, Unit, Units
from purestep.parallel.small_exchange import exchange_small
from purestep.parallel.sync_batchnorm import synced
from purestep.parallel.tree_reduce import Flat, Slices, Summing, add, flat_like, rows_of, whole_sum
from purestep.precision.cast_params import Uncast
from purestep.sharding import placement
from purestep.sharding.plan import Plan
from purestep.state import TrainState, definition
from purestep.treesum import Node, TreeSum

_ANCHOR = ""  # the name of what is differentiated for the sake of parameters that are gathered


class Sharded:
    """The sums of one batch on ranks that hold parts of parameters.

    Args:
        shares: who computes what.
        sums: what is added and divided.
        split: split leaves (DTensors) by name.
        orders: what the ranks know of the order of units in this step.
    """

    def __init__(self, shares: Shares, sums: Accumulation, split: Mapping[str, Tensor], orders: Orders) -> None:
        self.shares, self.sums, self.orders = shares, sums, orders
        plan, module = shares.plan, definition(sums.state).module
        self.experts = expert_parallel.dispatcher(plan, module) if plan.expert_axis else None
        # Those of experts stay where they are: their gradients are of the tokens of all microbatches of a round.
        resident = () if self.experts is None else self.experts.names
        self.held = split
        self.split = {name: leaf for name, leaf in split.items() if name not in resident}
        self.resident = [name for name in sums.state.params if name in split and name in resident]
        self.fast, self.sent = shares.plan.reduction == "fast", shares.plan.sent_dtype
        self.whole = [name for name in sums.state.params if name not in split]
        self.flat = flat_like([])
        self.small: dict[Node, Partial] = {}
        self.trees: list[TreeSum[Tensor]] = []
        self.likes: list[Tensor] = []
        self.waiting: Callable[[], Partial]
        self.units: Travelling
        self.rest: Flat

    def exchange(self, number: int, index: int, *, last: bool) -> ShardedExchange:
        """Return the exchange of the microbatch that this rank computes in a round."""
        return ShardedExchange(self, number, index, last)

    def put(self, sums: list[Leaving], number: int) -> None:
        """Add the sums of a round over the ranks that share parameters."""
        if not self.trees:
            self.trees, self.likes = [TreeSum(add) for _ in sums], [x.like for x in sums]
        for total, one in zip(self.trees, sums, strict=True):
            for node, flat in one.nodes.items():
                total.put((0, number) if self.fast else node, flat)

    def result(self) -> Gradients:
        """Wait for the others, and return the mean over all microbatches."""
        total = self.waiting()
        flats = self.sums.divided(self._over_copies(), total.weight, owned=True)
        units = [u for u in self.units.units if u.trained]
        grads: dict[str, Tensor] = {}
        for unit, row in zip(units, flats, strict=False):
            grads.update(zip(unit.trained, unit.rows.parts(row, unit.chosen), strict=True))
        first = len(units) + len(self.flat.groups)
        grads.update(zip(self.resident, self.flat.unpack(flats[len(units) : first]), strict=True))
        slices = [collectives.gather(x, self.units.group) for x in flats[first:]]
        sizes = [sum(lengths) for lengths in self.rest.lengths]
        rest = self.rest.unpack([p.wait().view(-1)[:n] for p, n in zip(slices, sizes, strict=True)])
        grads.update(zip(self.whole, rest, strict=False))
        ordered = {name: grads[name] for name in self.sums.state.params}
        return self.sums.finish(ordered, rest[len(self.whole) :], total)

    def _over_copies(self) -> list[Tensor]:
        """Return the sums over the ranks that hold the same parts."""
        shares = self.shares
        if self.fast:
            units = sum(bool(unit.trained) for unit in self.units.units) + len(self.flat.groups)
            dtypes = [self.sent if k < units else None for k in range(len(self.trees))]
            begun_fast = [sum_into(t.result(), shares.copies, d) for t, d in zip(self.trees, dtypes, strict=True)]
            return [pending.wait() for pending in begun_fast]
        # Of a batch of few samples these ranks may have no microbatch at all.
        both = zip(self.trees, self.likes, strict=True)
        begun = [Summing(total.nodes, shares.groups, shares.copies, like) for total, like in both]
        for sum_ in begun:
            sum_.advance()
        return [whole_sum(sum_) for sum_ in begun]


@dataclasses.dataclass
class Leaving:
    """A sum over the ranks that share parameters, on its way and then here.

    Attributes:
        like: a flat tensor of its length.
        coming: what comes: slices that are added in the tree, or a sum of the backend.
        nodes: the parts of the tree that are here.
    """

    like: Tensor
    coming: Slices | collectives.Pending | None = None
    nodes: dict[Node, Tensor] = dataclasses.field(default_factory=dict)

    def further(self) -> None:
        """Wait for what is on its way, and launch the exchange between machines, where that follows."""
        if not isinstance(self.coming, Slices) or self.coming.further():
            self.arrive()

    def arrive(self) -> None:
        """Wait for the sum, once."""
        if isinstance(self.coming, Slices):
            self.nodes = self.coming.result().nodes
        elif self.coming is not None:
            self.nodes = {(0, 0): self.coming.wait()}
        self.coming = None


class Travelling(Protocol):
    """The units in which gradients travel: those of a model, or buckets of whole parameters."""

    @property
    def units(self) -> list[Unit]: ...

    @property
    def group(self) -> dist.ProcessGroup | None: ...

    @property
    def count(self) -> int: ...

    @property
    def device(self) -> torch.device: ...


class ShardedExchange:
    """The exchange of one microbatch of a model whose parameters are split.

    Args:
        sharded: the sums of the batch.
        number: of the round, the same on all ranks.
        index: of the microbatch. An empty one is run on other data, because the others need this rank's parts.
        last: whether it is the last one of this rank.

    Attributes:
        collects: whether gradients are taken on their way, so that none need be left at its end.
        gathers: names of parameters whose parts it copies to the card, where a plan offloads them.
    """

    collects = True
    dispatches = True
    repeatable = False  # units gather their parameters in it

    @property
    def gathers(self) -> Collection[str]:
        return self.split

    def __init__(self, sharded: Sharded, number: int, index: int, last: bool) -> None:
        self.sharded, self.shares, self.sums = sharded, sharded.shares, sharded.sums
        self.split, self.number, self.index, self.last = sharded.split, number, index, last
        self.owners = self.shares.rounds[number]
        self.counts = index < self.shares.filled
        self.weight: Weight = 0
        self._sent: dict[int, Leaving] = {}
        self._taken: dict[int, Tensor] = {}
        self.of_experts: ExpertSums | None = None
        self.parts: Tensors = {}
        self.units: Travelling

    # --- what a step calls, see `MicrobatchExchange` ---

    def check(self, state: TrainState) -> None:
        pass  # it is the view that holds this rank's shards, and the exchange gathers the others'

    def tracked(self, cast: Uncast, params: Tensors) -> Tensors:
        """Return what is differentiated: the parameters that are not split, and what stands for all others."""
        self.cast, self.params = cast, params
        # Split parameters are gathered inside of the forward pass, so they cannot be what is differentiated. Their
        # gradients come to the session on the way to the anchor, of which every gather is made to depend.
        anchor = torch.zeros((), device=self.sums.state.step.device)
        return {n: params[n] for n in self.sharded.whole} | {_ANCHOR: anchor}

    def bound(
        self, tracked: Tensors, buffers: Tensors, around: Context | None
    ) -> tuple[Tensors, Tensors, Context | None]:
        plan = self.shares.plan
        self.parts = parts = self._parts(self.params, buffers)
        self.units = self.sharded.units = units = self._units_of(self.cast.module, parts)
        wrap, order = wrapping(plan, self.cast.module), self.sharded.orders.of(units)
        self.session = Session(units, parts, reductions=self, wrap=wrap, anchor=tracked[_ANCHOR], order=order)
        params = {n: tracked.get(n, t) for n, t in self.params.items()}
        inner = synced(self.shares, self.counts, self.factor, around)
        if (experts := self.sharded.experts) is not None:
            sharded, reduced = self.sharded, self.cast.reduced
            self.of_experts = ExpertSums(sharded.resident, self.owners, sharded.fast, reduced, self._weighed_expert)
            inner = experts.around(Taking(tracked[_ANCHOR], self.of_experts), inner)
        return *_gathered(self.session, params, buffers), functools.partial(both, self.session.around, inner)

    def plain(self, new: dict[str, Tensor], old: Tensors) -> dict[str, Tensor]:
        """Return the buffers after the forward pass as the state holds them: of frozen parameters the shards."""
        return {n: old[n] if n in self.sharded.held else t for n, t in new.items()}

    def forward_done(self, weight: Weight, buffers: Tensors, metrics: Mapping[str, Metric]) -> None:
        self.session.end_forward()
        with _torch.no_torch_function(), torch.no_grad():
            self._begin(*stop_gradient((weight, dict(buffers), dict(metrics))))

    def backward_done(self, cast: Uncast, grads: Tensors) -> Tensors:
        """Take the gradients of the parameters that are not split; those of units were taken on their way."""
        with torch.no_grad():
            self.session.end_backward()
            self._finish(cast.reduced({n: grads[n] for n in self.sharded.whole}))
        self.session.close()
        return grads

    def factor(self) -> float | Tensor:
        """Return what the gradient is multiplied by later; known once the forward pass is done."""
        return self.sums.factor(self.weight, self.index)

    def gathered(self, view: TrainState) -> TrainState:
        """Return the state with full parameters, for a compiled piece: they stay until it has run."""
        self.parts = parts = self._parts(view.params, view.buffers)
        self.units = self.sharded.units = units = self._units_of(definition(view).module, parts)
        self.session = Session(units, parts)
        known = self.session.wholes()
        return view.replace(
            params={n: known.get(n, t) for n, t in view.params.items()},
            buffers={n: known.get(n, t) for n, t in view.buffers.items()},
        )

    def taken(self, part: Gradients, view: TrainState) -> Gradients:
        self.cast = Uncast(definition(view).module)
        buffers = {n: view.buffers[n] if n in self.split else t for n, t in part.buffers.items()}
        self._begin(part.weight, buffers, part.metrics)
        for unit in self.units.units:
            if unit.trained:
                rows = self._rows(unit, [part.grads[n] for n in unit.trained])
                self._sent[unit.number] = self._send(rows, self.sharded.sent)
        self._finish({n: part.grads[n] for n in self.sharded.whole})
        self.session.close()
        return part

    # --- what happens to it ---

    def _parts(self, params: Mapping[str, Tensor], buffers: Mapping[str, Tensor]) -> dict[str, Tensor]:
        return {n: (params if n in params else buffers)[n] for n in self.split}

    def _units_of(self, module: nn.Module, parts: Mapping[str, Tensor]) -> Units:
        state = self.sums.state
        return units_of(self.shares.plan, module, self.split, parts, state.params, state.step.device)

    def _begin(self, weight: Weight, buffers: Tensors, metrics: Mapping[str, Metric]) -> None:
        self.weight, sharded, shares = weight, self.sharded, self.shares
        if self.of_experts is not None:
            self.of_experts.forward_done()
            self.weights = self._weights(weight)
        rest, self.moved = self.sums.besides(weight, buffers, metrics)
        if self.counts:
            sharded.small[0, self.index] = rest
        if self.last:
            sharded.waiting = exchange_small(sharded.small, shares.leaves, shares.group, rest, self.sums)

    def take(self, unit: Unit, grads: list[Tensor | None]) -> None:
        """Take the gradients of a unit as its backward pass ends; those of the root are sent last."""
        with _torch.no_torch_function(), torch.no_grad():
            self._taken[unit.number] = self._rows(unit, grads)

    def reduce(self, unit: Unit) -> None:
        """Send the other ranks their parts of the gradients of a unit; zeros, if none were taken."""
        with _torch.no_torch_function(), torch.no_grad():
            # One reduction is under way at a time: waiting for the one before bounds the memory of packed gradients.
            # Of one that is sent on between machines little is left, so that it has the time of one more.
            for before in self._sent.values():
                before.further()
            rows = self._taken.pop(unit.number, None)
            rows = self._rows(unit, [None] * len(unit.trained)) if rows is None else rows
            self._sent[unit.number] = self._send(rows, self.sharded.sent)

    def _weighed_expert(self, grads: list[Tensor], rank: int, index: int) -> list[Tensor]:
        return self.sums.weighed(grads, self.weights[rank], index)

    def _weights(self, weight: Weight) -> list[Weight]:
        """Return what the microbatch of each rank of the axis of experts weighs."""
        group = self.units.group
        if isinstance(weight, int):
            return [weight] * collectives.size_of(group)
        return list(collectives.gather(weight.reshape(1), group).wait().view(-1).unbind())

    def _rows(self, unit: Unit, grads: list[Tensor | None]) -> Tensor:
        device = self.units.device
        wholes = [
            torch.zeros(row.shape, dtype=self.parts[row.name].dtype, device=device) if g is None else g
            for row, g in zip(unit.chosen, grads, strict=True)
        ]
        rows = unit.rows.cut(self.cast.reduced(wholes), unit.chosen)
        return self.sums.weighed([rows], self.weight, self.index if self.counts else 0)[0]

    def _send(self, rows: Tensor, dtype: torch.dtype | None = None) -> Leaving:
        group, like = self.units.group, rows.new_empty(1).expand(rows.shape[1])
        if self.sharded.fast:
            return Leaving(like, scatter_sum(rows if self.counts else torch.zeros_like(rows), group, dtype))
        held = rows.unsqueeze(1) if self.counts else rows.unsqueeze(1)[:, :0]
        return Leaving(like, Slices(held, self.owners, group))

    def _finish(self, whole: Mapping[str, Tensor]) -> None:
        """Exchange what is left, and hand over the sums: one flat tensor a unit, and those of the rest."""
        vector = [*(whole[n] for n in self.sharded.whole), *self.moved]
        self.sharded.rest = flat = flat_like(vector)
        pieces = self.sums.weighed(flat.pack(vector), self.weight, self.index if self.counts else 0)
        for unit in self.units.units:
            if unit.trained and unit.number not in self._sent:
                self.reduce(unit)
        sent = [self._sent[n] for n in sorted(self._sent)]
        if self.of_experts is not None:
            self.sharded.flat, found = self.of_experts.result(self.params)
            likes = self.sharded.flat.likes(self.units.device)
            sent += [Leaving(like, nodes=nodes) for like, nodes in zip(likes, found, strict=True)]
        sent += [self._send(rows_of(x, self.units.count)) for x in pieces]
        for x in sent:
            x.further()
        for x in sent:
            x.arrive()
        self.sharded.put(sent, self.number)


def evaluated(
    plan: Plan, at_rest: TrainState, cast: Uncast, params: Tensors, buffers: Tensors, orders: Orders
) -> tuple[Tensors, Tensors, Context | None]:
    """Return what a model is bound to without gradients: params, buffers, and what makes the context it runs in."""
    split = split_leaves(at_rest)
    if plan.expert_axis:
        resident = expert_parallel.dispatcher(plan, cast.module).names
        split = {n: x for n, x in split.items() if n not in resident}
    if not split:
        return params, buffers, cast.around
    parts = {n: (params if n in params else buffers)[n] for n in split}
    units = units_of(plan, cast.module, split, parts, params, at_rest.step.device)
    session = Session(units, parts, wrap=wrapping(plan, cast.module), order=orders.of(units))
    around = functools.partial(both, functools.partial(_alone, session), cast.around)
    return *_gathered(session, params, buffers), around


def _gathered(session: Session, params: Tensors, buffers: Tensors) -> tuple[Tensors, Tensors]:
    known = session.tensors()

    def full(group: Tensors) -> Tensors:
        return {n: known.get(n, t) for n, t in group.items()}

    return full(params), full(buffers)


@contextlib.contextmanager
def _alone(session: Session) -> Iterator[None]:
    """Run a forward pass that no backward pass follows."""
    with session.around():
        yield
        session.end_forward()
    session.end_backward()
    session.close()


def wrapping(plan: Plan, module: nn.Module) -> tensor_parallel.Splitter | None:
    """Return what makes of a gathered parameter what the model computes with, where several ranks compute together."""
    return tensor_parallel.splitter(plan, module) if plan.tensor_axis else None


def split_leaves(at_rest: TrainState) -> dict[str, Tensor]:
    """Return the parameters of a state of which ranks hold parts, trained and frozen, by name."""
    return {n: x for n, x in (at_rest.params | at_rest.buffers).items() if placement.is_split(x)}


_units: weakref.WeakKeyDictionary[nn.Module, dict[Hashable, tuple[object, Units]]] = weakref.WeakKeyDictionary()


def units_of(
    plan: Plan, module: nn.Module, split: Tensors, parts: Tensors, trained: Collection[str], device: torch.device
) -> Units:
    """Return the units of a model, made once for each plan and placement."""
    specs = [_torch.layout_of(x) for x in split.values()]
    key = (
        plan,
        tuple(split),
        tuple(id(spec) for spec in specs),
        tuple(parts[n].dtype for n in split),
        tuple(trained),
        device,
    )
    known = _units.setdefault(module, {})
    if key not in known:
        # The specs are kept, so that nothing else can get their ids.
        known[key] = specs, Units(plan, module, split, parts, trained, device)
    return known[key][1]
