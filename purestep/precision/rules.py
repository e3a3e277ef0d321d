"""Rules: the modules and tensors of a model that differ from the policy, and the settings of each one.

Owns `Rule`, dtype words and the resolution of rules along a model. It casts nothing; `cast_params` and `convert_state`
do.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import nn

from purestep import _torch, tree
from purestep.arguments import checked
from purestep.errors import PrecisionError, explain

DType = torch.dtype | str
Where = str | tuple[str, ...] | type[nn.Module] | tuple[type[nn.Module], ...] | Callable[[str], bool]

NORMS: tuple[type[nn.Module], ...] = (
    _torch.NormBase,
    nn.LayerNorm,
    nn.GroupNorm,
    nn.RMSNorm,
    nn.LocalResponseNorm,
)
"""The normalisation layers of torch: their statistics need the precision of float32, and they are bound by memory, so
that float32 arithmetic costs them little."""

_WORDS = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
_SHORT = {dtype: word for word, dtype in _WORDS.items()}


def dtype_of(value: DType, *, where: str = "dtype") -> torch.dtype:
    """Return a floating dtype from itself or a word: f16, bf16, f32, f64, or the long names of torch.

    Examples:
        >>> dtype_of("bf16"), dtype_of("float64"), dtype_of(torch.float16)
        (torch.bfloat16, torch.float64, torch.float16)
    """
    dtype = value if isinstance(value, torch.dtype) else _WORDS.get(value)
    if dtype is None and isinstance(value, str):
        dtype = next((d for d in _SHORT if str(d) == f"torch.{value}"), None)
    if dtype not in _SHORT:
        raise PrecisionError(
            explain(
                "this is no floating-point dtype", where=f"{where}={value!r}", instead=f"one of {', '.join(_WORDS)}"
            )
        )
    return dtype


def word(dtype: torch.dtype) -> str:
    """Return the short word of a dtype."""
    return _SHORT[dtype]


@checked(PrecisionError)
@dataclasses.dataclass(frozen=True)
class Rule:
    """Other settings for the modules and tensors that a filter matches, and for everything inside of these modules.

    Attributes:
        where: globs of dotted names (of modules, parameters or buffers), a function of the name, or module classes.
        param, compute, output: dtypes, or None to keep those of the policy.
        float8: False excludes linear layers from float8, True includes them; None keeps the setting of the policy.
        int8: the same for int8.
        required: whether a model in which it matches nothing is refused.
    """

    where: Where
    param: torch.dtype | None = None
    compute: torch.dtype | None = None
    output: torch.dtype | None = None
    float8: bool | None = None
    int8: bool | None = None
    required: bool = True

    @property
    def classes(self) -> tuple[type[nn.Module], ...]:
        filters = self.where if isinstance(self.where, tuple) else (self.where,)
        return tuple(filter_ for filter_ in filters if isinstance(filter_, type))

    def names(self, name: str) -> bool:
        """Tell whether the filter matches the name of this module or tensor itself."""
        if self.classes:
            return False
        return tree.matches(self.where, name)  # type: ignore[arg-type]

    def module(self, name: str, module: nn.Module) -> bool:
        """Tell whether the filter matches this module itself, by its class or its name."""
        return isinstance(module, self.classes) if self.classes else self.names(name)

    def __str__(self) -> str:
        if self.classes:
            shown = "|".join(c.__name__ for c in self.classes)
        elif callable(self.where):
            shown = getattr(self.where, "__qualname__", type(self.where).__name__)
        else:
            shown = "|".join((self.where,) if isinstance(self.where, str) else self.where)  # type: ignore[arg-type]
        changes = [(n, getattr(self, n)) for n in ("param", "compute", "output")]
        parts = [f"{n}={word(d)}" for n, d in changes if d is not None]
        switches = [(n, getattr(self, n)) for n in ("float8", "int8")]
        parts += [f"{n}={on}" for n, on in switches if on is not None]
        return f"{shown}:{'+'.join(parts)}"


def rule(where: Any, **changes: Any) -> Rule:
    """Make a rule from what a user writes: lists become tuples, words become dtypes."""
    filters = tuple(where) if isinstance(where, list) else where
    members = filters if isinstance(filters, tuple) else (filters,)
    kinds = {"glob" if isinstance(m, str) else "class" if isinstance(m, type) else "function" for m in members}
    bad_class = any(isinstance(m, type) and not issubclass(m, nn.Module) for m in members)
    if len(kinds) != 1 or bad_class or not (isinstance(members[0], (str, type)) or (callable(filters))):
        raise PrecisionError(
            explain(
                "a rule goes by globs, by module classes or by a function of the name",
                where=f"where({where!r})",
                instead='policy.where("*norm*", compute="f32")\npolicy.where(nn.LayerNorm, compute="f32")',
            )
        )
    dtypes: dict[str, Any] = {n: changes.pop(n, None) for n in ("param", "compute", "output")}
    resolved: dict[str, Any] = {n: None if d is None else dtype_of(d, where=n) for n, d in dtypes.items()}
    if all(d is None for d in resolved.values()) and all(on is None for on in changes.values()):
        raise PrecisionError(explain("the rule changes nothing", where=f"where({where!r})", instead='compute="f32"'))
    return Rule(filters, **resolved, **changes)


class Settings:
    """The rules of a policy resolved along a model, or along names alone when there is no model.

    A rule applies to what its filter matches and to everything inside of that. Where several rules have a value for a
    setting, the last one counts.
    """

    def __init__(self, rules: Iterable[Rule], module: nn.Module | None) -> None:
        self.rules = tuple(rules)
        self._matching: dict[str, frozenset[int]] = {}
        self.direct: dict[str, frozenset[int]] = {}
        for path, submodule in [] if module is None else module.named_modules():
            matching = frozenset(i for i, r in enumerate(self.rules) if r.module(path, submodule))
            self.direct[path] = matching
            self._matching[path] = matching | self._inherited(path)

    def _inherited(self, path: str) -> frozenset[int]:
        # The model itself has no module around it.
        if not path:
            return frozenset()
        parent = path.rpartition(".")[0]
        if parent not in self._matching:
            named = frozenset(i for i, r in enumerate(self.rules) if r.names(parent))
            self._matching[parent] = named | self._inherited(parent)
        return self._matching[parent]

    def of_module(self, path: str, field: str, default: Any) -> Any:
        """Return the setting of a module: of the last rule that applies and has a value for it, else the default."""
        return self._last(self._matching[path], field, default)

    def casts(
        self, path: str, compute: torch.dtype, output: torch.dtype
    ) -> tuple[torch.dtype, torch.dtype | None, torch.dtype]:
        """Return what a module computes in, what the module around it does (None for the model), and what it returns.

        Args:
            path: of the module.
            compute, output: those of the policy.
        """
        inner: torch.dtype = self.of_module(path, "compute", compute)
        outer = self.of_module(path.rpartition(".")[0], "compute", compute) if path else None
        return inner, outer, self.of_module_itself(path, "output") or outer or output

    def of_tensor(self, name: str, field: str, default: Any) -> Any:
        """Return the setting of a parameter or a buffer, in the same way."""
        named = frozenset(i for i, r in enumerate(self.rules) if r.names(name))
        return self._last(named | self._inherited(name), field, default)

    def of_module_itself(self, path: str, field: str) -> Any:
        """Return the setting of the rules that match this module itself, not one around it; None without any."""
        return self._last(self.direct[path], field, None)

    def _last(self, numbers: frozenset[int], field: str, default: Any) -> Any:
        values = [getattr(self.rules[i], field) for i in sorted(numbers)]
        values = [value for value in values if value is not None]
        return values[-1] if values else default

    def unused(self, names: Iterable[str]) -> Iterator[Rule]:
        """Yield the rules that match nothing: no module, and none of these tensors."""
        tensors = list(names)
        used = frozenset().union(*self._matching.values()) if self._matching else frozenset()
        for number, rule in enumerate(self.rules):
            if number in used:
                continue
            # Without a model there are no modules that a rule by class could match, so it is not unused.
            if self.direct if rule.classes else not any(rule.names(name) for name in tensors):
                yield rule


def check_rules(settings: Settings, names: Iterable[str]) -> None:
    """Refuse a required rule that matches nothing: most often its path is misspelt."""
    tensors = list(names)
    for unused in settings.unused(tensors):
        if unused.required:
            modules = [path for path in settings.direct if path]
            listed = f"modules: {', '.join(modules[:8])}; tensors: {', '.join(tensors[:8])}"
            raise PrecisionError(
                explain(
                    "a rule of the precision policy matches nothing in the model",
                    where=f"where({unused.where!r}); {listed}",
                    instead="the dotted name of a module or a tensor, with * for the rest",
                )
            )
