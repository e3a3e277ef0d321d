"""What an argument may be, declared beside the parameter and held where a public function is called.

    @checked(OptimError)
    def ema(decay: Decay[Scalar], *, debias: bool = True) -> GradientTransformation: ...

The annotation is the declaration: its type, and a `Range` for a number. `checked` compares the arguments with it
*after* the call, so that an error which the function raises itself, and which knows more, always comes first. What it
adds is a named error where the function ended in an obscure one, or accepted nonsense without a word. Hence it is for
functions whose call has no effect but its result.
"""

from __future__ import annotations

import collections.abc
import dataclasses
import functools
import inspect
import math
import numbers
import operator
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, TypeGuard, TypeVar

from purestep.errors import PurestepError, explain

if TYPE_CHECKING:
    import torch
    from torch import Tensor

T = TypeVar("T")
F = TypeVar("F", bound=Callable[..., Any])
# Says what is wrong with a value, as the end of a sentence that begins with the parameter's name; None if nothing is.
Check = Callable[[Any], str | None]


@dataclasses.dataclass(frozen=True)
class Judge:
    """One kind of value: what it is called, and whether a value is one. Written into an annotation, it counts alone."""

    wanted: str
    fits: Callable[[Any], bool]


@dataclasses.dataclass(frozen=True)
class Range:
    """The numbers that an argument may be; NaN is in no range, infinity only where an end is closed there.

    Attributes:
        low, high: the ends.
        closed: which ends belong to it: "[]", "[)", "(]" or "()".

    Examples:
        >>> 0.0 in Range(0, 1, "[)"), 1.0 in Range(0, 1, "[)"), math.nan in Range(0, 1)
        (True, False, False)
    """

    low: float = -math.inf
    high: float = math.inf
    closed: str = "[]"

    def __contains__(self, value: Any) -> bool:
        above = value >= self.low if self.closed[0] == "[" else value > self.low
        below = value <= self.high if self.closed[1] == "]" else value < self.high
        return bool(above and below)

    def called(self, noun: str) -> str:
        """Return what to call a number of this range: "a finite number >= 0", "a number in [0, 1)"."""
        if math.isfinite(self.low) and self.high < 2**63:
            return f"a {noun} in {self.closed[0]}{self.low:g}, {self.high:g}{self.closed[1]}"
        finite = "finite " if self.closed[1] == ")" and noun == "number" else ""
        if self.low == -math.inf:
            return f"a {finite}{noun}"
        return f"a {finite}{noun} {'>=' if self.closed[0] == '[' else '>'} {self.low:g}"


Finite = Annotated[T, Range(closed="()")]
NonNegative = Annotated[T, Range(0, math.inf, "[)")]
Positive = Annotated[T, Range(0, math.inf, "()")]
Limit = Annotated[T, Range(0, math.inf, "(]")]  # infinity means no limit
Decay = Annotated[T, Range(0, 1, "[)")]
Fraction = Annotated[T, Range(0, 1, "[]")]
Count = Annotated[int, Range(1, 2**63, "[)")]  # what an int64 holds
Whole = Annotated[int, Range(0, 2**63, "[)")]
Seed = Annotated[int, Range(0, 2**64, "[)")]
Name = Annotated[str, Judge("a string that is not empty", lambda value: isinstance(value, str) and value != "")]
Location = Annotated[str | Path, Judge("a path that is not empty", lambda value: _is_path(value))]
Device = Annotated[
    "torch.device | str | int",
    Judge("a device such as 'cpu' or 'cuda:0' that torch knows", lambda value: _is_device(value)),
]
DeviceChoice = Annotated[
    "torch.device | str | int",
    Judge("'auto', or a device such as 'cpu' or 'cuda:0' that torch knows", lambda v: _is_auto(v) or _is_device(v)),
]


def checked(error: type[PurestepError], *, failed: bool = False) -> Callable[[F], F]:
    """Make a public function, or the constructor of a dataclass, hold the annotations of its parameters.

    Args:
        error: the class of the error for an argument that is not what its annotation says.
        failed: look at the arguments only when the call has failed: for functions that have an effect, which an error
            afterwards would deny, and for those that are called in every step.

    Examples:
        >>> from purestep.errors import ConfigError
        >>> @checked(ConfigError)
        ... def half(x: Positive[float]) -> float:
        ...     return x / 2
        >>> half(3.0)
        1.5
        >>> try:
        ...     half(-1.0)
        ... except ConfigError as caught:
        ...     print(caught)
        half: x must be a finite number > 0
          where:   x=-1.0
    """

    def decorate(function: Any) -> Any:
        if not isinstance(function, type):
            return _holding(function, _Contract(function, function.__name__, error), failed)
        initialise = function.__init__  # type: ignore[misc]
        function.__init__ = _holding(  # type: ignore[misc]
            initialise, _Contract(initialise, function.__name__, error, skip=1), failed
        )
        return function

    return decorate


def _holding(function: Callable[..., Any], contract: _Contract, failed: bool) -> Callable[..., Any]:
    @functools.wraps(function)
    def call(*args: object, **kwargs: object) -> object:
        try:
            result = function(*args, **kwargs)
        except Exception as error:
            refused = contract.refused(args, kwargs)
            if refused is None or _knows_more(error, contract.owner, refused.name):
                raise
            raise refused.error from error
        refused = None if failed else contract.refused(args, kwargs)
        if refused is not None:
            raise refused.error
        return result

    return call


def _knows_more(error: Exception, owner: str, parameter: str) -> bool:
    """Tell whether an error is the function's own and names the argument: then it says more than an annotation can."""
    by_annotation = "by_annotation" in getattr(error, "__dict__", {})  # of a function that this one calls
    named = re.search(rf"\b({re.escape(parameter)}\b|{re.escape(owner)}\()", str(error)) is not None
    return isinstance(error, PurestepError) and named and not by_annotation


@dataclasses.dataclass(frozen=True)
class _Refused:
    """An argument that is not what it is declared to be, and the error that says so."""

    name: str
    error: PurestepError


class _Contract:
    """The checks of a function's parameters, made from its annotations at the first call."""

    def __init__(self, function: Callable[..., Any], owner: str, error: type[PurestepError], skip: int = 0) -> None:
        self.function, self.owner, self.error, self.skip = function, owner, error, skip

    @functools.cached_property
    def parameters(self) -> list[inspect.Parameter]:
        return list(inspect.signature(self.function).parameters.values())[self.skip :]

    @functools.cached_property
    def checks(self) -> dict[str, Check]:
        return {p.name: check_of(_evaluated(p.annotation, self.names)) for p in self.parameters}

    @property
    def names(self) -> Mapping[str, Any]:
        """The names that the annotations may use."""
        return getattr(inspect.unwrap(self.function), "__globals__", {})

    def refused(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> _Refused | None:
        """Return the first argument that is not what it is declared to be; the default always is."""
        for parameter, name, value in self._bound(args[self.skip :], kwargs):
            wanted = None if value is parameter.default else self.checks[parameter.name](value)
            if wanted is not None:
                what = f"{self.owner}: {name} must be {wanted}"
                instead = self._instead(parameter, name)
                error = self.error(explain(what, where=f"{name}={_shown(value)}", instead=instead))
                error.__dict__["by_annotation"] = True
                return _Refused(name, error)
        return None

    def _instead(self, parameter: inspect.Parameter, name: str) -> str | None:
        hint = getattr(_evaluated(parameter.annotation, self.names), "argument_hint", None)
        if hint is not None:
            return f"{name}={hint}"
        default = parameter.default
        plain = isinstance(default, (bool, int, float, str)) and default != ""
        return f"{self.owner}({name}={default!r})   # the default" if plain else None

    def _bound(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Iterator[tuple[inspect.Parameter, str, Any]]:
        """Yield each argument with its parameter; what fits no parameter is Python's own error."""
        by_name, rest = {p.name: p for p in self.parameters}, iter(args)
        for parameter in self.parameters:
            if parameter.kind is parameter.VAR_POSITIONAL:
                yield from ((parameter, parameter.name, value) for value in rest)
            elif parameter.kind in (parameter.POSITIONAL_ONLY, parameter.POSITIONAL_OR_KEYWORD):
                for value in rest:
                    yield parameter, parameter.name, value
                    break
                else:
                    break
        extra = next((p for p in self.parameters if p.kind is p.VAR_KEYWORD), None)
        for name, value in kwargs.items():
            parameter = by_name.get(name, extra)  # type: ignore[assignment]
            if parameter is not None:
                yield parameter, name, value


def _evaluated(annotation: object, names: Mapping[str, Any]) -> object:
    """Return an annotation as an object; one with a name that is imported for type checkers only says nothing."""
    if annotation is inspect.Parameter.empty:
        return Any
    if not isinstance(annotation, str):
        return annotation
    try:
        return eval(annotation, dict(names))
    except (NameError, AttributeError, TypeError):
        return Any


# --- from a type to a check -------------------------------------------------------------------------------------------


def check_of(kind: object, within: Range | None = None) -> Check:
    """Return the check for a type as Python's `typing` writes it; what it cannot judge, it lets pass.

    Args:
        kind: a class, a union, `Literal`, `Annotated`, a callable, a sequence or a mapping of those, or a string that
            only type checkers can read.
        within: the range of numbers in it.

    Examples:
        >>> check = check_of(float | None)
        >>> check(0.5), check(None), check("x")
        (None, None, 'a number or None')
    """
    if typing.get_origin(kind) is Annotated:
        inner, *notes = typing.get_args(kind)
        for note in notes:
            if isinstance(note, Judge):
                return lambda value: None if note.fits(value) else note.wanted
        return check_of(inner, next((note for note in notes if isinstance(note, Range)), within))
    options = typing.get_args(kind) if _is_union(kind) else (kind,)
    judges = [_judge(option, within) for option in options]
    if any(judge is None for judge in judges):
        return lambda value: None
    known = [judge for judge in judges if judge is not None]
    wanted = _listed(list(dict.fromkeys(judge.wanted for judge in known)))
    return lambda value: None if any(judge.fits(value) for judge in known) else wanted


def _listed(words: list[str]) -> str:
    return " or ".join(filter(None, [", ".join(words[:-1]), words[-1]]))


def _is_union(kind: object) -> bool:
    return typing.get_origin(kind) in (typing.Union, types.UnionType)


def _judge(kind: object, within: Range | None) -> Judge | None:
    """Return the judge of one alternative; None where any value may be right."""
    if typing.get_origin(kind) is Annotated or _is_union(kind):
        check = check_of(kind, within)
        return Judge(check(object()) or "a value", lambda value: check(value) is None)
    if kind in _SIMPLE or kind in _of_torch():
        return (_SIMPLE.get(kind) or _of_torch()[kind])(within)
    origin, inner = typing.get_origin(kind), typing.get_args(kind)
    if origin is Literal:
        return Judge(" or ".join(map(repr, inner)), lambda value: _is_choice(value, inner))
    if origin is type:
        return Judge("a class", lambda value: isinstance(value, type))
    if origin is collections.abc.Callable or kind is Callable:
        # A class may stand for a function that makes something, but neither for a schedule nor for a filter.
        plain = within is not None or inner[-1:] == (bool,)
        return Judge("a function", lambda value: callable(value) and not (plain and isinstance(value, type)))
    if origin is collections.abc.Iterable:
        return _iterable(inner, within)
    if origin in (collections.abc.Sequence, tuple, list):
        return _sequence(inner, within)
    if origin is collections.abc.Mapping or origin is dict:
        return _mapping(inner, within)
    if (
        isinstance(kind, type)
        and not getattr(kind, "_is_protocol", False)
        and origin is None
        and kind not in (object, Any)
    ):
        return Judge(_class_name(kind), lambda value: isinstance(value, kind))
    return None


def _number(within: Range | None) -> Judge:
    wanted = "a number" if within is None else within.called("number")
    return Judge(wanted, lambda value: _is_real(value) and value == value and (within is None or value in within))


def _integer(within: Range | None) -> Judge:
    wanted = "a whole number" if within is None else within.called("whole number")
    return Judge(wanted, lambda value: _is_integer(value) and (_is_short(value) if within is None else value in within))


def _tensor(within: Range | None) -> Judge:
    """A tensor; one that stands for a number is 0-d. It is not read: that would wait for the device."""
    if within is None:
        return Judge("a tensor", _is_tensor)
    return Judge("a 0-d tensor", lambda value: _is_tensor(value) and value.dim() == 0 and _is_ordered(value))


def _simple(wanted: str, kind: type) -> Callable[[Range | None], Judge]:
    return lambda within: Judge(wanted, lambda value: isinstance(value, kind))


_SIMPLE: dict[Any, Callable[[Range | None], Judge]] = {
    float: _number,
    int: _integer,
    bool: _simple("True or False", bool),
    str: _simple("a string", str),
    None: _simple("None", type(None)),
    type(None): _simple("None", type(None)),
    os.PathLike: _simple("a path", os.PathLike),
}


def _of_torch() -> dict[Any, Callable[[Range | None], Judge]]:
    """Return the judges of torch's types; none while torch is not imported, because no annotation is one of them then.

    The command lists runs without it.
    """
    torch = sys.modules.get("torch")
    if torch is None:
        return {}
    return {
        torch.Tensor: _tensor,
        torch.dtype: _simple("a dtype such as torch.float32", torch.dtype),
        torch.device: _simple("a device such as torch.device('cpu')", torch.device),
    }


def _is_tensor(value: object) -> TypeGuard[Tensor]:
    torch = sys.modules.get("torch")
    return torch is not None and isinstance(value, torch.Tensor)


def _is_array(value: object) -> bool:
    numpy = sys.modules.get("numpy")
    return numpy is not None and isinstance(value, numpy.ndarray)


def _is_real(value: object) -> bool:
    """Tell whether a value is a number that torch takes for one: no bool, and no integer that is too long for it."""
    return not isinstance(value, bool) and isinstance(value, numbers.Real) and _is_short(value)


def _is_integer(value: object) -> bool:
    return not isinstance(value, bool) and isinstance(value, numbers.Integral)


def _is_short(value: object) -> bool:
    return not isinstance(value, numbers.Integral) or -(2**63) <= operator.index(value) < 2**63


def _is_path(value: object) -> bool:
    """Tell whether a value names a file or directory; an empty path would be the current directory."""
    if not isinstance(value, (str, os.PathLike)):
        return False
    text = os.fspath(value)
    return isinstance(text, str) and text.strip() != "" and "\0" not in text


def _is_auto(value: object) -> bool:
    return isinstance(value, str) and value == "auto"


def _is_device(value: Any) -> bool:
    import torch

    try:
        return not isinstance(value, bool) and torch.device(value) is not None
    except (RuntimeError, TypeError, ValueError, OverflowError):
        return False


def _is_ordered(value: Tensor) -> bool:
    return not value.is_complex() and str(value.dtype) != "torch.bool"


def _is_choice(value: object, choices: tuple[object, ...]) -> bool:
    """Tell whether a value is one of a few; `in` would ask an array for its elements, and take True for 1."""
    return any(type(value) is type(choice) and bool(value == choice) for choice in choices)


def _sequence(inner: tuple[object, ...], within: Range | None) -> Judge:
    """A list or a tuple; one of a fixed length where the annotation counts its elements."""
    fixed = bool(inner) and inner[-1] is not Ellipsis and len(inner) > 1
    kinds = [check_of(kind, within) for kind in inner if kind is not Ellipsis]
    example = (kinds[0](object()) if kinds else None) or "values"

    def fits(value: object) -> bool:
        if isinstance(value, (str, bytes)) or not isinstance(value, collections.abc.Sequence):
            return False
        if fixed:
            return len(value) == len(kinds) and all(c(x) is None for c, x in zip(kinds, value, strict=True))
        return not kinds or all(kinds[0](x) is None for x in value)

    return Judge(f"{len(kinds)} values, each {example}" if fixed else f"a sequence, each {example}", fits)


def _iterable(inner: tuple[object, ...], within: Range | None) -> Judge:
    """What can be gone through once; its elements are judged where that does not use them up."""
    elements = _sequence((*inner, ...), within)

    def fits(value: object) -> bool:
        if isinstance(value, collections.abc.Sequence):
            return elements.fits(value)
        return isinstance(value, collections.abc.Iterable) and not _is_tensor(value) and not _is_array(value)

    return Judge(elements.wanted, fits)


def _mapping(inner: tuple[object, ...], within: Range | None) -> Judge:
    keys, values = (check_of(kind, within) for kind in (inner or (Any, Any)))

    def fits(value: object) -> bool:
        return isinstance(value, collections.abc.Mapping) and all(
            keys(key) is None and values(item) is None for key, item in value.items()
        )

    return Judge("a mapping", fits)


def _class_name(kind: type) -> str:
    name = kind.__name__
    return f"{'an' if name[0] in 'AEIOU' else 'a'} {name}"


def _shown(value: object) -> str:
    """Return a short repr of an argument; a tensor is described by shape and dtype, not printed."""
    if _is_tensor(value):
        return f"a tensor of shape {tuple(value.shape)} and dtype {str(value.dtype).removeprefix('torch.')}"
    try:
        text = repr(value)
    except Exception:
        text = "\n"
    if "\n" in text:  # of a state, say, whose repr is a table
        text = f"a {type(value).__name__}"
    return text if len(text) <= 120 else text[:117] + "..."
