"""Settings of a function: the names of its arguments, the forms of their values by annotation, and their errors.

Optimizers, schedules and plans are named by the functions that make them, dataclasses by their fields. `settings.py`
has their values as JSON.
"""

from __future__ import annotations

import collections.abc
import contextlib
import dataclasses
import enum
import functools
import inspect
import types
import typing
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from purestep import optim, precision, sharding, tree
from purestep.arguments import check_of
from purestep.errors import ConfigError, explain, nearest_name
from purestep.loop.cadence import Until
from purestep.loop.until_text import until
from purestep.optim.base import GradientTransformation
from purestep.optim.schedules.base import ScheduleBase
from purestep.precision import Policy
from purestep.sharding.plan import Plan

NAME = "name"  # the key of a mapping that names a function or class; the other keys are its arguments
REQUIRED = inspect.Parameter.empty
Maker = Callable[..., Any]


class SettingError(ConfigError):
    """A setting has a name or a value that the experiment does not take.

    Attributes:
        path: dotted name of the setting.
        problem: the end of a sentence that begins with the name of the setting.
        instead: advice in words; "" for none.
        nearest: a similar setting to write instead: its dotted name, or name and value; "" for none.
    """

    def __init__(self, path: str, problem: str, instead: str = "", *, nearest: str = "") -> None:
        super().__init__(explain(f"the setting {path} {problem}", instead=nearest or instead or None))
        self.path, self.problem, self.instead, self.nearest = path, problem, instead, nearest


@dataclasses.dataclass(frozen=True)
class Kind:
    """The forms that the values of a setting may have, from the annotation of an argument; a union has several.

    Attributes:
        hint: the annotation.
        text: parses a value written as text, and raises an error of purestep for a wrong text; None if there is no
            such form.
        wanted: description of such a text, for errors.
        makers: functions or classes that make a value, by name.
        group: a dataclass whose fields are settings of their own.
        plain: the part of the annotation that is JSON already; None if there is none.
        optional: whether the value may be None.
    """

    hint: Any
    text: Callable[[str], Any] | None = None
    wanted: str = ""
    makers: Mapping[str, Maker] = dataclasses.field(default_factory=dict)
    group: type | None = None
    plain: Any = None
    optional: bool = False

    @property
    def known(self) -> bool:
        """Whether a value has any form in JSON."""
        return self.text is not None or bool(self.makers) or self.group is not None or self.plain is not None


@dataclasses.dataclass(frozen=True)
class Setting:
    """An argument of an experiment, or of a function that makes one of its values.

    Attributes:
        name: name of the argument.
        kind: the forms of its values.
        default: the Python default; `REQUIRED` without one.
        help: text of the docstring about the argument.
    """

    name: str
    kind: Kind
    default: Any = REQUIRED
    help: str = ""


# --- from an annotation to a kind -------------------------------------------------------------------------------------

_PLAIN = (bool, int, float, str, list, tuple, dict)


@functools.cache
def makers_of(kind: Any) -> dict[str, Maker]:
    """Return the functions of purestep that return a type, by name: optimizers, schedules, plans."""
    if kind is Plan:
        names = "ddp fsdp hsdp single zero1 zero2".split()
        return {name: getattr(sharding, name) for name in names}
    found: dict[str, Maker] = {}
    for name in dir(optim):
        value = None if name.startswith("_") else getattr(optim, name)
        if isinstance(value, types.FunctionType) and name not in ("lift", "lift_scheduler", "from_torch"):
            made = _hints(value).get("return")
            if isinstance(made, type) and issubclass(made, kind):
                found[name] = value
    return found


def kind_of(hint: Any) -> Kind:
    """Return the forms of the values of a setting.

    Args:
        hint: the evaluated annotation.

    Examples:
        >>> kind_of(float | None).plain, kind_of(float | None).optional
        (<class 'float'>, True)
        >>> "cosine_decay_schedule" in kind_of(optim.ScalarOrSchedule).makers
        True
    """
    options = [option for option in options_of(hint) if option is not Tensor]
    optional = type(None) in options
    options = [option for option in options if option is not type(None)]
    kind = Kind(hint, optional=optional)
    plain: list[Any] = []
    groups: list[type] = []
    for option in options:
        origin: Any = typing.get_origin(option) or option
        if found := _text_kind(origin):
            kind = dataclasses.replace(kind, text=found[1], wanted=found[0])
        elif isinstance(origin, type) and issubclass(origin, GradientTransformation):
            kind = dataclasses.replace(kind, makers={**kind.makers, **makers_of(GradientTransformation)})
        elif origin is Plan or (isinstance(origin, type) and issubclass(origin, ScheduleBase)):
            kind = dataclasses.replace(kind, makers={**kind.makers, **makers_of(typing.cast(Any, origin))})
        elif option == optim.Schedule:
            kind = dataclasses.replace(kind, makers={**kind.makers, **makers_of(ScheduleBase)})
        elif dataclasses.is_dataclass(origin) and isinstance(origin, type):
            groups += [origin, *_subclasses(origin)]
        elif origin in _PLAIN or origin is typing.Literal or origin in (collections.abc.Sequence, Mapping):
            plain.append(option)
    if len(groups) == 1:
        kind = dataclasses.replace(kind, group=groups[0])
    elif groups:
        kind = dataclasses.replace(kind, makers={**kind.makers, **{group.__name__: group for group in groups}})
    return dataclasses.replace(kind, plain=typing.Union[tuple(plain)]) if plain else kind  # noqa: UP007


def options_of(hint: Any) -> list[Any]:
    """Return the alternatives of an annotation, without the metadata of `Annotated`."""
    origin = typing.get_origin(hint)
    if origin is typing.Annotated:
        return options_of(typing.get_args(hint)[0])
    if origin in (typing.Union, types.UnionType):
        return [option for part in typing.get_args(hint) for option in options_of(part)]
    return [type(None) if hint is None else hint]


def _subclasses(base: type) -> list[type]:
    found: list[type] = []
    direct: type
    for direct in base.__subclasses__():
        found += [direct, *_subclasses(direct)]
    return [sub for sub in dict.fromkeys(found) if dataclasses.is_dataclass(sub)]


def _text_kind(kind: Any) -> tuple[str, Callable[[str], Any]] | None:
    """Return, for a type that is written as text, a description for errors and the parser; else None."""
    if not isinstance(kind, type):
        return None
    if issubclass(kind, Until):
        return "the end of a run, such as 5epochs, 1000steps or 2h", until
    if issubclass(kind, Policy):
        return f"a precision policy: {', '.join(precision.NAMES)}", precision.policy
    if kind is torch.dtype:
        return "a dtype such as bfloat16", _dtype
    if kind is torch.device:
        return "a device such as cpu or cuda:0", _device
    if issubclass(kind, Path):
        return "a path", kind
    if issubclass(kind, enum.Enum):
        return f"one of {', '.join(kind.__members__)}", lambda text: kind[text]
    return None


def _dtype(text: str) -> torch.dtype:
    found = getattr(torch, text.removeprefix("torch."), None)
    if not isinstance(found, torch.dtype):
        raise ConfigError(f"torch has no dtype {text}")
    return found


def _device(text: str) -> torch.device:
    try:
        return torch.device(text)
    except RuntimeError as error:
        raise ConfigError(str(error).partition("\n")[0]) from error


# --- the settings of a function ---------------------------------------------------------------------------------------


@functools.cache
def settings_of(maker: Maker) -> tuple[Setting, ...]:
    """Return the arguments of a function or a class as settings; the fields of a dataclass that is the only argument.

    Examples:
        >>> [(s.name, s.default) for s in settings_of(optim.lion)][:2]
        [('learning_rate', <class 'inspect._empty'>), ('b1', 0.9)]
    """
    whole = group_of(maker)
    owner = maker if whole is None else whole
    hints, described = _hints(owner), _described(owner)
    ours = str(getattr(owner, "__module__", "")).partition(".")[0] == __name__.partition(".")[0]
    found = []
    for name, parameter in inspect.signature(owner).parameters.items():
        if parameter.kind is parameter.VAR_KEYWORD:
            continue
        hint = hints.get(name, Any)
        if parameter.kind is parameter.VAR_POSITIONAL:
            hint, default = list[hint], ()  # type: ignore[valid-type]
        else:
            default = parameter.default
        if dataclasses.is_dataclass(owner):
            default = _default(owner, name, default)
        kind = kind_of(hint)
        if kind.plain is None and not kind.makers and ours and tree.Filter in (hint, *typing.get_args(hint)):
            kind = dataclasses.replace(kind, plain=str)
        found.append(Setting(name, kind, default, described.get(name, "")))
    return tuple(found)


def group_of(maker: Maker) -> type | None:
    """Return the dataclass that is the only argument of a function; None for other functions."""
    if isinstance(maker, type):
        return None
    parameters = list(inspect.signature(maker).parameters.values())
    hint = _hints(maker).get(parameters[0].name) if len(parameters) == 1 else None
    found = kind_of(hint).group if hint is not None else None
    return found


def _default(owner: Any, name: str, otherwise: Any) -> Any:
    for field in dataclasses.fields(owner):
        if field.name == name and field.default_factory is not dataclasses.MISSING:
            return field.default_factory()
    return otherwise


@functools.cache
def _hints(owner: Any) -> dict[str, Any]:
    own_init = isinstance(owner, type) and not dataclasses.is_dataclass(owner)
    target = owner.__init__ if own_init else owner
    try:
        return typing.get_type_hints(target, include_extras=True)
    except (NameError, AttributeError, TypeError):
        return _one_by_one(target)


def _one_by_one(target: Any) -> dict[str, Any]:
    """Return the annotations that can be evaluated, if others use names that only type checkers see."""
    names, found = getattr(inspect.unwrap(target), "__globals__", {}), {}
    for name, text in getattr(inspect.unwrap(target), "__annotations__", {}).items():
        with contextlib.suppress(Exception):
            found[name] = eval(text, dict(names)) if isinstance(text, str) else text
    return found


def _described(owner: Any) -> dict[str, str]:
    """Return the text of the docstring about each argument, on one line each."""
    import docstring_parser

    found: dict[str, str] = {}
    for documented in reversed([owner, *getattr(owner, "__mro__", [])]):
        text = inspect.getdoc(documented) if documented is not object else None
        for parameter in docstring_parser.parse(text or "").params:
            for name in parameter.arg_name.replace("*", "").split(","):
                found[name.strip()] = " ".join((parameter.description or "").split())
    return found


# --- the texts of errors ----------------------------------------------------------------------------------------------


_USUAL = ("adamw", "lion", "sgd", "cosine_decay_schedule", "warmup_cosine_decay_schedule")  # examples in messages


def wanted(kind: Kind) -> str:
    """Return a description of the values of a setting, for errors and help."""
    words = [kind.wanted] if kind.wanted else []
    if kind.plain is not None:
        words.append(check_of(kind.plain)(object()) or "a value")
    if kind.makers:
        names = list(kind.makers)
        usual = [name for name in _USUAL if name in kind.makers]
        words.append(f"a name such as {', '.join(usual)}" if len(names) > 6 else f"one of {', '.join(names)}")
    return " or ".join([*words, *(["none"] if kind.optional else [])]) or "a value"


def near(word: str, known: Iterable[str]) -> str:
    """Return the known name most similar to a word of a command line; "" if none is similar."""
    return nearest_name(word.replace("-", "_"), known)


def unknown(path: str, name: str, known: Mapping[str, Any]) -> SettingError:
    """Return the error for a name that is no setting, with the most similar one."""
    found = near(name, known)
    instead = f"one of {', '.join(known)}" if known else ""
    return SettingError(joined(path, name), "is no setting", instead, nearest=joined(path, found) if found else "")


def no_maker(text: str, kind: Kind, path: str) -> SettingError:
    """Return the error for the name of a function that makes no value of a setting."""
    return not_a_value(path, kind, text, list(kind.makers))


def not_a_value(path: str, kind: Kind, text: str, names: Sequence[str] = ()) -> SettingError:
    """Return the error for a text that is no value of a setting, with the most similar name."""
    found = near(text.partition("(")[0], names)
    return SettingError(path, f"must be {wanted(kind)}, not {text!r}", nearest=f"{path} {found}" if found else "")


def joined(path: str, name: str) -> str:
    """Return the dotted name of a setting inside of another one."""
    return f"{path}.{name}" if path else name
