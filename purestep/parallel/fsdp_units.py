"""Whole parameters for the time they are needed: one gather a unit, and its gradients summed back into parts.

A unit is a submodule whose parameters travel together in one flat tensor. Between its calls the module holds stand-ins
that refuse to be used. `fsdp_order` says when which unit is gathered. It knows no loss and no optimizer; `Session` is
one microbatch.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Container, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from purestep import _torch
from purestep.distributed import collectives
from purestep.module_tensors import Slots, slots
from purestep.parallel.absent import Absent
from purestep.parallel.fsdp_layout import Row, Rows
from purestep.parallel.fsdp_order import Exchanges, Op, UnitOrder
from purestep.sharding.plan import Plan

# What is saved in place of a gathered parameter: its unit, and offset, shape, strides and dtype of the window on it.
Saved = tuple["Live", int | torch.SymInt, torch.Size, tuple[int, ...], torch.dtype]


@dataclasses.dataclass
class Unit:
    """Parameters that are gathered together.

    Attributes:
        number: among the units of the model.
        path: of the submodule, "" for the root.
        rows: how their parts lie in the flat tensor of each rank.
        trained: names that get a gradient, in order; the others are frozen.
    """

    number: int
    path: str
    rows: Rows
    trained: list[str]

    def __post_init__(self) -> None:
        self.names = [row.name for row in self.rows.rows]
        self.chosen = [self.rows.by_name[name] for name in self.trained]


class Units:
    """The units of one model under one plan, by the names of its split parameters.

    Args:
        plan: the plan.
        module: the model.
        split: split leaves (DTensors) by name, trained and frozen.
        parts: the local parts by name, in the dtypes the model computes with.
        trained: which of them get gradients.
        device: where they are gathered; the parts may be elsewhere.
    """

    def __init__(
        self,
        plan: Plan,
        module: nn.Module,
        split: Mapping[str, Tensor],
        parts: Mapping[str, Tensor],
        trained: Container[str],
        device: torch.device,
    ) -> None:
        self.plan, self.device = plan, device
        self.group, self.count = plan.mesh.group(*plan.shard_axes), plan.mesh.size(*plan.shard_axes)
        self.slots: Slots = slots(module)
        self.modules = dict(module.named_modules())
        self._paths = {id(_torch.parameters_of(m)): path for path, m in self.modules.items()}
        self.units: list[Unit] = []
        self.nothing: dict[Any, Tensor] = {}
        # A flat tensor has one dtype, so a submodule whose parameters have two is two units with one path.
        grouped: dict[tuple[str, torch.dtype], list[str]] = {}
        for name in split:
            grouped.setdefault((self._home(name), parts[name].dtype), []).append(name)
        for (path, _), names in grouped.items():
            rows = Rows(plan, [Row.of(plan, name, split[name]) for name in names])
            self.units.append(Unit(len(self.units), path, rows, [n for n in names if n in trained]))
        self.unit_paths = [unit.path for unit in self.units]
        # The units with a submodule of their own. The root's parameters stay gathered during the whole call.
        self.inner = [(unit, self.modules[unit.path]) for unit in self.units if unit.path]
        self.stand_ins = {
            row.name: Absent.of(row.name, row.shape, torch.empty((), dtype=parts[row.name].dtype, device=device), plan)
            for unit in self.units
            if unit.path
            for row in unit.rows.rows
        }

    def _home(self, name: str) -> str:
        """Return the unit of a parameter: the root for one that is tied into several."""
        names = [f"{self._paths[id(tensors)]}.{key}" for tensors, key in self.slots.params[name]]
        homes = {self.plan.unit(other.removeprefix(".")) for other in names}
        home = homes.pop()
        # Two submodules would need it at different times, and the gradient of one of them would be reduced too early.
        return home if not homes and home in self.modules else ""


class _Context(Protocol):
    """What autograd hands from the forward to the backward pass of a gather."""

    live: Live

    def set_materialize_grads(self, value: bool, /) -> None: ...


class _Gather(torch.autograd.Function):
    """Whole tensors; backward hands the gradients of all of them to the session at once."""

    @staticmethod
    def forward(ctx: _Context, live: Live, anchor: Tensor) -> tuple[Tensor, ...]:
        # `anchor` is an input only so that autograd calls `backward`: the shards themselves are no input of the graph.
        ctx.live = live
        # A parameter that the call did not use has no gradient; zeros for it would cost its full size.
        ctx.set_materialize_grads(False)
        return tuple(live.whole(name) for name in live.unit.trained)

    @staticmethod
    def backward(ctx: _Context, *grads: Tensor | None) -> tuple[None, None]:
        # What happens here is no operation of the model: no mode of it has to look.
        with _torch.no_torch_function():
            # The backward pass of the unit has ended, so its parameters go before the gradients are packed beside them.
            ctx.live.release()
            ctx.live.session.reduce(ctx.live, list(grads))
        return None, None


class Live:
    """The parameters of one unit during one microbatch: whole while the unit runs, else nothing."""

    def __init__(self, session: Session, unit: Unit) -> None:
        self.session, self.unit = session, unit
        self.flat: Tensor | None = None
        self.pending: list[collectives.Pending] = []
        self.tracked: dict[str, Tensor] | None = None
        self.filled = False  # whether the tensors that the graph knows have memory now
        self.held = False  # whether hooks of others have saved parameters, so that freeing them would free nothing
        self.reduced = False  # whether the gradients are here, if there are any

    def launch(self) -> None:
        """Begin to gather. The other ranks do at the same time, whether this one needs it or has it already."""
        # Several may be under way for one unit: a rank that took part for the sake of others keeps what came, and uses
        # it where the unit runs next.
        device = self.session.units.device
        shards = [self.session.parts[n].to(device, non_blocking=True) for n in self.unit.names]
        self.pending.append(collectives.gather(self.unit.rows.pack(shards), self.session.units.group))
        self.session.coming += 1

    def arrive(self) -> Tensor:
        """Wait for the gather that was launched first."""
        self.session.coming -= 1
        return self.pending.pop(0).wait()

    def ensure(self) -> Tensor:
        """Return the flat tensor of all whole parameters, gathered if it is not here; the next unit is on its way."""
        if self.flat is None:
            if not self.pending:
                self.session.need(self)
            # Before the wait, so that two gathers are under way while this rank waits for the first.
            self.session.ahead(self)
            self.flat = self.unit.rows.unpack(self.arrive())
            self.session.by_memory[self.flat.untyped_storage().data_ptr()] = self
        return self.flat

    def whole(self, name: str) -> Tensor:
        """Return a parameter as a tensor of its own over the gathered memory."""
        row = self.unit.rows.by_name[name]
        flat = self.ensure()
        # Not a view of `flat`: autograd would give all views one version counter, and an optimizer's or a user's write
        # into one parameter would make what was saved of the others invalid.
        tensor = torch.empty(0, dtype=flat.dtype, device=flat.device)
        return tensor.set_(flat.untyped_storage(), row.start, row.shape, row.strides)

    def tensors(self) -> dict[str, Tensor]:
        """Return the whole parameters: of the trained ones, the very tensors that the graph knows."""
        self.ensure()
        if self.tracked is None:
            # Once in a microbatch: of a unit that is called twice, two nodes would hand in the gradients in two parts,
            # and each would be reduced.
            outputs = _Gather.apply(self, self.session.anchor) if self.unit.trained else ()
            self.tracked = dict(zip(self.unit.trained, outputs, strict=True))
        elif not self.filled:
            # `.data` swaps the memory below a tensor that the graph knows, without an operation and without a version.
            for name, tensor in self.tracked.items():
                tensor.data = self.whole(name)
        self.filled = True
        full = {n: self.tracked[n] if n in self.tracked else self.whole(n) for n in self.unit.names}
        wrap = self.session.wrap
        return full if wrap is None else {n: wrap(n, t) for n, t in full.items()}

    def release(self) -> None:
        """Let go of the gathered memory. Tensors that other code still holds stay as they are."""
        if self.flat is not None:
            # The allocator may give the address to another tensor, which `_pack` would then take for this parameter.
            del self.session.by_memory[self.flat.untyped_storage().data_ptr()]
        self.flat, self.filled = None, False
        for tensor in (self.tracked or {}).values():
            tensor.data = self.session.empty(tensor)


class Reductions(Protocol):
    """What takes the gradients of the units of one microbatch."""

    def take(self, unit: Unit, grads: list[Tensor | None]) -> None:
        """Take the gradients of a unit as its backward pass ends."""

    def reduce(self, unit: Unit) -> None:
        """Launch the reduction of the gradients of a unit over the ranks; of zeros, if none were taken."""


class Session:
    """Gathering during one microbatch.

    Args:
        units: of the model.
        parts: local parts by name, as the model computes with them.
        reductions: takes the gradients; None where nothing is differentiated.
        wrap: makes of a whole parameter, by its name, what the model computes with.
        anchor: a tensor that is differentiated: gradients of units come on the way to it.
        order: what the ranks know of the order in which units are gathered; None where all are gathered at once.
    """

    def __init__(
        self,
        units: Units,
        parts: Mapping[str, Tensor],
        *,
        reductions: Reductions | None = None,
        wrap: Callable[[str, Tensor], Tensor] | None = None,
        anchor: Tensor | None = None,
        order: UnitOrder | None = None,
    ) -> None:
        self.units, self.parts, self.reductions, self.wrap = units, parts, reductions, wrap
        self.anchor = torch.zeros(()) if anchor is None else anchor
        self.lives: dict[int, Live] = {}
        self.by_memory: dict[int, Live] = {}  # by the address of the gathered memory that is there now
        self.recent: list[str] = []
        self.coming = 0  # gathers that are under way
        self.stack: list[tuple[Live, Any]] = []
        self.backward = False
        self.exchanges = Exchanges(
            UnitOrder() if order is None else order,
            units.unit_paths,
            units.group if units.inner and order is not None else None,
            units.device,
            self._launch,
            self._is_computing,
        )

    def tensors(self) -> dict[str, Tensor]:
        """Return what the model is bound to at first: whole parameters of the root, stand-ins for those of units."""
        bound: dict[str, Tensor] = dict(self.units.stand_ins)
        for unit in self.units.units:
            if not unit.path:
                bound.update(self.live(unit.number).tensors())
        return bound

    def wholes(self) -> dict[str, Tensor]:
        """Return all parameters whole, gathered at once."""
        lives = [self.live(unit.number) for unit in self.units.units]
        # All are launched before the first is waited for: the order is that of the units on every rank.
        for live in lives:
            live.launch()
        return {name: t for live in lives for name, t in live.unit.rows.wholes(live.ensure()).items()}

    def live(self, number: int) -> Live:
        """Return the tensors of a unit, the same ones at every call."""
        if number not in self.lives:
            self.lives[number] = Live(self, self.units.units[number])
        return self.lives[number]

    def empty(self, like: Tensor) -> Tensor:
        """Return a tensor of a shape without memory, for what is not there."""
        # One element, expanded. NaN, so that a use of it shows: autograd checks shapes here, never values.
        key = like.dtype, like.device
        nothing = self.units.nothing
        if key not in nothing:
            value = torch.full(
                (), float("nan") if like.is_floating_point() else 0, dtype=like.dtype, device=like.device
            )
            nothing[key] = value
        return nothing[key].expand(like.shape)

    # --- collectives, in the order of all ranks ---

    def need(self, live: Live) -> None:
        """Launch the gather of a unit, and before it what other ranks need first."""
        if live.unit.path:
            self.exchanges.need(Op("gather", live.unit.number))
        else:
            # Every rank gathers the root before it calls the model.
            live.launch()

    def ahead(self, running: Live | None = None) -> None:
        """Launch the gather of what is needed next, if no other is under way but that of the unit that is to run."""
        # One ahead of the unit that runs hides the wait; each further one would hold the memory of one more unit.
        if self.coming == (running is not None):
            self.exchanges.ahead()

    def reduce(self, live: Live, grads: list[Tensor | None]) -> None:
        """Hand over the gradients of a unit, and launch their reduction when it is their turn."""
        live.reduced = True
        if self.reductions is not None:
            self.reductions.take(live.unit, grads)
        if live.unit.path:
            self.exchanges.need(Op("reduce", live.unit.number))
            self.ahead()

    def _launch(self, op: Op) -> None:
        if op.kind == "gather":
            self.live(op.unit).launch()
        elif self.reductions is not None:
            self.reductions.reduce(self.units.units[op.unit])

    def _is_computing(self, number: int) -> bool:
        live = self.lives.get(number)
        return live is not None and live.tracked is not None and not live.reduced

    # --- what happens around the call of a unit ---

    def around(self) -> _Around:
        """Return a context in which the units of the model gather what they need."""
        return _Around(self)

    def enter(self, live: Live) -> None:
        """Put the whole parameters of a unit into its module."""
        self._put(live, live.tensors())
        # A checkpoint calls the unit again in the backward pass, which then has moved on to this unit.
        if self.backward:
            self._used(live)
        hooks: Any = None
        top = _torch.saved_tensor_hooks()
        if self.units.plan.reshard_after_forward and top is None:
            # They stay on until `leave`, for what autograd saves within the call of this unit only.
            hooks = torch.autograd.graph.saved_tensors_hooks(self._pack, self._unpack)
            hooks.__enter__()
        elif top is not None and top[0] != self._pack and top[0].__module__ != "torch.utils.checkpoint":
            # The caller's hooks decide what is saved, and may keep the tensor itself.
            live.held = True
        self.stack.append((live, hooks))

    def leave(self, live: Live) -> None:
        """Put the stand-ins back, and free the parameters if the plan says so."""
        _, hooks = self.stack.pop()
        if hooks is not None:
            hooks.__exit__(None, None, None)
        self._put(live, self.units.stand_ins)
        # In the backward pass a recomputed unit is needed until its gradients are there: `_used` frees it later.
        kept = self.backward or live.held or self.exchanges.keeps(live.unit.number)
        if self.units.plan.reshard_after_forward and not kept:
            live.release()

    def end_forward(self) -> None:
        """Take part in the gathers that other ranks need in the forward pass; the backward pass follows, if any."""
        self.exchanges.end_forward()
        self._cancel()
        self.backward = True
        self.ahead()

    def end_backward(self) -> None:
        """Take part in what other ranks need in the backward pass."""
        self.exchanges.end_backward()
        self._cancel()

    def close(self) -> None:
        """Let go of all tensors: nothing of this microbatch is needed any more."""
        # A tracked parameter holds the node of autograd that gathered it, and that node its unit: a cycle that Python's
        # collector cannot see. The other cycles it would find, but seldom looks: there are few objects, and large ones.
        for live in self.lives.values():
            live.tracked = None
        self.lives, self.by_memory, self.parts, self.reductions = {}, {}, {}, None
        del self.exchanges

    def _cancel(self) -> None:
        # What this rank took part in for the sake of others only has to have arrived before its memory is freed.
        for live in self.lives.values():
            while live.pending:
                live.arrive()

    def _put(self, live: Live, tensors: Mapping[str, Tensor]) -> None:
        for name in live.unit.names:
            for registered, key in self.units.slots.params[name]:
                registered[key] = tensors[name]
        for rnn in self.units.slots.rnns:
            if any(
                _torch.parameters_of(rnn) is place for n in live.unit.names for place, _ in self.units.slots.params[n]
            ):
                _torch.link_flat_weights(rnn)

    # --- what autograd saves ---

    def _pack(self, saved: Tensor) -> Tensor | Saved:
        # A subclass may hold more than its storage says, so it is kept as it is.
        if type(saved) is not Tensor and not _torch.is_fake(saved):
            return saved
        # Not only the unit that was entered last: a submodule is several units where its parameters have several
        # dtypes, and an outer unit may hand its parameters to an inner one. The root is never freed.
        live = self.by_memory.get(saved.untyped_storage().data_ptr())
        if live is None or not live.unit.path:
            return saved
        # Only the window is kept, so that releasing the unit frees its memory. The offset is good after another gather,
        # too: rows lie alike every time.
        return live, saved.storage_offset(), saved.shape, saved.stride(), saved.dtype

    def _unpack(self, packed: Tensor | Saved) -> Tensor:
        if isinstance(packed, Tensor):
            return packed
        live, offset, shape, strides, dtype = packed
        with _torch.no_torch_function():
            flat = live.ensure()
            self._used(live)
            window = torch.empty(0, dtype=flat.dtype, device=flat.device)
            window = window.set_(flat.untyped_storage(), offset, shape, strides)
            return window if window.dtype == dtype else window.view(dtype)

    def _used(self, live: Live) -> None:
        """Free what the backward pass is through with: two submodules at once, one that ends and the one before it."""
        path = live.unit.path
        if path == (self.recent or [""])[-1]:
            return
        # With one alone, neighbours whose saved tensors autograd unpacks in turns would be gathered again and again.
        self.recent = [*[other for other in self.recent if other != path][-1:], path]
        for other in self.lives.values():
            running = any(other is entered for entered, _ in self.stack)
            if other.flat is not None and other.unit.path not in ("", *self.recent) and not running:
                other.release()


class _Around:
    """The hooks of all units, straight in the dicts of their modules: this happens at every microbatch."""

    def __init__(self, session: Session) -> None:
        self.session = session

    def __enter__(self) -> None:
        session = self.session
        self.depth = len(session.stack)
        for unit, module in session.units.inner:
            before, after = _torch.pre_hooks_of(module), _torch.hooks_of(module)
            # Keys of our own, which no handle of torch's has; the context itself, so that nested calls do not collide.
            key = self, unit.number
            before[key] = functools.partial(_enter, session, unit.number)
            # First: hooks of the user's see full parameters.
            before.move_to_end(key, last=False)
            after[key] = functools.partial(_leave, session, unit.number)

    def __exit__(self, *error: object) -> None:
        # After an error in the model the units that were running have not been left.
        while len(self.session.stack) > self.depth:
            self.session.leave(self.session.stack[-1][0])
        for unit, module in self.session.units.inner:
            _torch.pre_hooks_of(module).pop((self, unit.number), None)
            _torch.hooks_of(module).pop((self, unit.number), None)


def _enter(session: Session, index: int, module: nn.Module, args: object) -> None:
    # What happens here is no operation of the model: no mode of it has to look.
    with _torch.no_torch_function():
        session.enter(session.live(index))


def _leave(session: Session, index: int, module: nn.Module, args: object, output: object) -> None:
    with _torch.no_torch_function():
        session.leave(session.live(index))
