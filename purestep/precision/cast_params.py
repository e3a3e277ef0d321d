"""A policy resolved for one model: the casts of a step, and the hooks that cast the inputs and outputs of modules.

`casting` returns an object with one interface, with a policy and without. The hooks are on a module only inside a
`with` block; no tensor, flag or mode outside of it is changed.
"""

from __future__ import annotations

import contextlib
import functools
import weakref
from collections.abc import Callable, Iterator, Mapping
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from purestep import _torch, tree
from purestep.errors import PrecisionError, explain
from purestep.optim.base import GradientTransformation
from purestep.optim.kernels import foreach as fx
from purestep.precision import autocast_functions, float8, int8
from purestep.precision.convert_state import StateFields, cast, rest_dtypes
from purestep.precision.loss_scale import NoLossScale, all_finite
from purestep.precision.master_params import MasterWeightsState, master_weights
from purestep.precision.module_hooks import CastInputs, CastOutputs, Hooks, cast_floating
from purestep.precision.policies import Policy
from purestep.precision.rules import Settings, check_rules, word
from purestep.random.card_dropout import device_dropout
from purestep.random.torch_mode import Handler

Tensors = Mapping[str, Tensor]
T = TypeVar("T")
_NOTHING = contextlib.nullcontext()


def check_uncast(state: StateFields) -> None:
    """Refuse a state that is under a policy, where a step has none."""
    # Anything can be handed to a step; what is no train state is refused in other words, where its model is asked for.
    field = "a loss scale" if getattr(state, "loss_scale", None) is not None else None
    field = "master weights" if isinstance(getattr(state, "opt_state", None), MasterWeightsState) else field
    if field:
        instead = "ps.make_step(loss_fn, tx, policy=policy)\nstate = ps.precision.policy('32').apply(state)"
        raise PrecisionError(explain(f"the state has {field}, and the step has no policy", instead=instead))


class Uncast:
    """The casts of a step without a policy: none. `Casting` has the same methods."""

    around: Callable[[], contextlib.AbstractContextManager[Any]] | None = None
    handlers: Mapping[Any, Handler] | None = None

    def __init__(self, module: nn.Module) -> None:
        self.module = module

    def check(self, state: StateFields) -> None:
        """Refuse a state that is under a policy: the step would ignore its loss scale and master weights."""
        check_uncast(state)

    def params(self, params: Tensors) -> Tensors:
        """Return the parameters that the model computes with; gradients are taken with respect to them."""
        return params

    def buffers(self, buffers: Tensors) -> Tensors:
        """Return the buffers that the model computes with."""
        return buffers

    def batch(self, batch: T) -> T:
        """Return the batch that the loss function gets."""
        return batch

    def scope(self, params: Tensors) -> contextlib.AbstractContextManager[object]:
        """Return the context in which the loss function runs."""
        return _NOTHING

    def scaled(self, loss: Tensor, state: StateFields) -> Tensor:
        """Return the loss that is differentiated."""
        return loss

    def kept(self, old: Tensors, passed: Tensors, new: dict[str, Tensor]) -> dict[str, Tensor]:
        """Return the buffers of the next state.

        Args:
            old: those of the state.
            passed: those that the model got: the result of `buffers`.
            new: what the model left.
        """
        return new

    def reduced(self, grads: T) -> T:
        """Return the gradients of a microbatch in the dtype in which microbatches are summed."""
        return grads

    def settled(self, state: Any, grads: Tensors) -> tuple[Tensors, Tensor | None]:
        """Return the summed gradients in the dtype of the optimizer, unscaled.

        With a loss scale also whether all of them are finite, bool []; None without one.
        """
        return grads, None


class Casting(Uncast):
    """A policy resolved for one model. `Uncast` documents the methods."""

    def __init__(self, policy: Policy, module: nn.Module) -> None:
        self.policy = policy
        self.settings = Settings(policy.rules, module)
        names = [name for name, _ in module.named_parameters(remove_duplicate=False)]
        self._written = {name for name, _ in module.named_buffers(remove_duplicate=False)}
        check_rules(self.settings, [*names, *self._written])
        # Weak, because the cache that holds this object has the model as its weak key, and would keep it alive.
        self._module = weakref.ref(module)
        self._converted = self._convert(module)
        hooks = self._hooks(self._converted or module)
        self.around = functools.partial(_with_device_dropout, hooks) if policy.dropout == "device" else hooks
        self.handlers = None if policy.autocast else autocast_functions.of(policy)
        self._rest: dict[str, torch.dtype] = {}
        self._compute: dict[str, torch.dtype] = {}

    @property
    def module(self) -> nn.Module:  # type: ignore[override]
        return self._converted or self._module()  # type: ignore[return-value]

    def _convert(self, module: nn.Module) -> nn.Module | None:
        """Return the copy of the model in which linear layers multiply in fewer bits, None without any."""
        if self.policy.float8 is not None:
            return float8.converted(module, self.policy.float8, self.settings)
        return None if self.policy.int8 is None else int8.converted(module, self.policy.int8, self.settings)

    def _hooks(self, module: nn.Module) -> Hooks:
        casts: list[tuple[nn.Module, CastInputs | None, CastOutputs | None]] = []
        for path, submodule in module.named_modules():
            inner, outer, output = self.settings.casts(path, self.policy.compute, self.policy.output)
            # Inputs are cast where the dtype changes from the parent's, and where a module has tensors to combine with
            # them: the caller may pass another dtype there. Containers between the two cast nothing.
            before = CastInputs(inner) if inner != outer or _has_tensors(submodule) else None
            # Outputs return to the dtype of the parent, so that a rule changes the module that it names and no other.
            after = CastOutputs(output) if output != inner or inner != outer else None
            if self.policy.autocast:  # casts in each operator; only the output of the model is cast here
                before, after = None, None if path else CastOutputs(self.policy.output)
            if before or after:
                casts.append((submodule, before, after))
        return Hooks(casts)

    def check(self, state: StateFields) -> None:
        """Refuse a state that this policy was not applied to."""
        rest = self._rest_of(state.params)
        wrong = next((name for name, tensor in state.params.items() if tensor.dtype != rest[name]), None)
        problem = ""
        if wrong is not None:
            problem = f"params[{wrong!r}]: {tree.describe(state.params[wrong])}, policy {word(rest[wrong])}"
        opt_state = getattr(state, "opt_state", None)
        if isinstance(opt_state, MasterWeightsState) != (self.policy.master is not None):
            master = "in the state only" if self.policy.master is None else f"policy {word(self.policy.master)}"
            problem = f"master weights: {master}"
        has_scale = not isinstance(self.policy.loss_scale, NoLossScale)
        current = getattr(state, "loss_scale", None)
        if has_scale != (current is not None) or (has_scale and type(current) is not type(self.policy.loss_scale)):
            problem = f"loss_scale: {type(current).__name__}, policy {type(self.policy.loss_scale).__name__}"
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
        for name, tensor in tensors.items():
            if name not in self._compute:  # resolving the rules costs more than the cast, so it is done once
                dtype = self.settings.of_tensor(name, "compute", self.policy.compute)
                self._compute[name] = dtype if tensor.is_floating_point() else tensor.dtype
        return cast(tensors, self._compute)

    def params(self, params: Tensors) -> dict[str, Tensor]:
        return self._cast(params)

    def buffers(self, buffers: Tensors) -> dict[str, Tensor]:
        return self._cast(buffers)

    def batch(self, batch: T) -> T:
        """Return the batch, with targets in float64 under `64`: only modules cast their inputs, and losses do not."""
        if self.policy.compute != torch.float64:
            return batch
        return cast_floating(batch, torch.float64)

    def scope(self, params: Tensors) -> contextlib.AbstractContextManager[object]:
        if not self.policy.autocast:
            return contextlib.nullcontext()
        device = next(iter(params.values())).device.type
        return torch.autocast(device, dtype=self.policy.compute)

    def scaled(self, loss: Tensor, state: StateFields) -> Tensor:
        return loss if state.loss_scale is None else state.loss_scale.scale(loss)

    def kept(self, old: Tensors, passed: Tensors, new: dict[str, Tensor]) -> dict[str, Tensor]:
        # The buffers of a state include frozen parameters, which a model does not write to.
        return {n: _at_rest(old[n], passed[n], new[n]) if n in self._written else old[n] for n in new}

    def reduced(self, grads: T) -> T:
        leaves, structure = tree.flatten(grads)
        dtypes = [self.policy.reduce if grad.is_floating_point() else grad.dtype for grad in leaves]
        return tree.unflatten(structure, fx.convert(leaves, dtypes))

    def settled(self, state: Any, grads: Tensors) -> tuple[dict[str, Tensor], Tensor | None]:
        finite = None
        if state.loss_scale is not None:
            # Unscaled before the cast: float16 would lose the small gradients again that the scale has saved.
            grads = state.loss_scale.unscale(grads)
            finite = all_finite(grads).to(state.step.device)
        rest = self._rest_of(state.params)
        dtypes = dict.fromkeys(rest, self.policy.master) if self.policy.master is not None else rest
        return cast(grads, {n: dtypes[n] if g.is_floating_point() else g.dtype for n, g in grads.items()}), finite


@contextlib.contextmanager
def _with_device_dropout(hooks: Hooks) -> Iterator[None]:
    with hooks(), device_dropout():
        yield


def _has_tensors(module: nn.Module) -> bool:
    # A parametrized weight is a property of the module, and a parameter of a submodule.
    parametrized = isinstance(getattr(module, "parametrizations", None), nn.ModuleDict)
    return parametrized or any(t is not None and t.is_floating_point() for t in _torch.parameters_of(module).values())


def _at_rest(old: Tensor, passed: Tensor, new: Tensor) -> Tensor:
    """A buffer after a call, in its dtype at rest."""
    if passed is old or new.shape != passed.shape:
        return new.to(old.dtype)
    # An element that the model did not change keeps the precision that the cast has dropped.
    return torch.where(new == passed, old, new.to(old.dtype))


_castings: weakref.WeakKeyDictionary[nn.Module, dict[Policy, Casting]] = weakref.WeakKeyDictionary()


def casting(policy: Policy | None, module: nn.Module) -> Uncast:
    """Return the casts of a step, resolved once for each policy and model."""
    if policy is None:
        return Uncast(module)
    by_policy = _castings.setdefault(module, {})
    if policy not in by_policy:
        by_policy[policy] = Casting(policy, module)
    return by_policy[policy]


def wrapped(policy: Policy | None, tx: GradientTransformation) -> GradientTransformation:
    """Return the transformation that a step under a policy applies: with master weights, if the policy has them."""
    return tx if policy is None or policy.master is None else master_weights(tx, policy.master)
