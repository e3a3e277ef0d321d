"""A policy resolved for one model: what a step casts, and the hooks that cast at the borders of modules.

`casting` gives the step one object of the same shape with a policy and without. The hooks are on a module only inside a
`with` block; no tensor, flag or mode outside of it is touched.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from purestep import _torch, tree
from purestep.errors import PrecisionError, explain
from purestep.keyed.mode import Handler
from purestep.optim import foreach as fx
from purestep.optim.base import GradientTransformation
from purestep.precision import float8, functions
from purestep.precision.convert import cast, rest_dtypes
from purestep.precision.hooks import CastInputs, CastOutputs, Hooks, cast_floating
from purestep.precision.loss_scale import NoLossScale, all_finite
from purestep.precision.master import MasterWeightsState, master_weights
from purestep.precision.policies import Policy
from purestep.precision.rules import Settings, check_rules, word

Tensors = Mapping[str, Tensor]


class Uncast:
    """What a step does about precision without a policy: nothing."""

    around: Hooks | None = None
    handlers: Mapping[Any, Handler] | None = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def check(self, state: Any) -> None:
        """Refuse a state that is under a policy, which the step would leave out."""
        has = "a loss scale" if getattr(state, "loss_scale", None) is not None else None
        has = "master weights" if isinstance(getattr(state, "opt_state", None), MasterWeightsState) else has
        if has:
            instead = "ps.make_step(loss_fn, tx, policy=policy)\nstate = ps.precision.policy('32').apply(state)"
            raise PrecisionError(explain(f"the state has {has}, and the step has no policy", instead=instead))

    def params(self, params: Any) -> Any:
        """Return the parameters as the model sees them; gradients are those of these."""
        return params

    def buffers(self, buffers: Any) -> Any:
        """Return the buffers as the model sees them."""
        return buffers

    def batch(self, batch: Any) -> Any:
        """Return the batch as the loss function sees it."""
        return batch

    def scope(self, params: Any) -> contextlib.AbstractContextManager[Any]:
        """Return what the loss function runs in."""
        return contextlib.nullcontext()

    def scaled(self, loss: Tensor, state: Any) -> Tensor:
        """Return the loss that is differentiated."""
        return loss

    def kept(self, old: Tensors, given: Tensors, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the buffers after a call as the state keeps them."""
        return new

    def reduced(self, grads: Any) -> Any:
        """Return the gradients of a microbatch as they are summed."""
        return grads

    def settled(self, state: Any, grads: Any) -> tuple[Any, Tensor | None]:
        """Return the summed gradients as the optimizer sees them, and whether they are finite, if anybody asks."""
        return grads, None


class Casting(Uncast):
    """A policy resolved for one model. See `Uncast` for what each method is for."""

    def __init__(self, policy: Policy, module: nn.Module) -> None:
        self.policy = policy
        self.settings = Settings(policy.rules, module)
        names = [n for n, _ in module.named_parameters(remove_duplicate=False)]
        self._written = {n for n, _ in module.named_buffers(remove_duplicate=False)}
        check_rules(self.settings, [*names, *self._written])
        # The cache that holds this object must not keep the model alive.
        self._module = weakref.ref(module)
        self._converted = None if policy.float8 is None else float8.converted(module, policy.float8, self.settings)
        self.around = self._hooks(self._converted or module)
        self.handlers = None if policy.autocast else functions.of(policy)
        self._rest: dict[str, torch.dtype] = {}
        self._compute: dict[str, torch.dtype] = {}

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        return self._converted or self._module()  # type: ignore[return-value]

    def _hooks(self, module: nn.Module) -> Hooks:
        found: list[tuple[nn.Module, CastInputs | None, CastOutputs | None]] = []
        for path, m in module.named_modules():
            own = self.settings.of_module(path, "compute", self.policy.compute)
            parent = path.rpartition(".")[0]
            outer = self.settings.of_module(parent, "compute", self.policy.compute) if path else None
            output: torch.dtype = self.settings.said_of(path, "output") or outer or self.policy.output
            before = CastInputs(own) if own != outer or _owns_tensors(m) else None
            after = CastOutputs(output) if output != own or own != outer else None
            if self.policy.autocast:
                before, after = None, None if path else CastOutputs(self.policy.output)
            if before or after:
                found.append((m, before, after))
        return Hooks(found)

    def check(self, state: Any) -> None:
        """Refuse a state that this policy was not applied to."""
        rest = self._rest_of(state.params)
        odd = next((n for n, t in state.params.items() if t.dtype != rest[n]), None)
        problem = "" if odd is None else f"params[{odd!r}]: {tree.describe(state.params[odd])}, asked {word(rest[odd])}"
        opt_state = getattr(state, "opt_state", None)
        if isinstance(opt_state, MasterWeightsState) != (self.policy.master is not None):
            problem = f"master weights: {word(self.policy.master) if self.policy.master else 'none asked, some there'}"
        wants = not isinstance(self.policy.loss_scale, NoLossScale)
        current = getattr(state, "loss_scale", None)
        if wants != (current is not None) or (wants and type(current) is not type(self.policy.loss_scale)):
            problem = f"loss_scale: {type(current).__name__}, asked {type(self.policy.loss_scale).__name__}"
        if problem:
            raise PrecisionError(
                explain(
                    "the state is not under the precision policy of the step",
                    where=f"state.{problem}; policy: {self.policy.name or self.policy}",
                    instead="state = policy.apply(ps.init(model, tx, seed=0))",
                )
            )

    def _rest_of(self, params: Tensors) -> dict[str, torch.dtype]:
        if self._rest.keys() != params.keys():
            self._rest = rest_dtypes(self.policy, self.settings, params)
        return self._rest

    def _cast(self, tensors: Tensors) -> dict[str, Tensor]:
        if self.policy.autocast:
            return dict(tensors)
        for n, t in tensors.items():
            if n not in self._compute:
                own = self.settings.of_tensor(n, "compute", self.policy.compute)
                self._compute[n] = own if t.is_floating_point() else t.dtype
        return cast(tensors, self._compute)

    def params(self, params: Any) -> Any:
        return self._cast(params)

    def buffers(self, buffers: Any) -> Any:
        return self._cast(buffers)

    def batch(self, batch: Any) -> Any:
        """Widen narrower floats, so that `64` has targets in float64; modules cast their inputs themselves."""
        if self.policy.compute != torch.float64:
            return batch
        return cast_floating(batch, torch.float64)

    def scope(self, params: Any) -> contextlib.AbstractContextManager[Any]:
        if not self.policy.autocast:
            return contextlib.nullcontext()
        device = next(iter(params.values())).device.type
        return torch.autocast(device, dtype=self.policy.compute)

    def scaled(self, loss: Tensor, state: Any) -> Tensor:
        return loss if state.loss_scale is None else state.loss_scale.scale(loss)

    def kept(self, old: Tensors, given: Tensors, new: dict[str, Tensor]) -> dict[str, Tensor]:
        # Parameters that are frozen are among the buffers, and nobody writes to them.
        return {n: _kept(old[n], given[n], new[n]) if n in self._written else old[n] for n in new}

    def reduced(self, grads: Any) -> Any:
        leaves, structure = tree.flatten(grads)
        wanted = [self.policy.reduce if g.is_floating_point() else g.dtype for g in leaves]
        return tree.unflatten(structure, fx.convert(leaves, wanted))

    def settled(self, state: Any, grads: Any) -> tuple[Any, Tensor | None]:
        finite = None
        if state.loss_scale is not None:
            grads = state.loss_scale.unscale(grads)
            finite = all_finite(grads).to(state.step.device)
        rest = self._rest_of(state.params)
        wanted = dict.fromkeys(rest, self.policy.master) if self.policy.master is not None else rest
        return cast(grads, {n: wanted[n] if g.is_floating_point() else g.dtype for n, g in grads.items()}), finite


def _owns_tensors(module: nn.Module) -> bool:
    # A parametrized weight is a property of the module, and belongs to a submodule of it.
    parametrized = isinstance(getattr(module, "parametrizations", None), nn.ModuleDict)
    return parametrized or any(t is not None and t.is_floating_point() for t in _torch.parameters_of(module).values())


def _kept(old: Tensor, given: Tensor, new: Tensor) -> Tensor:
    if given is old or new.shape != given.shape:
        return new.to(old.dtype)
    # What the model left alone keeps the digits that the cast dropped.
    return torch.where(new == given, old, new.to(old.dtype))


_castings: weakref.WeakKeyDictionary[nn.Module, dict[Policy, Casting]] = weakref.WeakKeyDictionary()


def casting(policy: Policy | None, module: nn.Module) -> Uncast:
    """Return what a step does about precision, resolved once for each policy and model."""
    if policy is None:
        return Uncast(module)
    known = _castings.setdefault(module, {})
    if policy not in known:
        known[policy] = Casting(policy, module)
    return known[policy]


def wrapped(policy: Policy | None, tx: GradientTransformation) -> GradientTransformation:
    """Return the transformation that a step under a policy applies: with master weights, if the policy has them."""
    return tx if policy is None or policy.master is None else master_weights(tx, policy.master)
