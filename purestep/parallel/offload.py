"""Optimizer state and parameters on the CPU while the state is on a card: what is copied when, and the update there.

Gradients are copied to the CPU while earlier parameters are updated, and new parameters go back while later ones are.
Where the state is on the CPU already nothing here is used: there is nothing to copy.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from purestep import devices, tree
from purestep.donation import apart, donation_of, lies_in
from purestep.errors import ConfigError, explain
from purestep.optim.base import GradientTransformation
from purestep.optim.kernels.sliced import advance
from purestep.sharding.placement import HOSTS, part_of
from purestep.sharding.plan import Plan
from purestep.state import TrainState

Tensors = Mapping[str, Tensor]


def is_away(plan: Plan | None, state: TrainState) -> bool:
    """Tell whether a plan keeps something of a state on the CPU while steps compute on a card.

    The step counter is never offloaded, so its device is where steps compute.
    """
    return plan is not None and plan.offload is not None and state.step.device.type not in HOSTS


def on_card(plan: Plan | None, state: TrainState, tensors: Tensors, leave: Iterable[str] = ()) -> Tensors:
    """Return parameters or buffers as a microbatch computes with them: those that are offloaded copied to the card.

    Args:
        plan: of the step.
        state: the state.
        tensors: by name; in the dtypes of the computation, so that no more than those bytes are copied.
        leave: names that stay where they are.
    """
    if plan is None or plan.offload != "params" or not is_away(plan, state):
        return tensors
    device, stay = state.step.device, set(leave)
    return {n: t if n in stay else t.to(device, non_blocking=True) for n, t in tensors.items()}


def at_rest(plan: Plan | None, state: TrainState, buffers: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return buffers after a microbatch with those that are offloaded, frozen parameters, as the state holds them."""
    if plan is None or plan.offload != "params" or not is_away(plan, state):
        return buffers
    return {n: state.buffers[n] if state.buffers[n].device.type in HOSTS else t for n, t in buffers.items()}


class Lane:
    """Copies between a card and the CPU for one update; see `optim.kernels.sliced.Transfer`.

    On CUDA and XPU copies run from and to page-locked memory on streams of their own, one a direction; other devices
    have no streams, and each copy is waited for.

    Args:
        device: the card.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._streams = _streams(device)
        self._arrivals: dict[str, list[Any]] = {}
        self._old: dict[str, Tensor] = {}
        self._memory: frozenset[int] = frozenset()
        self.returned: dict[str, Tensor] = {}
        if self._streams is not None:
            # Gradients are read, and parameters overwritten, once what was launched before has run.
            for stream in self._streams.both:
                stream.wait_stream(self._streams.current())

    def down(self, tensors: Tensors) -> dict[str, Tensor]:
        """Begin to copy tensors to the CPU; `need` waits for them. What is there already is returned as it is."""
        return {name: self._down(name, x) for name, x in tensors.items()}

    def _down(self, name: str, x: Tensor) -> Tensor:
        if x.device.type in HOSTS:
            return x
        if self._streams is None:
            return x.to("cpu")
        with self._streams.on(self._streams.down):
            here = torch.empty_like(x, device="cpu", pin_memory=True)
            here.copy_(x, non_blocking=True)
            # The allocator must not hand out the memory of a gradient before the copy has read it.
            x.record_stream(self._streams.down)
        self._arrivals.setdefault(name, []).append(self._streams.down.record_event())
        return here

    def back_into(self, old: Tensors, memory: frozenset[int]) -> None:
        """Let `done` return parameters to the card, into these tensors where they are of donated memory."""
        self._old, self._memory = dict(old), memory

    def need(self, names: Iterable[str]) -> None:
        for name in names:
            for event in self._arrivals.pop(name, ()):
                event.synchronize()

    def done(self, name: str, param: Tensor) -> None:
        if name in self._old:
            self.returned[name] = self._up(param, self._old[name])

    def _up(self, new: Tensor, old: Tensor) -> Tensor:
        if self._streams is None:
            return self._copied(new, old)
        with self._streams.on(self._streams.up):
            there = self._copied(new, old)
        there.record_stream(self._streams.current())
        return there

    def _copied(self, new: Tensor, old: Tensor) -> Tensor:
        if lies_in(old, self._memory):
            return old.copy_(new, non_blocking=True)
        return new.to(self.device, non_blocking=True)

    def close(self) -> None:
        """Let what is launched from here on wait for the parameters that are on their way."""
        if self._streams is not None:
            self._streams.current().wait_stream(self._streams.up)


class _Streams:
    """The streams of one card: one for copies to the CPU, one for copies from it."""

    def __init__(self, device: torch.device) -> None:
        self._module: Any = torch.get_device_module(device)
        self.device, self.on = device, self._module.stream
        self.down, self.up = self._module.Stream(device), self._module.Stream(device)
        self.both = self.down, self.up

    def current(self) -> Any:
        return self._module.current_stream(self.device)


@functools.cache
def _streams(device: torch.device) -> _Streams | None:
    """Return the streams of a card, the same ones every time; None where it has none."""
    has = device.type in ("cuda", "xpu") and torch.get_device_module(device).is_available()
    return _Streams(device) if has else None


def apply_gradients(
    plan: Plan,
    state: TrainState,
    tx: GradientTransformation,
    grads: Tensors,
    *,
    buffers: Tensors | None,
    accept: Tensor | None,
    lane: Lane | None = None,
    **extra: Any,
) -> TrainState:
    """Return the state after one update on the CPU; `TrainState.apply_gradients` with `last_use=True`, elsewhere.

    Args:
        plan: says whether parameters stay on the CPU.
        state: what the plan offloads is on the CPU, the rest on the card.
        tx, grads, buffers, accept, **extra: as of `TrainState.apply_gradients`; on the card.
        lane: copies from and to it; one for the device of the state by default.

    Raises:
        ConfigError: the state is not placed by the plan.
    """
    _check(plan, state)
    lane = Lane(state.step.device) if lane is None else lane
    donation = donation_of(state)
    memory = frozenset() if donation is None else donation.memory
    if donation is not None and memory:
        buffers, extra = apart((buffers, extra), memory)
        donation.written = True
    here, params = lane.down(grads), lane.down(state.params)
    if plan.offload == "optimizer":
        lane.back_into(state.params, memory)
    with torch.no_grad():
        step, decision, extra = devices.move((state.step, accept, extra), torch.device("cpu"))
        new, opt_state = advance(
            *(tx, here, state.opt_state, params),
            accept=decision,
            reuse=bool(memory),
            transfer=lane,
            step=step,
            **extra,
        )
        lane.close()
    if plan.offload == "optimizer":
        new = {name: lane.returned[name] for name in new}
    return state.advanced(tx, new, opt_state, buffers, accept)


def _check(plan: Plan, state: TrainState) -> None:
    held = [state.opt_state, state.params] if plan.offload == "params" else [state.opt_state]
    for leaf in tree.leaves(held):
        if isinstance(leaf, Tensor) and part_of(leaf).device.type not in HOSTS:
            raise ConfigError(
                explain(
                    "the state is not placed by the plan of the step",
                    where=f"{tree.describe(leaf)} is on {leaf.device}; the plan says offload={plan.offload!r}",
                    instead="state = ps.init(model, tx, seed=0, plan=plan)\n"
                    "or state = plan.place(state)   # a state that exists",
                )
            )
