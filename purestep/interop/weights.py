"""Weights by name: into a state from a module (`from_module`) and files (`load_weights`), and out to a file.

Owns the matching of names. Nothing is left out silently: a name that only the file or only the state has is an error
that lists both sides, unless a filter of the caller allows it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from purestep import bits, tree
from purestep.arguments import Location, Name, checked
from purestep.errors import ConfigError, TemplateMismatch, explain
from purestep.interop.weight_files import read_weights
from purestep.module_tensors import module_of, slots
from purestep.optim.average import AverageState
from purestep.optim.base import GradientTransformation
from purestep.optim.conditional import LookaheadState
from purestep.optim.optimizers.lbfgs import LbfgsState
from purestep.optim.optimizers.schedule_free import ScheduleFreeState
from purestep.optim.state_access import nodes
from purestep.precision.master_params import MasterWeightsState
from purestep.sharding import placement
from purestep.snapshot import export
from purestep.state import TrainState
from purestep.tree import Filter

Rename = Callable[[str], str] | Mapping[str, str]
_SHOWN = 8
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
    entry: Name | None = None,
    tx: GradientTransformation | None = None,
) -> TrainState:
    """Return a state with the parameters and buffers of a file that another program wrote.

    Step, key and optimizer state stay as they are. Names and shapes must match: the error lists the names that are
    missing in the file or left over there, and a `rename=` of one prefix if that makes all names fit.

    Args:
        state: state of the model, from `ps.init`, placed by a plan or not. Values are cast to its dtypes.
        path: a file or directory, see `ps.interop.read_weights`: safetensors, Hugging Face shards with their index,
            `.pt`, Lightning's `.ckpt`, a directory of `torch.distributed.checkpoint`.
        rename: maps names of the file to names of the state: a function, or a mapping of prefixes, of which the first
            match is replaced (`{"model.": ""}`).
        keep: filter of names of the state that keep their values if the file lacks them, such as a new head.
        ignore: filter of names of the file, after renaming, to leave out.
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
        >>> import purestep as ps
        >>> state = ps.init(lambda: nn.Linear(2, 1), ps.optim.sgd(0.1))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     torch.save({"state_dict": {"net.weight": torch.ones(1, 2), "net.bias": torch.zeros(1)}},
        ...                f"{directory}/a.ckpt")
        ...     loaded = load_weights(state, f"{directory}/a.ckpt", rename={"net.": ""})
        >>> loaded.params["weight"]
        tensor([[1., 1.]])
    """
    given = _renamed(read_weights(path, entry=entry), rename)
    return _filled(state, given, keep, ignore, tx, str(path))


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
    return _filled(state, given, keep, ignore, tx, type(module).__qualname__)


@checked(ConfigError, failed=True)
def save_weights(state: TrainState, path: Location) -> Path:
    """Write the parameters and buffers of a state as one file for other programs, named as in a `state_dict`.

    The file is written atomically. If the state is split over processes, every process calls this function and writes
    the full state to its own path. `ps.snapshot.consolidate` does the same for a snapshot on disk.

    Args:
        state: any state of `ps.init`.
        path: ends in `.safetensors`, or in `.pt` or `.pth` for `torch.load`.

    Returns:
        The absolute path.

    Raises:
        ConfigError: another suffix.
        MissingExtra: `.safetensors` needs `pip install "purestep[export]"`.

    Examples:
        >>> import tempfile
        >>> import purestep as ps
        >>> state = ps.init(lambda: nn.Linear(2, 1), ps.optim.sgd(0.1))
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     sorted(read_weights(save_weights(state, f"{directory}/model.pt")))
        ['bias', 'weight']
    """
    aliases, left_out = _model_names(state)
    tensors = {n: bits.whole(t).detach().cpu().contiguous() for n, t in {**state.params, **state.buffers}.items()}
    kept = {alias: tensors[name] for alias, name in aliases.items() if name not in left_out}
    return export.write_file(path, kept, {"format": "pt", "step": str(int(state.step)), "written_by": "purestep"})


# --- matching ---------------------------------------------------------------------------------------------------------


def _renamed(given: Mapping[str, Tensor], rename: Rename | None) -> dict[str, Tensor]:
    if rename is None:
        return dict(given)
    renamed: dict[str, Tensor] = {}
    used: set[str] = set()
    for name, tensor in given.items():
        new = _by_function(name, rename) if callable(rename) else _by_prefix(name, rename, used)
        if not isinstance(new, str) or new in renamed:
            what = "rename= gives two tensors one name" if isinstance(new, str) else "rename= returns a name"
            raise ConfigError(explain(what, where=f"{name!r} -> {new!r}"))
        renamed[new] = tensor
    if not callable(rename) and set(rename) - used:
        prefix = sorted(set(rename) - used)[0]
        raise ConfigError(explain("a prefix of rename= matches nothing", where=f"{prefix!r}; names: {_listed(given)}"))
    return renamed


def _by_function(name: str, rename: Callable[[str], str]) -> str:
    try:
        return rename(name)
    except Exception as error:  # a function of the user
        raise ConfigError(explain("rename= fails", where=f"{name!r}: {type(error).__name__}: {error}")) from error


def _by_prefix(name: str, prefixes: Mapping[str, str], used: set[str]) -> str:
    for old, new in prefixes.items():
        if name.startswith(old):
            used.add(old)
            return new + name[len(old) :]
    return name


def _model_names(state: TrainState) -> tuple[dict[str, str], set[str]]:
    """Return the names in a `state_dict` of the tensors of the state, with all names of tied tensors; and the names
    that a `state_dict` leaves out."""
    own = {**state.params, **state.buffers}
    if state.model is None:
        return {name: name for name in own}, set()
    module = module_of(state)
    found = slots(module)
    first = {
        id(places[0][0][places[0][1]]): name for name, places in (found.params | found.buffers).items() if name in own
    }
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    aliases = {alias: first[id(t)] for alias, t in tensors if id(t) in first}
    stored = {aliases[name] for name in module.state_dict(keep_vars=True) if name in aliases}
    return aliases, set(own) - stored


def _filled(
    state: TrainState,
    given: Mapping[str, Tensor],
    keep: Filter | None,
    ignore: Filter | None,
    tx: GradientTransformation | None,
    source: str,
) -> TrainState:
    own = {**state.params, **state.buffers}
    aliases, left_out = _model_names(state)
    _check_matches("ignore", ignore, given, source)
    _check_matches("keep", keep, own, "the state")
    values: dict[str, Tensor] = {}
    left_over = []
    for name, tensor in given.items():
        target = aliases.get(name)
        if target is None:
            left_over += [] if ignore is not None and tree.matches(ignore, name) else [name]
        elif target in values and not torch.equal(values[target].to(tensor.dtype), tensor):
            raise TemplateMismatch(
                explain(
                    "tied parameters have different values",
                    where=f"{name!r} and {target!r} in {source}",
                    why="the state holds one tensor for all tied parameters",
                    instead=f"ignore={name!r}   # to take the other",
                )
            )
        elif not (ignore is not None and tree.matches(ignore, name)):
            values[target] = tensor
    kept = left_out | {name for name in own if keep is not None and tree.matches(keep, name)}
    missing = [name for name in own if name not in values and name not in kept]
    misshapen = [name for name, value in values.items() if value.shape != own[name].shape]
    if missing or left_over or misshapen:
        raise _mismatch(own, values, missing, left_over, misshapen, source, _advice(missing, left_over, aliases))
    return _replaced(state, values, tx)


def _replaced(state: TrainState, values: Mapping[str, Tensor], tx: GradientTransformation | None) -> TrainState:
    new = {n: _like(old, values[n]) if n in values else old for n, old in {**state.params, **state.buffers}.items()}
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


def _like(old: Tensor, value: Tensor) -> Tensor:
    """Return a value with the dtype and device of a leaf of the state; for a split leaf, this rank's shard."""
    full = value.detach().to(old.device, old.dtype, copy=True)
    if not placement.is_split(old):
        return full
    return placement.rewrap(placement.part_like(full, old), old)


# --- errors -----------------------------------------------------------------------------------------------------------


def _check_matches(argument: str, wanted: Filter | None, names: Iterable[str], where: str) -> None:
    if wanted is not None and not any(tree.matches(wanted, name) for name in names):
        raise ConfigError(
            explain(f"the filter {argument}= matches nothing", where=f"{wanted!r}; names in {where}: {_listed(names)}")
        )


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    return ", ".join(map(repr, names[:_SHOWN])) + (f" and {len(names) - _SHOWN} more" if len(names) > _SHOWN else "")


def _mismatch(
    own: Mapping[str, Tensor],
    values: Mapping[str, Tensor],
    missing: list[str],
    left_over: list[str],
    misshapen: list[str],
    source: str,
    advice: str | None,
) -> TemplateMismatch:
    shapes = [f"{n}: {tree.describe(values[n])}, in the state {tree.describe(own[n])}" for n in misshapen[:_SHOWN]]
    lines = [
        f"missing ({len(missing)}): {_listed(missing)}" if missing else "",
        f"left over ({len(left_over)}): {_listed(left_over)}" if left_over else "",
        "; ".join(shapes),
    ]
    return TemplateMismatch(
        explain(
            "the weights do not fit the state",
            where=f"{source}\n" + "\n".join(filter(None, lines)),
            instead=advice,
        )
    )


def _advice(missing: list[str], left_over: list[str], known: Iterable[str]) -> str | None:
    """Return the code to write: a rename of one prefix if it makes all names fit, else filters."""
    sides = ((left_over, missing, set(left_over), "{{{0!r}: ''}}"), (missing, left_over, set(known), "{{'': {0!r}}}"))
    for names, others, there, text in sides:
        prefixes = {name[: i + 1] for name in names for i, letter in enumerate(name) if letter == "."}
        for prefix in sorted(prefixes, key=len):
            if others and all(prefix + other in there for other in others):
                return f"rename={text.format(prefix)}"
    lines = [f"keep={missing[0]!r}   # it keeps its values"] if missing else []
    return "\n".join(lines + ([f"ignore={left_over[0]!r}   # it is not used"] if left_over else [])) or None
