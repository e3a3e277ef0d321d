"""Settings: the arguments of an experiment as JSON, and back.

Owns the JSON form of each supported type: `Until` as its printed text, a policy as its name, an optimizer, schedule or
plan as the name of its function with the arguments, a dataclass as its fields. `experiment` encodes the arguments of
a run; the code that makes the experiment of a run again decodes them. No text is ever evaluated: calls are parsed, and
their names looked up in the tables of `kinds.py`.
"""

from __future__ import annotations

import ast
import collections.abc
import contextlib
import dataclasses
import enum
import inspect
import typing
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from purestep import precision
from purestep.arguments import check_of
from purestep.errors import PurestepError
from purestep.loop.cadence import Until
from purestep.loop.until_text import until
from purestep.optim.base import GradientTransformation
from purestep.optim.schedules.base import ScheduleBase
from purestep.precision import Policy
from purestep.record.kinds import (
    NAME,
    REQUIRED,
    Kind,
    Maker,
    SettingError,
    group_of,
    joined,
    kind_of,
    makers_of,
    no_maker,
    options_of,
    settings_of,
    unknown,
    wanted,
)
from purestep.sharding.plan import Plan


def encode(value: Any, kind: Kind, path: str) -> Any:
    """Return a value as JSON, from which `decode` makes an equal one.

    Args:
        value: value of an argument.
        kind: the forms of the argument's values.
        path: name of the argument, for errors.

    Raises:
        SettingError: the value has no form in JSON.

    Examples:
        >>> from purestep import optim
        >>> encode(optim.lion(1e-4), kind_of(GradientTransformation), "optimizer")
        {'name': 'lion', 'learning_rate': 0.0001}
    """
    if isinstance(value, Until):
        return str(value)
    if isinstance(value, (GradientTransformation, ScheduleBase)):
        return _encoded_call(value, kind, path)
    if isinstance(value, Plan):
        return _encoded_plan(value, path)
    if isinstance(value, Policy):
        for text in (value.name, str(value)):
            with contextlib.suppress(PurestepError):
                if text and precision.policy(text) == value:
                    return text
        raise SettingError(path, "is a policy that has no name", "one of the names, or its long form")
    if isinstance(value, (torch.dtype, torch.device)):
        return str(value).removeprefix("torch.")
    if isinstance(value, enum.Enum):
        return value.name
    if isinstance(value, Path):
        return str(value)
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        own = {s.name: encode(getattr(value, s.name), s.kind, f"{path}.{s.name}") for s in settings_of(type(value))}
        return {NAME: type(value).__name__, **own} if type(value).__name__ in kind.makers else own
    if isinstance(value, Mapping):
        return {str(key): encode(item, kind, f"{path}.{key}") for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [encode(item, kind, f"{path}[{index}]") for index, item in enumerate(value)]
    return value


def _encoded_plan(value: Plan, path: str) -> dict[str, Any]:
    sizes = dict(zip(value.mesh.axes, value.mesh.sizes, strict=True))
    for name, arguments in (
        ("ddp", {"size": sizes.get("data")}),
        ("fsdp", {"size": sizes.get("fsdp")}),
        ("hsdp", {"fsdp": sizes.get("fsdp"), "data": sizes.get("data")}),
        ("zero1", {"size": sizes.get("data")}),
        ("zero2", {"size": sizes.get("data")}),
    ):
        given = arguments if value.offload is None else {**arguments, "offload": value.offload}
        if None not in arguments.values() and makers_of(Plan)[name](**given) == value:
            return {NAME: name, **{key: found for key, found in given.items() if found != -1}}
    raise SettingError(path, "is a plan that has no name", "its name as a string, from which the experiment makes it")


def _encoded_call(value: Any, kind: Kind, path: str) -> Any:
    """Return an optimizer or a schedule as JSON of the call that its `repr` shows."""
    kind = kind if kind.makers else kind_of(GradientTransformation | ScheduleBase)
    try:
        tree_ = ast.parse(repr(value), mode="eval").body
    except SyntaxError:
        tree_ = ast.Constant(None)
    for guess in (lambda: _by_label(tree_, kind), lambda: _plain(tree_, kind, path, repr(value))):
        with contextlib.suppress(PurestepError, TypeError):
            found = guess()
            if found is not None and decode(found, kind, path) == value:
                return found
    instead = "its name and arguments, or a function of the experiment that makes it from numbers"
    raise SettingError(path, "is no call of the functions of ps.optim, and no text stands for it", instead)


def _by_label(printed: ast.expr, kind: Kind) -> dict[str, Any] | None:
    """Return an optimizer that is a composition, such as `adamw`, as a call of the function that composed it.

    The arguments are guessed by name from the parts; the caller decodes the result and compares the values.
    """
    calls = [node for node in ast.walk(printed) if isinstance(node, ast.Call)]
    values = {k.arg: k.value.value for c in reversed(calls) for k in c.keywords if isinstance(k.value, ast.Constant)}
    own = {k.arg: k.value for k in printed.keywords} if isinstance(printed, ast.Call) else {}
    named = own.get(NAME)
    label = str(named.value) if isinstance(named, ast.Constant) else ast.unparse(calls[0].func) if calls else ""
    if label not in kind.makers:
        return None
    defaults = {setting.name: setting.default for setting in settings_of(kind.makers[label])}
    return {NAME: label} | {
        name: values[name] for name in defaults if name in values and values[name] != defaults[name]
    }


def call_of(text: str, kind: Kind, path: str) -> Any:
    """Return the text of a call, or of a function's name, as JSON; a number or None is returned as such.

    Raises:
        SettingError: the text is neither, or the function does not make such a value.

    Examples:
        >>> call_of("adamw(3e-3)", kind_of(GradientTransformation), "optimizer")
        {'name': 'adamw', 'learning_rate': 0.003}
    """
    try:
        found = ast.parse(text.strip(), mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError):
        raise no_maker(text, kind, path) from None
    return _plain(found, kind, path, text)


def _plain(node: ast.expr, kind: Kind, path: str, text: str) -> Any:
    if isinstance(node, ast.Name) and node.id in kind.makers:
        return {NAME: node.id}
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name):
        return _plain_call(node, kind, path, text)
    if isinstance(node, (ast.List, ast.Tuple)):
        return [_plain(item, _inside(kind), path, text) for item in node.elts]
    if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "torch":
        return node.attr
    if isinstance(node, ast.Name) and node.id in ("inf", "nan"):
        return float(node.id)
    try:
        return ast.literal_eval(node)
    except ValueError:
        raise no_maker(ast.unparse(node), kind, path) from None


def _plain_call(node: ast.Call, kind: Kind, path: str, text: str) -> Any:
    name = node.func.id  # type: ignore[attr-defined]
    maker = kind.makers.get(name)
    if maker is None:
        raise no_maker(name, kind, path)
    kinds = {setting.name: setting.kind for setting in settings_of(maker)}
    places = list(inspect.signature(maker).parameters.values())
    found: dict[str, Any] = {NAME: name}
    rest = next((p.name for p in places if p.kind is p.VAR_POSITIONAL), None)
    named = [p.name for p in places if p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD)]
    for index, argument in enumerate(node.args):
        key = named[index] if index < len(named) else rest
        if key is None:
            raise SettingError(path, f"gives {name} more arguments than it takes: {text}")
        below = _plain(argument, _inside(kinds[key]) if key == rest else kinds[key], f"{path}.{key}", text)
        if key == rest:
            found.setdefault(key, []).append(below)
        else:
            found[key] = below
    for keyword in node.keywords:
        if keyword.arg not in kinds:
            raise unknown(path, str(keyword.arg), kinds)
        key = f"{NAME}_" if keyword.arg == NAME else str(keyword.arg)
        found[key] = _plain(keyword.value, kinds[str(keyword.arg)], f"{path}.{keyword.arg}", text)
    return found


def _inside(kind: Kind) -> Kind:
    """Return the kind of the items of a sequence, with the makers of all nested items."""
    makers = dict(kind.makers)
    for option in options_of(kind.hint):
        for inner in typing.get_args(option):
            if inner is not Ellipsis:
                makers |= kind_of(inner).makers
                makers |= _inside(kind_of(inner)).makers
    return dataclasses.replace(kind, makers=makers)


# --- and back ---------------------------------------------------------------------------------------------------------


def decode(plain: Any, kind: Kind, path: str) -> Any:
    """Return the value of its JSON form.

    Raises:
        SettingError: the JSON is no form of this kind.

    Examples:
        >>> decode({"name": "lion", "learning_rate": 0.0001}, kind_of(GradientTransformation), "optimizer").name
        'lion'
        >>> decode("5 epochs", kind_of(Until), "until")
        UntilEpochs(n=5)
    """
    if plain is None and kind.optional:
        return None
    if kind.makers and isinstance(plain, str):
        plain = call_of(plain, kind, path)
    if kind.makers and isinstance(plain, Mapping):
        return _decoded_call(plain, kind, path)
    if kind.group is not None:
        if not isinstance(plain, Mapping):
            name = settings_of(kind.group)[0].name
            raise SettingError(path, f"is a group of settings, not {plain!r}", nearest=joined(path, name))
        return called(kind.group, plain, path)
    if kind.text is not None and isinstance(plain, (str, int, float)) and not isinstance(plain, bool):
        try:
            return kind.text(str(plain))
        except (PurestepError, KeyError, ValueError) as error:
            if kind.plain is None:
                raise SettingError(path, f"must be {kind.wanted}, not {str(plain)!r}") from error
    if kind.plain is not None or not kind.known:
        return _decoded_plain(plain, kind, path)
    raise SettingError(path, f"must be {wanted(kind)}, not {plain!r}")


def _decoded_call(plain: Mapping[str, Any], kind: Kind, path: str) -> Any:
    name = plain.get(NAME)
    maker = kind.makers.get(name) if isinstance(name, str) else None
    if maker is None:
        raise no_maker(str(name), kind, path)
    arguments = {NAME if key == f"{NAME}_" else key: value for key, value in plain.items() if key != NAME}
    return called(maker, arguments, path)


def called(maker: Maker, plain: Mapping[str, Any], path: str) -> Any:
    """Call a function or class with arguments in JSON.

    Raises:
        SettingError: an argument is unknown, missing or refused.
    """
    known = {setting.name: setting for setting in settings_of(maker)}
    for name in plain:
        if name not in known:
            raise unknown(path, name, known)
    for name, setting in known.items():
        if setting.default is REQUIRED and name not in plain:
            raise SettingError(joined(path, name), "has no default and is not given")
    values = {name: decode(value, known[name].kind, joined(path, name)) for name, value in plain.items()}
    rest = [p.name for p in inspect.signature(maker).parameters.values() if p.kind is p.VAR_POSITIONAL]
    positional = [item for name in rest for item in values.pop(name, ())]
    try:
        return maker(*positional, **values)
    except (PurestepError, TypeError, ValueError) as error:
        if isinstance(error, SettingError):
            raise
        first, *more = str(error).splitlines() or [type(error).__name__]
        where = next((f" ({line.partition('where:')[2].strip()})" for line in more if "where:" in line), "")
        raise SettingError(path or "settings", f"cannot be made: {first}{where}") from error


def free_names(maker: Maker) -> list[str]:
    """Return the settings of a run's end and plan, which are not part of its identity."""
    found = settings_of(maker)
    return [s.name for s in found if s.kind.text is until or (s.kind.makers and "fsdp" in s.kind.makers)]


def arguments_of(maker: Maker, plain: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a function that makes an experiment, from the settings of a run.

    Raises:
        SettingError: an argument is unknown, missing or refused.
    """
    group = group_of(maker)
    if group is not None:
        (name,) = inspect.signature(maker).parameters
        return {name: called(group, plain, "")}
    known = {setting.name: setting for setting in settings_of(maker)}
    takes_any = any(p.kind is p.VAR_KEYWORD for p in inspect.signature(maker).parameters.values())
    for name in plain:
        if name not in known and not takes_any:
            raise unknown("", name, known)
    return {name: decode(value, known[name].kind, name) if name in known else value for name, value in plain.items()}


def plain_of(maker: Maker, arguments: Mapping[str, Any]) -> dict[str, Any]:
    """Return the arguments of a function that makes an experiment as settings of a run.

    Raises:
        SettingError: an argument has no form in JSON.
    """
    group = group_of(maker)
    if group is not None:
        (value,) = arguments.values()
        arguments = {setting.name: getattr(value, setting.name) for setting in settings_of(group)}
    kinds = {setting.name: setting.kind for setting in settings_of(maker)}
    return {name: encode(value, kinds.get(name, kind_of(Any)), name) for name, value in arguments.items()}


def _decoded_plain(plain: Any, kind: Kind, path: str) -> Any:
    if kind.plain is None:
        return plain
    for option in options_of(kind.plain):
        found = _converted(plain, option, path)
        if found is not _NONE and check_of(option)(found) is None:
            return found
    raise SettingError(path, f"must be {wanted(kind)}, not {plain!r}")


_NONE = object()


def _converted(plain: Any, option: Any, path: str) -> Any:
    """Convert JSON to one alternative of an annotation, element by element; `_NONE` if it does not fit."""
    origin, inner = typing.get_origin(option) or option, typing.get_args(option)
    if origin in (list, tuple, collections.abc.Sequence):
        if not isinstance(plain, (list, tuple)):
            return _NONE
        kinds = [kind_of(kind) for kind in inner if kind is not Ellipsis] or [kind_of(Any)]
        kinds = kinds if origin is tuple and Ellipsis not in inner and len(kinds) > 1 else kinds[:1] * len(plain)
        if len(kinds) != len(plain):
            return _NONE
        items = [decode(item, kind, f"{path}[{i}]") for i, (item, kind) in enumerate(zip(plain, kinds, strict=True))]
        return items if origin is list else tuple(items)
    if origin in (dict, Mapping):
        if isinstance(plain, list) and all(isinstance(item, list) and len(item) == 2 for item in plain):
            plain = dict(plain)
        if not isinstance(plain, Mapping):
            return _NONE
        key_kind, kind = (kind_of(each) for each in (inner if len(inner) == 2 else (Any, Any)))
        return {_key(key, key_kind): decode(item, kind, f"{path}.{key}") for key, item in plain.items()}
    if option is float and isinstance(plain, int) and not isinstance(plain, bool):
        return float(plain)
    return plain


def _key(key: Any, kind: Kind) -> Any:
    """Convert a key, which is text in JSON, to the type of its annotation."""
    if kind.plain in (int, float) and isinstance(key, str):
        with contextlib.suppress(ValueError):
            return kind.plain(key)
    return key
