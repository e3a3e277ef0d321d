"""Conversion of optimizer states from `torch.optim` to purestep and back, for the optimizers that both have.

Hyperparameters are not converted: they belong to the transformation in purestep, and to the param groups in torch.
"""

from __future__ import annotations

import copy
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from purestep import tree
from purestep.errors import OptimError, explain
from purestep.optim.base import GradientTransformation
from purestep.optim.state_access import Path, nodes, replaced

# torch's key of a parameter's state, and its possible names in purestep.
_NAMES: dict[str, tuple[str, ...]] = {
    "exp_avg": ("mu",),
    "exp_avg_sq": ("nu",),
    "max_exp_avg_sq": ("nu_max",),
    "exp_inf": ("nu",),
    "momentum_buffer": ("momentum",),
    "square_avg": ("square_avg", "nu"),
    "grad_avg": ("mu",),
    "acc_delta": ("acc_delta",),
    "sum": ("sum_of_squares",),
    "prev": ("prev",),
    "step_size": ("step_size",),
    "row_var": ("row",),
    "col_var": ("column",),
    "variance": ("full",),
}
_KEYS: dict[str, tuple[str, ...]] = {
    "SGD": ("momentum_buffer",),
    "Adam": ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "AdamW": ("step", "exp_avg", "exp_avg_sq", "max_exp_avg_sq"),
    "NAdam": ("step", "mu_product", "exp_avg", "exp_avg_sq"),
    "RAdam": ("step", "exp_avg", "exp_avg_sq"),
    "Adamax": ("step", "exp_avg", "exp_inf"),
    "RMSprop": ("step", "square_avg", "momentum_buffer", "grad_avg"),
    "Adagrad": ("step", "sum"),
    "Adadelta": ("step", "square_avg", "acc_delta"),
    "Rprop": ("step", "prev", "step_size"),
    "Adafactor": ("step", "row_var", "col_var", "variance"),
    "Muon": ("momentum_buffer",),
}


def from_torch(tx: GradientTransformation, state_dict: Mapping[str, Any], params: Mapping[str, Tensor]) -> Any:
    """Return our optimizer state with the contents of a torch optimizer's `state_dict()`.

    Args:
        tx: the transformation for the converted state: `adamw(...)` for `torch.optim.AdamW`, alone or in a chain.
        state_dict: the result of `optimizer.state_dict()`.
        params: parameters by name, in the order in which the torch optimizer was given them
            (`dict(model.named_parameters())`).

    Raises:
        OptimError: the numbers of parameters differ, or a part of torch's state has no place in the state of `tx`.

    Examples:
        >>> from purestep import optim
        >>> model = torch.nn.Linear(2, 1)
        >>> theirs = torch.optim.Adam(model.parameters())
        >>> model(torch.ones(1, 2)).sum().backward(); theirs.step()
        >>> ours = from_torch(optim.adam(1e-3), theirs.state_dict(), dict(model.named_parameters()))
        >>> ours.count
        tensor(1)
    """
    params = {name: p.detach() for name, p in params.items()}
    order = [i for group in state_dict["param_groups"] for i in group["params"]]
    if len(order) != len(params):
        where = f"state_dict: {len(order)}, params: {len(params)}"
        raise OptimError(explain("the state_dict is of another number of parameters", where=where))
    state, filled, step = tx.init(params), {}, None
    for name, index in zip(params, order, strict=True):
        for key, value in state_dict["state"].get(index, {}).items():
            if key == "step":
                step = value
            elif key == "mu_product":
                filled[_scalar_path(state, "mu_product", key)] = value
            elif value is not None:
                filled[place_of(state, key, name)] = value
    if step is None and filled:
        step = 1
    for path, _ in nodes(state):
        if step is not None and path and path[-1] == "count":
            filled[path] = step
    for path, value in filled.items():
        state = replaced(state, path, _fitted(path, _at(state, path), value))
    return state


def to_torch(opt_state: Any, params: Mapping[str, Tensor], optimizer: torch.optim.Optimizer) -> dict[str, Any]:
    """Return a `state_dict` for a torch optimizer with the contents of our optimizer state.

    Args:
        opt_state: our state.
        params: parameters by name, in the order in which the torch optimizer was given them.
        optimizer: the torch optimizer; only its class and its param groups are read. Load with `load_state_dict`.

    Raises:
        OptimError: torch's optimizer is unknown, or the numbers of parameters differ.

    Examples:
        >>> from purestep import optim
        >>> model = torch.nn.Linear(2, 1)
        >>> params = dict(model.named_parameters())
        >>> theirs = torch.optim.Adam(model.parameters())
        >>> theirs.load_state_dict(to_torch(optim.adam(1e-3).init(params), params, theirs))
        >>> theirs.state[model.bias]["exp_avg"]
        tensor([0.])
    """
    keys = _KEYS.get(type(optimizer).__name__)
    if keys is None:
        known = ", ".join(_KEYS)
        raise OptimError(explain(f"the state of {type(optimizer).__name__} is not known", why=f"known are {known}"))
    result = copy.deepcopy({"state": {}, "param_groups": optimizer.state_dict()["param_groups"]})
    order = [i for group in result["param_groups"] for i in group["params"]]
    if len(order) != len(params):
        where = f"optimizer: {len(order)}, params: {len(params)}"
        raise OptimError(explain("the optimizer has another number of parameters", where=where))
    for (name, param), index in zip(params.items(), order, strict=True):
        entry = {key: _torch_value(opt_state, key, name, param) for key in keys}
        result["state"][index] = {key: value for key, value in entry.items() if value is not None}
    return result


def _torch_value(state: Any, key: str, name: str, param: Tensor) -> Tensor | None:
    if key in ("step", "mu_product"):
        found = [v for p, v in nodes(state) if p and p[-1] == ("count" if key == "step" else key)]
        return found[0].to(torch.float32).cpu().clone() if found else None
    found = [value for path, value in _places(state, key, name)]
    if len(found) != 1 or found[0].numel() == 0 < param.numel():
        return None
    return found[0].detach().clone()


def _places(state: Any, key: str, name: str) -> list[tuple[Path, Tensor]]:
    suffix = tuple(name.split("."))
    for ours in _NAMES.get(key, ()):
        wanted = [
            (path, value)
            for path, value in nodes(state)
            if isinstance(value, Tensor) and (path[-2:] == (ours, name) or path[-len(suffix) - 1 :] == (ours, *suffix))
        ]
        if wanted:
            return wanted
    return []


def place_of(state: Any, key: str, name: str) -> Path:
    places = _places(state, key, name)
    if len(places) != 1:
        raise OptimError(
            explain(
                f"torch's {key!r} of {name!r} has {'several places' if places else 'no place'} in the state",
                where=", ".join(".".join(path) for path, _ in places) or f"opt_state: {type(state).__name__}",
                why="the transformation is not the counterpart of that torch optimizer",
                instead="from_torch(optim.adamw(1e-3), torch_adamw.state_dict(), params)",
            )
        )
    return places[0][0]


def _scalar_path(state: Any, name: str, key: str) -> Path:
    found = [path for path, _ in nodes(state) if path and path[-1] == name]
    if len(found) != 1:
        raise OptimError(
            explain(f"torch's {key!r} has no place in the state", where=f"opt_state: {type(state).__name__}")
        )
    return found[0]


def _at(state: Any, path: Path) -> Any:
    return dict(nodes(state))[path]


def _fitted(path: Path, old: Tensor, new: Any) -> Tensor:
    value = torch.as_tensor(new)
    if value.numel() == 1 and old.dim() == 0:
        value = value.reshape(())
    if value.shape != old.shape:
        where = f"{'.'.join(path)}: {tree.describe(value)} into {tree.describe(old)}"
        raise OptimError(explain("a tensor of torch's state has another shape", where=where))
    return value.detach().to(old).clone()
