"""`apply`: a train state under another policy, as a pure transform.

It casts parameters, buffers and the optimizer state in the dtype of the parameters, and adds or removes master weights
and the loss scale. It imports no train state, and uses its fields only; users call it by `Policy.apply`.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Protocol, TypeVar, runtime_checkable

import torch
from torch import Tensor

from purestep import tree
from purestep.errors import PrecisionError, TemplateMismatch, explain
from purestep.optim.kernels import foreach as fx
from purestep.precision.loss_scale import LossScale, NoLossScale
from purestep.precision.master_params import MasterWeightsState, masters
from purestep.precision.rules import Rule, Settings, check_rules

Tensors = Mapping[str, Tensor]
T = TypeVar("T")


class PolicyFields(Protocol):
    """What is read here of a `Policy`, which imports this file for its methods."""

    @property
    def param(self) -> torch.dtype: ...
    @property
    def master(self) -> torch.dtype | None: ...
    @property
    def rules(self) -> tuple[Rule, ...]: ...
    @property
    def loss_scale(self) -> LossScale: ...
    def apply(self, state: T) -> T: ...


@runtime_checkable
class StateFields(Protocol):
    """The fields of a train state that a policy changes."""

    @property
    def params(self) -> Any: ...
    @property
    def buffers(self) -> Any: ...
    @property
    def opt_state(self) -> Any: ...
    @property
    def loss_scale(self) -> Any: ...
    def replace(self, **changes: Any) -> Any: ...


S = TypeVar("S", bound=StateFields)


def apply(policy: PolicyFields, state: T) -> T:
    """Return the state under a policy. A leaf that has the right dtype already is the same tensor."""
    if not isinstance(state, StateFields):
        raise PrecisionError(
            explain(
                "a policy applies to a train state",
                where=f"policy.apply({type(state).__qualname__})",
                instead="state = policy.apply(ps.init(model, tx))",
            )
        )
    model = getattr(state, "model", None)
    settings = Settings(policy.rules, getattr(model, "module", None))
    check_rules(settings, [*state.params, *state.buffers])
    # From the highest precision that the state has, so that no value is rounded twice.
    params, inner = _unwrapped(state)
    at_rest = rest_dtypes(policy, settings, params)
    optimizer_dtypes = dict.fromkeys(at_rest, policy.master) if policy.master is not None else at_rest
    inner = _cast_optimizer(inner, params, optimizer_dtypes)
    opt_state = inner
    if policy.master is not None:
        master = {name: to_dtype(tensor, policy.master) for name, tensor in masters(params, policy.master).items()}
        opt_state = MasterWeightsState(master, inner)
    device = next((tensor.device for tensor in params.values()), None)
    return state.replace(
        params=cast(params, at_rest),
        buffers=cast(state.buffers, rest_dtypes(policy, settings, state.buffers)),
        opt_state=opt_state,
        loss_scale=_loss_scale(policy, state.loss_scale, device),
    )


def any_policy(like: S) -> S:
    """Return the template of a state under any policy: every field that a policy changes is taken as it is stored."""
    return like.replace(params=..., buffers=..., opt_state=..., loss_scale=...)


def under_policy(policy: PolicyFields, restored: S, like: S) -> S:
    """Return a state that was restored with such a template under a policy, checked against the template `like`.

    Raises:
        TemplateMismatch: it differs in more than a policy changes; each path is listed.
    """
    state, wanted = policy.apply(restored), policy.apply(like)
    left, right = (
        {p: tree.describe(x) for p, x in zip(tree.paths(s), tree.leaves(s), strict=True)} for s in (state, wanted)
    )
    different = [path for path in (*left, *right) if left.get(path) != right.get(path)]
    if different:
        lines = [
            f"state{path}: stored {left.get(path, 'nothing')}, like= {right.get(path, 'nothing')}"
            for path in dict.fromkeys(different)
        ]
        what = "the snapshot does not have the structure of the template"
        raise TemplateMismatch(explain(what, where="\n".join(lines[:40])))
    # In the order of `like`, because a step is traced for a structure whose dicts have that order.
    return state.replace(
        params={name: state.params[name] for name in wanted.params},
        buffers={name: state.buffers[name] for name in wanted.buffers},
    )


def cast_tree(policy: PolicyFields, values: T, field: str) -> T:
    """Return a tree with its floating-point leaves in the dtype that a policy and its rules by name have in a field."""
    settings = Settings(policy.rules, None)  # without a model: rules by class match nothing here

    def change(name: str, leaf: object) -> object:
        if not isinstance(leaf, Tensor):
            return leaf
        return to_dtype(leaf, settings.of_tensor(name, field, getattr(policy, field)))

    return tree.map_with_name(change, values)


def to_dtype(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a floating-point tensor in a dtype; itself if it has that dtype, or is not floating-point."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != dtype else tensor


def cast(tensors: Tensors, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Return named tensors in the dtypes of the same names."""
    return dict(zip(tensors, fx.convert(list(tensors.values()), [dtypes[n] for n in tensors]), strict=True))


def rest_dtypes(policy: PolicyFields, settings: Settings, tensors: Tensors) -> dict[str, torch.dtype]:
    """Return the dtype of each parameter or buffer in the state; one that is not floating-point keeps its dtype."""
    return {
        name: settings.of_tensor(name, "param", policy.param) if tensor.is_floating_point() else tensor.dtype
        for name, tensor in tensors.items()
    }


def _unwrapped(state: StateFields) -> tuple[dict[str, Tensor], Any]:
    """Return the parameters in their highest precision (master weights, if any), and the optimizer state for them."""
    if isinstance(state.opt_state, MasterWeightsState):
        return {n: state.opt_state.master[n] for n in state.params}, state.opt_state.inner
    return dict(state.params), state.opt_state


def _cast_optimizer(opt_state: T, params: Tensors, dtypes: Mapping[str, torch.dtype]) -> T:
    """Cast the optimizer state of each parameter that has its dtype: moments, full or factored, averages, copies.

    The name of such a leaf ends with that of the parameter. Counts and norms stay as they are, and so does state in
    another dtype than the parameter's, because the user has chosen that (`mu_dtype=`).
    """

    def change(name: str, leaf: object) -> object:
        words = name.split(".")
        owner = next((o for i in range(len(words)) if (o := ".".join(words[i:])) in params), None)
        if owner is None or not isinstance(leaf, Tensor):
            return leaf
        param = params[owner]
        follows = leaf.dtype == param.dtype and (leaf.shape == param.shape or leaf.ndim > 0)
        return to_dtype(leaf, dtypes[owner]) if follows else leaf

    return tree.map_with_name(change, opt_state)


def _loss_scale(policy: PolicyFields, current: LossScale | None, device: torch.device | None) -> LossScale | None:
    """Return the initial loss scale of the policy, or the current one if it has the same class and settings."""
    wanted = policy.loss_scale
    if isinstance(wanted, NoLossScale):
        return None
    if current is not None and tree.structure(current) == tree.structure(wanted):
        return current
    return wanted.on(device)
