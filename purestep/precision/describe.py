"""`describe`: what a precision policy does to each module of a model, as a table. Users call it by `Policy.describe`.

It reads names, dtypes and shapes only, so the state may be on the meta device.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Iterator, Mapping
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from purestep.bits import human_bytes
from purestep.errors import PrecisionError, explain
from purestep.precision import convert_state
from purestep.precision.convert_state import PolicyFields, StateFields
from purestep.precision.linear_layers import converts
from purestep.precision.loss_scale import NoLossScale
from purestep.precision.rules import Rule, Settings, check_rules, word
from purestep.views import Block, Note, Printed, Table


class Described(PolicyFields, Protocol):
    """What is read here of a `Policy`, which imports this file for its method."""

    @property
    def compute(self) -> torch.dtype: ...
    @property
    def output(self) -> torch.dtype: ...
    @property
    def reduce(self) -> torch.dtype: ...
    @property
    def autocast(self) -> bool: ...
    @property
    def float8(self) -> str | None: ...
    @property
    def int8(self) -> str | None: ...


_OPTIONAL = ("float8", "int8", "by rule")  # columns that are left out where they are empty


@dataclasses.dataclass(frozen=True)
class ModuleDtypes:
    """What a policy does to one module: a row of the table.

    Attributes:
        path: dotted name of the module, "" for the model itself.
        kind: its class.
        elements: of its own parameters and buffers, without those of modules inside.
        rest: dtypes of those in the state, floating-point ones only.
        compute: what it computes in; None where each operator has its own (autocast).
        output: the dtype of what it returns; None where nothing casts it (autocast).
        float8, int8: the recipe by which it multiplies in these, None if it does not.
        rules: the rules that match the module itself.
    """

    path: str
    kind: str
    elements: int
    rest: tuple[torch.dtype, ...]
    compute: torch.dtype | None
    output: torch.dtype | None
    float8: str | None
    int8: str | None
    rules: tuple[str, ...]


@dataclasses.dataclass(frozen=True, repr=False)
class PolicyDescription(Printed):
    """The result of `Policy.describe`; it shows itself as a table of modules.

    Attributes:
        policy: in words.
        rows: the modules that have tensors of their own, or a rule, and the model itself.
        nbytes: of parameters and floating-point buffers at rest, without master weights.
        master: dtype of master weights, None without any.
        reduce: dtype in which gradients of microbatches are summed.
        loss_scale: as code, None without one.
    """

    policy: str
    rows: tuple[ModuleDtypes, ...]
    nbytes: int
    master: torch.dtype | None
    reduce: torch.dtype
    loss_scale: str | None

    def view(self) -> list[Block]:
        """Return the blocks that show it."""
        columns: dict[str, list[Any]] = {
            "module": [row.path or "the model" for row in self.rows],
            "type": [row.kind for row in self.rows],
            "elements": [row.elements or None for row in self.rows],
            "at rest": [", ".join(map(word, row.rest)) for row in self.rows],
            "computes in": [_named(row.compute, "autocast") for row in self.rows],
            "returns": [_named(row.output, "as computed") for row in self.rows],
            "float8": [row.float8 for row in self.rows],
            "int8": [row.int8 for row in self.rows],
            "by rule": ["; ".join(row.rules) for row in self.rows],
        }
        shown = {name: values for name, values in columns.items() if name not in _OPTIONAL or any(values)}
        facts = [f"{human_bytes(self.nbytes)} at rest", f"gradients of microbatches are summed in {word(self.reduce)}"]
        facts += [] if self.master is None else [f"master weights in {word(self.master)} in the optimizer state"]
        facts += [] if self.loss_scale is None else [f"loss scale: {self.loss_scale}"]
        return [Note(self.policy), Table(list(shown), list(zip(*shown.values(), strict=True))), Note("\n".join(facts))]


def _named(dtype: torch.dtype | None, otherwise: str) -> str:
    return otherwise if dtype is None else word(dtype)


def describe(policy: Described, value: object) -> PolicyDescription:
    """Return what a policy does to each module of a state's model, or of a module; see `Policy.describe`."""
    module, tensors = _parts(value)
    settings = Settings(policy.rules, module)
    check_rules(settings, tensors)
    rest = convert_state.rest_dtypes(policy, settings, tensors)
    return PolicyDescription(
        str(policy),
        tuple(_rows(policy, settings, module, tensors, rest)),
        sum(t.numel() * rest[name].itemsize for name, t in tensors.items()),
        policy.master,
        policy.reduce,
        None if isinstance(policy.loss_scale, NoLossScale) else repr(policy.loss_scale),
    )


def _parts(value: object) -> tuple[nn.Module, Mapping[str, Tensor]]:
    if isinstance(value, nn.Module):
        return value, {**dict(value.named_parameters()), **dict(value.named_buffers())}
    module = getattr(getattr(value, "model", None), "module", None)
    if isinstance(value, StateFields) and isinstance(module, nn.Module):
        return module, {**value.params, **value.buffers}
    raise PrecisionError(
        explain(
            "a policy describes the modules of a train state, or of a module",
            where=f"policy.describe({type(value).__qualname__})",
            why="its rules go by the modules of a model" if isinstance(value, StateFields) else None,
            instead="policy.describe(ps.init(model, tx))",
        )
    )


def _rows(
    policy: Described,
    settings: Settings,
    module: nn.Module,
    tensors: Mapping[str, Tensor],
    rest: Mapping[str, torch.dtype],
) -> Iterator[ModuleDtypes]:
    own: dict[str, list[str]] = {}
    for name in tensors:
        own.setdefault(name.rpartition(".")[0], []).append(name)
    for path, submodule in module.named_modules():
        matching = settings.direct[path]
        if path and path not in own and not matching:
            continue
        inner, _, output = settings.casts(path, policy.compute, policy.output)
        cast = not policy.autocast
        yield ModuleDtypes(
            path,
            type(submodule).__name__,
            sum(tensors[name].numel() for name in own.get(path, ())),
            _floating(rest[name] for name in own.get(path, ())),
            inner if cast else None,
            output if cast or not path else None,
            policy.float8 if converts(submodule, path, settings, "float8") else None,
            policy.int8 if converts(submodule, path, settings, "int8") else None,
            tuple(_short(rule, submodule) for number, rule in enumerate(settings.rules) if number in matching),
        )


def _short(rule: Rule, module: nn.Module) -> str:
    """Return a rule as text; of one for many classes only the one that the module is of."""
    kind = next((kind for kind in rule.classes if isinstance(module, kind)), None)
    return str(rule if kind is None else dataclasses.replace(rule, where=kind))


def _floating(dtypes: Iterable[torch.dtype]) -> tuple[torch.dtype, ...]:
    return tuple(dict.fromkeys(dtype for dtype in dtypes if dtype.is_floating_point))
