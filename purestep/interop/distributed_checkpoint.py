"""Checkpoints of `torch.distributed.checkpoint`: written as FSDP2 and torchtitan name them, and their optimizer read.

The parameters of such a checkpoint are weights like any other: `load_weights` and `ps.init(..., weights=)` read them.
Tensors are written and read in the parts that each rank holds.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from purestep import tree
from purestep.arguments import Location, Name, checked
from purestep.distributed.mesh import this_rank
from purestep.errors import ConfigError, TemplateMismatch, explain
from purestep.interop.weights import model_and_tensors
from purestep.optim.state_access import nodes, replaced
from purestep.optim.torch_interop import place_of, to_torch
from purestep.sharding.placement import is_split
from purestep.state import TrainState
from purestep.weights._torch import write_dcp
from purestep.weights.files import stored_weights
from purestep.weights.matching import names_of
from purestep.weights.stored import Stored, described, leaf_like, whole

Layout = Literal["fsdp2", "torchtitan"]


@checked(ConfigError)
def save_dcp(
    state: TrainState,
    path: Location,
    *,
    optimizer: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer] | None = None,
    layout: Layout = "fsdp2",
) -> Path:
    """Write a state as a checkpoint of `torch.distributed.checkpoint`, for a training with FSDP2 or torchtitan.

    Each rank writes the parts that it holds; nothing is gathered.

    Args:
        state: any state of `ps.init`. If it is split over processes, every process calls this function with the same
            directory, on a file system that they share; a state that is not split is written by rank 0.
        path: the directory; it may not hold a checkpoint yet.
        optimizer: makes the torch optimizer whose state is written, from parameters:
            `lambda params: torch.optim.AdamW(params, lr=1e-3)`. Its hyperparameters go into the param groups, its
            tensors come from the state, as `ps.optim.to_torch` converts them. None: the model alone.
        layout: "fsdp2": `{"model": ..., "optimizer": ...}` as `get_state_dict` of torch returns them. "torchtitan": the
            parameters at the top, and the flat names of `StateDictOptions(flatten_optimizer_state_dict=True)`.

    Returns:
        The absolute path of the directory.

    Raises:
        ConfigError: the directory holds a checkpoint already.
        OptimError: torch's optimizer is unknown.

    Examples:
        >>> import tempfile
        >>> import purestep as ps
        >>> state = ps.init(lambda: nn.Linear(2, 1), ps.optim.adam(0.1))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     saved = save_dcp(state, f"{directory}/dcp", optimizer=torch.optim.Adam)
        ...     sorted(ps.interop.read_weights(saved, entry="optimizer.state.bias"))
        ['exp_avg', 'exp_avg_sq', 'step']
    """
    directory = Path(path).absolute()
    split = any(is_split(leaf) for leaf in tree.leaves(state))
    if not split and this_rank() != 0:
        return directory
    if (directory / ".metadata").exists():
        raise ConfigError(
            explain("the directory holds a checkpoint already", where=str(directory), instead="a new directory")
        )
    model, own = model_and_tensors(state)
    aliases, left_out = names_of(model, own)
    weights = {alias: own[name].detach() for alias, name in aliases.items() if name not in left_out}
    theirs = {} if optimizer is None else _optimizer(state, optimizer)
    written: dict[str, Any] = {"model": weights, "optimizer": theirs} if layout == "fsdp2" else dict(weights)
    if layout == "torchtitan":
        written["optimizer"] = _flat(theirs)
    if not theirs:
        written.pop("optimizer")
    write_dcp(directory, written, alone=not split)
    return directory


def _optimizer(state: TrainState, make: Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]) -> dict[str, Any]:
    """Return the state of a torch optimizer by the names of parameters, as torch's `get_state_dict` does."""
    empty = [nn.Parameter(torch.empty(p.shape, dtype=p.dtype, device="meta")) for p in state.params.values()]
    made = make(empty)
    known = {id(p): name for p, name in zip(empty, state.params, strict=True)}
    order = [known[id(p)] for group in made.param_groups for p in group["params"]]
    params = {name: state.params[name] for name in order}
    numbered = to_torch(state.opt_state, params, made)
    return {
        "state": {order[i]: entry for i, entry in numbered["state"].items()},
        "param_groups": [g | {"params": [order[i] for i in g["params"]]} for g in numbered["param_groups"]],
    }


def _flat(theirs: dict[str, Any]) -> dict[str, Any]:
    """Return the flat form of an optimizer's state: a name for each value of each parameter."""
    flat = {f"state.{name}.{key}": v for name, entry in theirs.get("state", {}).items() for key, v in entry.items()}
    for group in theirs.get("param_groups", []):
        for key, value in group.items():
            flat |= {} if key == "params" else {f"param_groups.{name}.{key}": value for name in group["params"]}
    return flat


@checked(ConfigError, failed=True)
def load_dcp_optimizer(state: TrainState, path: Location, *, entry: Name = "optimizer") -> TrainState:
    """Return a state with the optimizer state of a checkpoint that FSDP2, torchtitan or `save_dcp` wrote.

    Each rank reads its part of each tensor. `state.step` becomes the number of updates that the optimizer counts, if it
    counts them. The parameters stay: `ps.load_weights(state, path)` loads them.

    Args:
        state: from `ps.init` with the transformation that is the counterpart of the torch optimizer.
        path: the directory, or a file of `torch.save` with such an entry.
        entry: name of the entry with the optimizer's state by the names of parameters.

    Raises:
        ConfigError: no such directory or entry.
        SnapshotError: it cannot be read.
        TemplateMismatch: a parameter of the state has no entry, an entry is of no parameter, or a shape differs.
        OptimError: a part of torch's state has no place in the state of the transformation.

    Examples:
        >>> import tempfile
        >>> import purestep as ps
        >>> state = ps.init(lambda: nn.Linear(2, 1), ps.optim.adam(0.1))
        >>> trained = state.apply_gradients(ps.optim.adam(0.1), state.params)
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     saved = save_dcp(trained, f"{directory}/dcp", optimizer=torch.optim.Adam)
        ...     loaded = load_dcp_optimizer(state, saved)
        >>> int(loaded.step), len(ps.diff(loaded.opt_state, trained.opt_state))
        (1, 0)
    """
    found = {n.removeprefix("state."): v for n, v in stored_weights(path, entry=entry).items()}
    by_param = {name: _entries(found, name) for name in state.params}
    used = {f"{name}.{key}" for name, entries in by_param.items() for key in entries}
    missing = [name for name, entries in by_param.items() if not entries]
    left_over = [n for n in found if n not in used and not n.startswith("param_groups.")]
    if missing or left_over:
        lines = [f"missing: {', '.join(missing[:8])}"] * bool(missing)
        lines += [f"left over: {', '.join(left_over[:8])}"] * bool(left_over)
        raise TemplateMismatch(
            explain("the optimizer state does not fit the parameters", where=f"{path}\n" + "\n".join(lines))
        )
    return _with(state, by_param)


def _entries(found: dict[str, Stored], name: str) -> dict[str, Stored]:
    start = f"{name}."
    return {n[len(start) :]: v for n, v in found.items() if n.startswith(start) and "." not in n[len(start) :]}


def _with(state: TrainState, by_param: dict[str, dict[str, Stored]]) -> TrainState:
    opt_state, count = state.opt_state, None
    for name, entries in by_param.items():
        for key, stored in entries.items():
            if key == "step":
                count = whole(stored)
                continue
            where = place_of(opt_state, key, name)
            old: Tensor = dict(nodes(opt_state))[where]
            if tuple(old.shape) != stored.shape:
                shapes = f"{described(stored)}, in the state {tree.describe(old)}"
                raise TemplateMismatch(
                    explain("the optimizer state does not fit the parameters", where=f"{name}.{key}: {shapes}")
                )
            opt_state = replaced(opt_state, where, leaf_like(old, stored))
    if count is None:
        return state.replace(opt_state=opt_state)
    for where, value in nodes(opt_state):
        if where and where[-1] == "count":
            opt_state = replaced(opt_state, where, count.reshape(()).to(value.device, value.dtype))
    return state.replace(opt_state=opt_state, step=count.reshape(()).to(state.step.device, state.step.dtype))
