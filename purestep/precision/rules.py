"""Rules: which parts of a model differ from the policy, and the settings of each module and tensor that follow.

Owns `Rule`, dtype words and the resolution of rules along a model. It casts nothing; `casting` and `convert` do.
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
"""The normalisation layers of torch: their statistics need the digits of float32, and their cost is memory, not
maths."""

_WORDS = {
    "f64": torch.float64,
    "f32": torch.float32,
    "f16": torch.float16,
    "bf16": torch.bfloat16,
}
_SHORT = {dtype: word for word, dtype in _WORDS.items()}


def dtype_of(value: DType, *, where: str = "dtype") -> torch.dtype:
    """Return a floating dtype from itself or a word: f16, bf16, f32, f64, or the long names of torch.

    Example:
        >>> dtype_of("bf16"), dtype_of("float64"), dtype_of(torch.float16)
        (torch.bfloat16, torch.float64, torch.float16)
    """
    found = value if isinstance(value, torch.dtype) else _WORDS.get(value)
    if found is None and isinstance(value, str):
        found = next((d for d in _SHORT if str(d) == f"torch.{value}"), None)
    if found not in _SHORT:
        raise PrecisionError(
            explain(
                "this is not a dtype to compute in", where=f"{where}={value!r}", instead=f"one of {', '.join(_WORDS)}"
            )
        )
    return found


def word(dtype: torch.dtype) -> str:
    """Return the short word of a dtype."""
    return _SHORT[dtype]


@checked(PrecisionError)
@dataclasses.dataclass(frozen=True)
class Rule:
    """What differs for the modules and tensors that a filter names, and for all inside of them.

    Attributes:
        where: globs of dotted names (of modules, parameters or buffers), a function of the name, or module classes.
        param, compute, output: dtypes, or None to leave them as they are.
        float8: False keeps linear layers out of float8, True takes them in; None leaves it.
        required: whether a model in which it finds nothing is refused.
    """

    where: Where
    param: torch.dtype | None = None
    compute: torch.dtype | None = None
    output: torch.dtype | None = None
    float8: bool | None = None
    required: bool = True

    @property
    def classes(self) -> tuple[type[nn.Module], ...]:
        given = self.where if isinstance(self.where, tuple) else (self.where,)
        return tuple(c for c in given if isinstance(c, type))

    def names(self, name: str) -> bool:
        """Tell whether the filter names this module or tensor itself."""
        if self.classes:
            return False
        return tree.matches(self.where, name)  # type: ignore[arg-type]

    def module(self, name: str, module: nn.Module) -> bool:
        """Tell whether the filter finds this module itself."""
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
        parts += [] if self.float8 is None else [f"float8={self.float8}"]
        return f"{shown}:{'+'.join(parts)}"


def rule(where: Any, **changes: Any) -> Rule:
    """Make a rule from what a user writes: lists become tuples, words become dtypes."""
    kept = tuple(where) if isinstance(where, list) else where
    members = kept if isinstance(kept, tuple) else (kept,)
    kinds = {"glob" if isinstance(m, str) else "class" if isinstance(m, type) else "function" for m in members}
    bad_class = any(isinstance(m, type) and not issubclass(m, nn.Module) for m in members)
    if len(kinds) != 1 or bad_class or not (isinstance(members[0], (str, type)) or (callable(kept))):
        raise PrecisionError(
            explain(
                "a rule goes by globs, by module classes or by a function of the name",
                where=f"where({where!r})",
                instead='policy.where("*norm*", compute="f32")\npolicy.where(nn.LayerNorm, compute="f32")',
            )
        )
    dtypes: dict[str, Any] = {n: changes.pop(n, None) for n in ("param", "compute", "output")}
    made: dict[str, Any] = {n: None if d is None else dtype_of(d, where=n) for n, d in dtypes.items()}
    if all(d is None for d in made.values()) and changes.get("float8") is None:
        raise PrecisionError(explain("the rule changes nothing", where=f"where({where!r})", instead='compute="f32"'))
    return Rule(kept, **made, **changes)


class Settings:
    """The rules of a policy resolved along a model, or along names alone when there is no model.

    A rule holds for what its filter finds and for all inside of that; where several say something, the last one counts.
    """

    def __init__(self, rules: Iterable[Rule], module: nn.Module | None) -> None:
        self.rules = tuple(rules)
        self._found: dict[str, frozenset[int]] = {}
        self.direct: dict[str, frozenset[int]] = {}
        for path, m in [] if module is None else module.named_modules():
            own = frozenset(i for i, r in enumerate(self.rules) if r.module(path, m))
            self.direct[path] = own
            self._found[path] = own | self._inherited(path)

    def _inherited(self, path: str) -> frozenset[int]:
        if not path:
            return frozenset()
        parent = path.rpartition(".")[0]
        if parent not in self._found:
            named = frozenset(i for i, r in enumerate(self.rules) if r.names(parent))
            self._found[parent] = named | self._inherited(parent)
        return self._found[parent]

    def of_module(self, path: str, field: str, default: Any) -> Any:
        """Return what counts for a module: the last rule that says something, or the policy."""
        return self._last(self._found[path], field, default)

    def of_tensor(self, name: str, field: str, default: Any) -> Any:
        """Return what counts for a parameter or a buffer."""
        named = frozenset(i for i, r in enumerate(self.rules) if r.names(name))
        return self._last(named | self._inherited(name), field, default)

    def said_of(self, path: str, field: str) -> Any:
        """Return what the rules that find this very module say, None when they say nothing."""
        return self._last(self.direct[path], field, None)

    def _last(self, numbers: frozenset[int], field: str, default: Any) -> Any:
        said = [getattr(self.rules[i], field) for i in sorted(numbers)]
        said = [value for value in said if value is not None]
        return said[-1] if said else default

    def idle(self, names: Iterable[str]) -> Iterator[Rule]:
        """Yield the rules that find nothing: no module, and none of these tensors."""
        everything = list(names)
        busy = frozenset().union(*self._found.values()) if self._found else frozenset()
        for i, r in enumerate(self.rules):
            if (i not in busy and not r.classes and not any(r.names(n) for n in everything)) or (
                i not in busy and r.classes and self.direct
            ):
                yield r


def check_rules(settings: Settings, names: Iterable[str]) -> None:
    """Refuse a rule that finds nothing: it is a misspelt path more often than not."""
    shown = list(names)
    for r in settings.idle(shown):
        if r.required:
            modules = [path for path in settings.direct if path]
            raise PrecisionError(
                explain(
                    "a rule of the precision policy finds nothing in the model",
                    where=f"where({r.where!r}); modules: {', '.join(modules[:8])}; tensors: {', '.join(shown[:8])}",
                    instead="the dotted name of a module or a tensor, with * for the rest",
                )
            )
