"""`apply`: a train state under another policy, as a pure transform.

It casts parameters, buffers and what the optimizer keeps like parameters, and adds or removes master weights and the
loss scale. It knows the train state only by its fields; `Policy.apply` is how users call it.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.errors import PrecisionError, TemplateMismatch, explain
from purestep.optim import foreach as fx
from purestep.precision.loss_scale import NoLossScale
from purestep.precision.master import MasterWeightsState, masters
from purestep.precision.rules import Settings, check_rules

Tensors = Mapping[str, Tensor]


def apply(policy: Any, state: Any) -> Any:
    """Return the state under a policy. Leaves whose dtype is right already are passed on."""
    if not all(hasattr(state, field) for field in ("params", "buffers", "opt_state", "loss_scale", "replace")):
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
    params, inner = _unwrapped(state)
    at_rest = rest_dtypes(policy, settings, params)
    kept_in = dict.fromkeys(at_rest, policy.master) if policy.master is not None else at_rest
    inner = _cast_kept(inner, params, kept_in)
    opt_state = inner
    if policy.master is not None:
        master = {n: fitted(t, policy.master) for n, t in masters(params, policy.master).items()}
        opt_state = MasterWeightsState(master, inner)
    device = next((t.device for t in params.values()), None)
    return state.replace(
        params=cast(params, at_rest),
        buffers=cast(state.buffers, rest_dtypes(policy, settings, state.buffers)),
        opt_state=opt_state,
        loss_scale=_loss_scale(policy, state.loss_scale, device),
    )


def any_policy(like: Any) -> Any:
    """Return a template that a snapshot fits under whatever policy it was saved."""
    return like.replace(params=..., buffers=..., opt_state=..., loss_scale=...)


def under_policy(policy: Any, found: Any, like: Any) -> Any:
    """Return a state that was read with such a template under a policy, held against the state it shall be like.

    Raises:
        TemplateMismatch: it differs in more than what a policy decides; each path is listed.
    """
    made, wanted = policy.apply(found), policy.apply(like)
    left, right = (
        {p: tree.describe(x) for p, x in zip(tree.paths(s), tree.leaves(s), strict=True)} for s in (made, wanted)
    )
    odd = [p for p in (*left, *right) if left.get(p) != right.get(p)]
    if odd:
        lines = [
            f"state{p}: stored {left.get(p, 'nothing')}, like= {right.get(p, 'nothing')}" for p in dict.fromkeys(odd)
        ]
        raise TemplateMismatch(explain("the snapshot does not fit what was asked for", where="\n".join(lines[:40])))
    return made.replace(
        params={n: made.params[n] for n in wanted.params}, buffers={n: made.buffers[n] for n in wanted.buffers}
    )


def cast_tree(policy: Any, values: Any, field: str) -> Any:
    """Return a tree with its floating leaves in the dtype that a policy and its rules by name have in a field."""
    settings = Settings(policy.rules, None)

    def change(name: str, leaf: Any) -> Any:
        return (
            fitted(leaf, settings.of_tensor(name, field, getattr(policy, field))) if isinstance(leaf, Tensor) else leaf
        )

    return tree.map_with_name(change, values)


def fitted(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    """Return a tensor in a dtype, itself when it has it or is not floating."""
    return tensor.to(dtype) if tensor.is_floating_point() and tensor.dtype != dtype else tensor


def cast(tensors: Tensors, dtypes: Mapping[str, torch.dtype]) -> dict[str, Tensor]:
    """Return named tensors in the dtypes of the same names."""
    return dict(zip(tensors, fx.convert(list(tensors.values()), [dtypes[n] for n in tensors]), strict=True))


def rest_dtypes(policy: Any, settings: Settings, tensors: Tensors) -> dict[str, torch.dtype]:
    """Return the dtype of each parameter or buffer in the state; those that are not floating keep theirs."""
    return {
        n: settings.of_tensor(n, "param", policy.param) if t.is_floating_point() else t.dtype
        for n, t in tensors.items()
    }


def _unwrapped(state: Any) -> tuple[dict[str, Tensor], Any]:
    """Return the parameters with all the digits there are, and the optimizer state that belongs to them."""
    if isinstance(state.opt_state, MasterWeightsState):
        return {n: state.opt_state.master[n] for n in state.params}, state.opt_state.inner
    return dict(state.params), state.opt_state


def _cast_kept(opt_state: Any, params: Tensors, dtypes: Mapping[str, torch.dtype]) -> Any:
    """Cast what an optimizer keeps for each parameter in its dtype: moments, whole or factored, averages, copies.

    Such a leaf has the parameter's name at the end of its own and its dtype. Counts, norms and what was asked for in
    another dtype (`mu_dtype=`) stay.
    """

    def change(name: str, leaf: Any) -> Any:
        parts = name.split(".")
        owner = next((o for i in range(len(parts)) if (o := ".".join(parts[i:])) in params), None)
        if owner is None or not isinstance(leaf, Tensor):
            return leaf
        own = params[owner]
        alike = leaf.dtype == own.dtype and (leaf.shape == own.shape or leaf.ndim > 0)
        return fitted(leaf, dtypes[owner]) if alike else leaf

    return tree.map_with_name(change, opt_state)


def _loss_scale(policy: Any, current: Any, device: torch.device | None) -> Any:
    """Return the scale of the policy at its beginning, or the current one if it is of the same kind and settings."""
    wanted = policy.loss_scale
    if isinstance(wanted, NoLossScale):
        return None
    if current is not None and tree.structure(current) == tree.structure(wanted):
        return current
    return wanted.on(device)
