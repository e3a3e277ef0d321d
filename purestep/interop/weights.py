"""Weights by name: into a state from a module (`from_module`) and files (`load_weights`), and out to a file.

`purestep.weights` reads the files and matches the names; here their tensors become leaves of a state.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor, nn

from purestep import bits
from purestep.arguments import Count, Location, Name, checked
from purestep.errors import ConfigError, explain
from purestep.module_tensors import module_of, slots
from purestep.optim.average import AverageState
from purestep.optim.base import GradientTransformation
from purestep.optim.conditional import LookaheadState
from purestep.optim.optimizers.lbfgs import LbfgsState
from purestep.optim.optimizers.schedule_free import ScheduleFreeState
from purestep.optim.state_access import nodes
from purestep.precision.master_params import MasterWeightsState
from purestep.snapshot import export
from purestep.state import TrainState
from purestep.tree import Filter
from purestep.weights.directories import write_directory
from purestep.weights.matching import Rename, Weights, matched, names_of
from purestep.weights.stored import InMemory, Stored, leaf_like

# Optimizer states that hold copies of the parameters, or values that depend on their history.
_HOLDERS = (AverageState, LbfgsState, LookaheadState, MasterWeightsState, ScheduleFreeState)


@checked(ConfigError, failed=True)
def load_weights(
    state: TrainState,
    path: Location,
    *,
    rename: Rename | None = None,
    keep: Filter | None = None,
    ignore: Filter | None = None,
    strict: bool = True,
    entry: Name | None = None,
    tx: GradientTransformation | None = None,
) -> TrainState:
    """Return a state with the parameters and buffers of a file that another program wrote.

    Of a state that is split over processes each reads its own part. Step, key and optimizer state stay as they are.
    Names and shapes must match: the error lists the names that are missing in the file or left over there, and a
    `rename=` of one prefix if that makes all names fit. `ps.init(..., weights=path)` does both at once.

    Args:
        state: state of the model, from `ps.init`, placed by a plan or not. Values are cast to its dtypes.
        path: a file or directory, see `ps.interop.read_weights`: safetensors, Hugging Face shards with their index,
            `.pt`, Lightning's `.ckpt`, a directory of `torch.distributed.checkpoint`.
        rename: maps names of the file to names of the state: a function, or a mapping of prefixes, of which the first
            match is replaced (`{"model.": ""}`).
        keep: filter of names of the state that keep their values if the file lacks them, such as a new head.
        ignore: filter of names of the file, after renaming, to leave out.
        strict: whether any other name that only the file or only the state has is an error.
        entry: the entry of a checkpoint that holds the weights, see `ps.interop.read_weights`.
        tx: makes the optimizer state anew for the loaded parameters. Needed if the optimizer state holds copies of
            parameters: averages, master weights.

    Returns:
        The state with the values of the file. Buffers that a `state_dict` leaves out (`persistent=False`) stay. For
        tied parameters the file may hold one of the names or all.

    Raises:
        ConfigError: no such file or entry, a filter that matches nothing, or an optimizer state that holds copies.
        SnapshotError: the file cannot be read.
        TemplateMismatch: names or shapes that do not fit.

    Examples:
        >>> import tempfile
        >>> import torch
        >>> import purestep as ps
        >>> state = ps.init(lambda: nn.Linear(2, 1), ps.optim.sgd(0.1))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     torch.save({"state_dict": {"net.weight": torch.ones(1, 2), "net.bias": torch.zeros(1)}},
        ...                f"{directory}/a.ckpt")
        ...     loaded = load_weights(state, f"{directory}/a.ckpt", rename={"net.": ""})
        >>> loaded.params["weight"]
        tensor([[1., 1.]])
    """
    weights = Weights(path, rename=rename, keep=keep, ignore=ignore, strict=strict, entry=entry)
    return _replaced(state, weights.matched(*model_and_tensors(state)), tx)


@checked(ConfigError, failed=True)
def from_module(
    state: TrainState,
    module: nn.Module,
    *,
    keep: Filter | None = None,
    ignore: Filter | None = None,
    tx: GradientTransformation | None = None,
) -> TrainState:
    """Return a state with the parameters and buffers of a module: the inverse of `ps.to_module`.

    Args:
        state: state of a model with the same names, from `ps.init`. (`ps.init(module, tx)` makes an initial state.)
        module: the module, whose tensors are copied.
        keep, ignore, tx: see `ps.load_weights`.

    Raises:
        ConfigError: a filter that matches nothing, or an optimizer state that holds copies of the parameters.
        TemplateMismatch: names or shapes that do not fit; the error lists them.

    Examples:
        >>> import purestep as ps
        >>> state = ps.init(lambda: nn.Linear(2, 1), ps.optim.sgd(0.1))
        >>> module = ps.to_module(state)
        >>> _ = nn.init.ones_(module.weight)
        >>> from_module(state, module).params["weight"]
        tensor([[1., 1.]])
    """
    found = slots(module, fresh=True)
    given = {name: places[0][0][places[0][1]] for name, places in (found.params | found.buffers).items()}
    stored: dict[str, Stored] = {name: InMemory(tensor) for name, tensor in given.items()}
    model, own = model_and_tensors(state)
    return _replaced(state, matched(stored, model, own, keep, ignore, type(module).__qualname__), tx)


@checked(ConfigError)
def save_weights(state: TrainState, path: Location, *, shard_bytes: Count = 5_000_000_000) -> Path:
    """Write the parameters and buffers of a state for other programs, named as in a `state_dict`.

    A file appears complete or not at all, and so does a directory: its index appears last.
    `ps.snapshot.consolidate` does the same for a snapshot on disk.

    Args:
        state: any state of `ps.init`. If it is split over processes, every process calls this function.
        path: ends in `.safetensors`, or in `.pt` or `.pth` for `torch.load`: one file, which every process writes to
            its own path, holding the full state. Without a suffix, or with "/" at its end: a directory of shards of
            safetensors with their index, as `from_pretrained` of Hugging Face's libraries reads it beside a
            `config.json`. Processes write it together, on a file system that they share, and none holds more than one
            shard and one full tensor; a state that is not split is written by rank 0.
        shard_bytes: bytes of a shard of a directory; a tensor that is larger has a shard of its own.

    Returns:
        The absolute path.

    Raises:
        ConfigError: another suffix, or a directory that holds weights already.
        SnapshotError: another process could not write its shards.
        MissingExtra: safetensors needs `pip install "purestep[export]"`.

    Examples:
        >>> import tempfile
        >>> import purestep as ps
        >>> state = ps.init(lambda: nn.Linear(2, 1), ps.optim.sgd(0.1))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     sorted(ps.interop.read_weights(save_weights(state, f"{directory}/model.pt")))
        ...     sorted(file.name for file in save_weights(state, f"{directory}/tiny", shard_bytes=8).iterdir())
        ['bias', 'weight']
        ['model-00001-of-00002.safetensors', 'model-00002-of-00002.safetensors', 'model.safetensors.index.json']
    """
    model, own = model_and_tensors(state)
    aliases, left_out = names_of(model, own)
    kept = {alias: own[name] for alias, name in aliases.items() if name not in left_out}
    if not Path(path).suffix or str(path).endswith("/"):
        return write_directory(Path(path), kept, shard_bytes)
    whole = {name: bits.whole(own[name]).detach().cpu().contiguous() for name in set(aliases.values()) - left_out}
    values = {alias: whole[aliases[alias]] for alias in kept}
    return export.write_file(path, values, {"format": "pt", "step": str(int(state.step)), "written_by": "purestep"})


# --- into a state -----------------------------------------------------------------------------------------------------


def _replaced(state: TrainState, values: Mapping[str, Stored], tx: GradientTransformation | None) -> TrainState:
    new = {n: leaf_like(old, values[n]) if n in values else old for n, old in {**state.params, **state.buffers}.items()}
    params = {name: new[name] for name in state.params}
    changed = state.replace(params=params, buffers={name: new[name] for name in state.buffers})
    if tx is not None:
        return changed.replace(opt_state=tx.init(params))
    copies = [node for _, node in nodes(state.opt_state) if isinstance(node, _HOLDERS)]
    if copies:
        raise ConfigError(
            explain(
                "the optimizer state holds copies of the parameters to be replaced",
                where=f"opt_state: {type(copies[0]).__qualname__}",
                why="training would go on from the copies, and the new values be lost",
                instead="tx=tx   # makes the optimizer state anew; of a step with a policy it is step.tx",
            )
        )
    return changed


def model_and_tensors(state: TrainState) -> tuple[nn.Module | None, dict[str, Tensor]]:
    return None if state.model is None else module_of(state), {**state.params, **state.buffers}
