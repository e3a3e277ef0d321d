"""Which tensor of a file is which tensor of a model: `Weights`, and the matching of names.

Nothing is left out silently: a name that only the file or only the model has is an error that lists both sides, unless
a filter of the caller allows it. Values are not read here, except where two names of a file stand for tied parameters.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor, nn

from purestep import tree
from purestep.arguments import Location, Name, checked
from purestep.errors import ConfigError, TemplateMismatch, explain
from purestep.module_tensors import Adapted, slots
from purestep.sharding.init_tape import reading, unrecorded
from purestep.sharding.spec import Box
from purestep.tree import Filter
from purestep.weights.files import stored_weights
from purestep.weights.stored import Stored, described

T = TypeVar("T")
Rename = Callable[[str], str] | Mapping[str, str]
_SHOWN = 8
_COMPARED = 2**24  # elements of two tensors that are compared at a time


@checked(ConfigError)
@dataclasses.dataclass(frozen=True)
class Weights:
    """Weights of a file or directory that another program wrote, for `ps.init(..., weights=)`.

    Args:
        path: a file or directory, see `ps.interop.read_weights`: safetensors, Hugging Face shards with their index,
            `.pt`, Lightning's `.ckpt`, a directory of `torch.distributed.checkpoint`.
        rename: maps names of the file to names of the model: a function, or a mapping of prefixes, of which the first
            match is replaced (`{"model.": ""}`).
        keep: filter of names of the model that keep their initial values if the file lacks them, such as a new head.
        ignore: filter of names of the file, after renaming, to leave out.
        strict: whether any other name that only the file or only the model has is an error, as in
            `nn.Module.load_state_dict`.
        entry: the entry of a checkpoint that holds the weights, see `ps.interop.read_weights`.

    Examples:
        >>> import tempfile
        >>> import purestep as ps
        >>> with tempfile.TemporaryDirectory() as directory:
        ...     torch.save({"net.weight": torch.ones(1, 2)}, f"{directory}/a.pt")
        ...     weights = Weights(f"{directory}/a.pt", rename={"net.": ""}, keep="bias")
        ...     state = ps.init(lambda: nn.Linear(2, 1), ps.optim.sgd(0.1), weights=weights)
        >>> state.params["weight"]
        tensor([[1., 1.]])
    """

    path: Location
    _: dataclasses.KW_ONLY
    rename: Rename | None = None
    keep: Filter | None = None
    ignore: Filter | None = None
    strict: bool = True
    entry: Name | None = None

    def matched(self, module: nn.Module | None, own: Mapping[str, Tensor]) -> dict[str, Stored]:
        """Return the tensors of the file by the names of a model.

        Args:
            module: the model; None: each name stands for itself.
            own: its parameters and buffers by name, of which only shapes and dtypes are read.

        Raises:
            ConfigError: no such file or entry, or a filter that matches nothing.
            SnapshotError: the file cannot be read.
            TemplateMismatch: names or shapes that do not fit.
        """
        given = renamed(stored_weights(self.path, entry=self.entry), self.rename)
        return matched(given, module, own, self.keep, self.ignore, str(self.path), strict=self.strict)


def loaded(given: str | Path | Weights, module: nn.Module | None, own: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return the tensors of a model with the values of a file in place of those that it has.

    Under deferred init they are read later, and of a tensor that is split over ranks only this rank's part.

    Args:
        given: what `weights=` stands for.
        module, own: see `Weights.matched`; the values have the dtypes and devices of `own`.
    """
    with unrecorded():
        found = weights_of(given).matched(module, own)
    return {**own, **{name: reading(_cast(stored, own[name].dtype), own[name]) for name, stored in found.items()}}


def _cast(stored: Stored, dtype: torch.dtype) -> Callable[[Box], Tensor]:
    # A part of a file may be a window on memory that is not its own.
    return lambda box: stored.part(box).to(dtype, copy=True).contiguous()


def weights_of(given: object) -> Weights:
    """Return what `weights=` stands for."""
    if isinstance(given, Weights):
        return given
    if not isinstance(given, (str, Path)) or not str(given):
        raise ConfigError(
            explain(
                "weights= is a path of weights, or ps.Weights",
                where=f"weights={given!r:.80}",
                instead="ps.init(model, tx, weights='model.safetensors')\n"
                "ps.init(model, tx, weights=ps.Weights('directory', rename={'model.': ''}))",
            )
        )
    return Weights(given)


# --- names ------------------------------------------------------------------------------------------------------------


def renamed(given: Mapping[str, T], rename: Rename | None) -> dict[str, T]:
    """Return a mapping under the new names that `rename` gives to its names."""
    if rename is None:
        return dict(given)
    found: dict[str, T] = {}
    used: set[str] = set()
    for name, tensor in given.items():
        new = _by_function(name, rename) if callable(rename) else _by_prefix(name, rename, used)
        if not isinstance(new, str) or new in found:
            what = "rename= gives two tensors one name" if isinstance(new, str) else "rename= returns a name"
            raise ConfigError(explain(what, where=f"{name!r} -> {new!r}"))
        found[new] = tensor
    if not callable(rename) and set(rename) - used:
        prefix = sorted(set(rename) - used)[0]
        raise ConfigError(explain("a prefix of rename= matches nothing", where=f"{prefix!r}; names: {_listed(given)}"))
    return found


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


def names_of(module: nn.Module | None, own: Iterable[str]) -> tuple[dict[str, str], set[str]]:
    """Return the names in a `state_dict` of the tensors of a model, with all names of tied tensors; and the names that
    a `state_dict` leaves out."""
    own = list(own)
    if module is None:
        return {name: name for name in own}, set()
    found, there = slots(module), set(own)
    first = {
        id(places[0][0][places[0][1]]): name for name, places in (found.params | found.buffers).items() if name in there
    }
    tensors = [*module.named_parameters(remove_duplicate=False), *module.named_buffers(remove_duplicate=False)]
    aliases = {alias: first[id(t)] for alias, t in tensors if id(t) in first}
    stored = {aliases[name] for name in module.state_dict(keep_vars=True) if name in aliases}
    return aliases, there - stored


# --- matching ---------------------------------------------------------------------------------------------------------


def matched(
    given: Mapping[str, Stored],
    module: nn.Module | None,
    own: Mapping[str, Tensor],
    keep: Filter | None,
    ignore: Filter | None,
    source: str,
    *,
    strict: bool = True,
) -> dict[str, Stored]:
    """Return the given tensors by the names of a model, see `Weights.matched`."""
    aliases, left_out = names_of(module, own)
    _check_matches("ignore", ignore, given, source)
    _check_matches("keep", keep, own, "the state")
    values: dict[str, Stored] = {}
    left_over = []
    for name, tensor in given.items():
        target = aliases.get(name)
        if ignore is not None and tree.matches(ignore, name):
            continue
        if target is None:
            left_over.append(name)
        elif target in values and not _same_values(values[target], tensor):
            raise TemplateMismatch(
                explain(
                    "tied parameters have different values",
                    where=f"{name!r} and {target!r} in {source}",
                    why="the state holds one tensor for all tied parameters",
                    instead=f"ignore={name!r}   # to take the other",
                )
            )
        else:
            values[target] = tensor
    kept = left_out | _added(module) | {name for name in own if keep is not None and tree.matches(keep, name)}
    missing = [name for name in own if name not in values and name not in kept]
    misshapen = [name for name, value in values.items() if value.shape != tuple(own[name].shape)]
    if (strict and (missing or left_over)) or misshapen:
        raise _mismatch(own, values, missing, left_over, misshapen, source, _advice(missing, left_over, aliases))
    return values


def _added(module: nn.Module | None) -> set[str]:
    """Return the names of adapters, which files of the model's weights need not hold."""
    found = [] if module is None else [(n, m) for n, m in module.named_modules() if isinstance(m, Adapted)]
    return {f"{name}.{key}" if name else key for name, m in found for key in m.adapters}


def _same_values(a: Stored, b: Stored) -> bool:
    """Compare two tensors of a file, some rows at a time."""
    if a.shape != b.shape or not a.shape:
        return a.shape == b.shape and torch.equal(a.part(((), ())).to(b.dtype), b.part(((), ())))
    length, *rest = a.shape
    rows = max(1, _COMPARED // max(1, torch.Size(rest).numel()))
    boxes = [((i, *(0,) * len(rest)), (min(rows, length - i), *rest)) for i in range(0, length, rows)]
    return all(torch.equal(a.part(box).to(b.dtype), b.part(box)) for box in boxes)


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
    values: Mapping[str, Stored],
    missing: list[str],
    left_over: list[str],
    misshapen: list[str],
    source: str,
    advice: str | None,
) -> TemplateMismatch:
    shapes = [f"{n}: {described(values[n])}, in the state {tree.describe(own[n])}" for n in misshapen[:_SHOWN]]
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
