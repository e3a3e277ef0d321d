"""Settings from flags and YAML: the leaves of an experiment's signature, read by jsonargparse.

`record.settings` defines the forms of each setting and makes the values. This file converts text to JSON of the right
type, adds flags for the arguments of a named function or class, and prints the help.
"""

from __future__ import annotations

import argparse
import collections.abc
import contextlib
import dataclasses
import functools
import typing
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import jsonargparse

from purestep.cli.usage import UsageError
from purestep.errors import PurestepError
from purestep.record.kinds import (
    NAME,
    REQUIRED,
    Kind,
    Maker,
    Setting,
    SettingError,
    near,
    not_a_value,
    settings_of,
    wanted,
)
from purestep.record.settings import call_of, decode, encode

Pairs = Sequence[tuple[str, str | None]]


@dataclasses.dataclass(frozen=True)
class Leaf:
    """A flag: a setting whose value can be given as text.

    Attributes:
        path: dotted name.
        setting: the setting.
        value: present value, as JSON; `REQUIRED` if it must be given.
    """

    path: str
    setting: Setting
    value: Any


class Settings:
    """The settings of an experiment as JSON, changed one by one.

    Args:
        maker: function that makes the experiment.

    Raises:
        UsageError: a default has no form in JSON.
    """

    def __init__(self, maker: Maker) -> None:
        self.maker = maker
        self.known = settings_of(maker)
        self.plain: dict[str, Any] = {}
        for setting in self.known:
            if setting.default is not REQUIRED:
                with _flag_errors():
                    self.plain[setting.name] = encode(setting.default, setting.kind, setting.name)

    def __contains__(self, name: str) -> bool:
        return any(setting.name == name for setting in self.known)

    def read_config(self, path: str) -> None:
        """Take the settings of a YAML file.

        Raises:
            UsageError: the file cannot be read, or holds something else.
        """
        try:
            text = Path(path).read_text()
        except (OSError, UnicodeDecodeError) as error:
            raise UsageError(f"--config {path} cannot be read: {getattr(error, 'strerror', None) or error}") from error
        found = _read_yaml(text, f"--config {path}")
        for name, value in found.items():
            with _flag_errors(f"{path}: "):
                self._assign(name, value)

    def read_flags(self, pairs: Pairs) -> None:
        """Take the settings of a command line; the name of a function is applied before its arguments.

        Raises:
            UsageError: a setting is unknown, or does not take the value.
        """
        order = sorted(pairs, key=lambda pair: pair[0].removesuffix(f".{NAME}").count("."))
        for name, text in order:
            with _flag_errors():
                self._assign_text(name, text)

    def check(self) -> None:
        """Make every value once.

        Raises:
            UsageError: a value is refused or missing.
        """
        for setting in self.known:
            with _flag_errors():
                if setting.name in self.plain:
                    decode(self.plain[setting.name], setting.kind, setting.name)
                elif setting.default is REQUIRED:
                    raise SettingError(setting.name, "has no default and is not given")

    # --- assignments ---

    def _assign_text(self, path: str, text: str | None) -> None:
        if text is None and path.startswith("no_"):
            with contextlib.suppress(SettingError):
                self._find(path)
                raise SettingError(path, "has no value")
            path, text = path[3:], "false"
        parent, setting = self._find(path)
        if text is None:
            if bool not in _members(setting.kind.plain):
                raise SettingError(path, "has no value", nearest=f"{path} {_metavar(setting.kind)}")
            text = "true"
        parent[setting.name] = _read(setting, text, path)

    def _assign(self, path: str, value: Any) -> None:
        parent, setting = self._find(path)
        kind = setting.kind
        if isinstance(value, Mapping) and (kind.group is not None or kind.makers):
            if kind.makers and NAME in value and value[NAME] != _named(parent.get(setting.name)):
                parent[setting.name] = _read(setting, str(value[NAME]), path)
            for name, item in value.items():
                if name != NAME:
                    self._assign(f"{path}.{name}", item)
        elif isinstance(value, str):
            parent[setting.name] = _read(setting, value, path)
        elif kind.makers and isinstance(value, list):
            parent[setting.name] = value
        else:
            decode(value, kind, path)
            parent[setting.name] = value

    def _find(self, path: str) -> tuple[dict[str, Any], Setting]:
        """Return the mapping that holds a setting now, and the setting.

        Raises:
            SettingError: there is no setting of this name.
        """
        *outer, last = path.split(".")
        known, plain = {setting.name: setting for setting in self.known}, self.plain
        for index, name in enumerate(outer):
            so_far = ".".join(outer[: index + 1])
            setting = known.get(name)
            if setting is None:
                raise self._unknown(path)
            known, plain = _inside(setting, plain, so_far)
        if last == NAME and NAME not in known and outer:
            return self._find(".".join(outer))
        if last not in known:
            raise self._unknown(path)
        return plain, known[last]

    def _unknown(self, path: str) -> SettingError:
        names = [leaf.path for leaf in self.leaves()] + [setting.name for setting in self.known]
        found = near(path, names) or next((name for name in names if name.endswith(f".{path}")), "")
        return SettingError(path, "is no setting", nearest=found)

    # --- help ---

    def leaves(self) -> Iterator[Leaf]:
        """Yield the flags that exist with the present choice of functions and classes."""
        yield from _leaves(self.known, self.plain, "")

    def help(self, program: str) -> str:
        """Return the help: flags, types and present values."""
        parser = jsonargparse.ArgumentParser(prog=program, add_help=False, default_env=False, usage=argparse.SUPPRESS)
        for leaf in self.leaves():
            value = leaf.value if leaf.value is not REQUIRED else None
            kind = leaf.setting.kind
            words = [leaf.setting.help.rstrip(".")] if leaf.setting.help else []
            if leaf.value is REQUIRED:
                words.append("(required)")
            words.append(f"({_typed(kind)})")
            parser.add_argument(
                f"--{leaf.path}", metavar=_metavar(kind), help=" ".join(words).replace("%", "%%"), default=value
            )
        text = parser.format_help()
        return text.partition("options:\n")[2] or text

    def as_yaml(self) -> str:
        """Return the settings as YAML with comments, for `read_config`."""
        import yaml

        parts = []
        for setting in self.known:
            if setting.name in self.plain:
                note = f"# {setting.help}\n" if setting.help else ""
                parts.append(note + yaml.safe_dump({setting.name: self.plain[setting.name]}, sort_keys=False))
            else:
                parts.append(f"# {setting.name}: it must be given: {wanted(setting.kind)}\n")
        return "".join(parts)


def _leaves(known: Sequence[Setting], plain: Mapping[str, Any], path: str) -> Iterator[Leaf]:
    for setting in known:
        kind, name = setting.kind, f"{path}.{setting.name}" if path else setting.name
        value = plain.get(setting.name, _shown_default(setting))
        if kind.group is not None:
            yield from _leaves(settings_of(kind.group), value if isinstance(value, dict) else {}, name)
        elif _is_flag(kind):
            yield Leaf(name, setting, _named(value) if isinstance(value, dict) and kind.makers else value)
        if kind.makers and isinstance(value, dict) and _named(value) in kind.makers:
            yield from _leaves(settings_of(kind.makers[_named(value)]), value, name)


def _shown_default(setting: Setting) -> Any:
    if setting.default is REQUIRED:
        return REQUIRED
    with contextlib.suppress(SettingError):
        return encode(setting.default, setting.kind, setting.name)
    return None


def _is_flag(kind: Kind) -> bool:
    return bool(kind.text or kind.makers) or any(_is_simple(member) for member in _members(kind.plain))


def _is_simple(hint: Any) -> bool:
    """Tell whether jsonargparse parses a type by itself: numbers, strings, and lists and mappings of them."""
    inner = [arg for arg in typing.get_args(hint) if arg is not Ellipsis]
    if typing.get_origin(hint) is Literal or hint in (bool, int, float, str, list, dict, tuple):
        return True
    return typing.get_origin(hint) is not None and all(_is_simple(arg) or arg is type(None) for arg in inner)


def _members(plain: Any) -> tuple[Any, ...]:
    if plain is None:
        return ()
    return typing.get_args(plain) if typing.get_origin(plain) is typing.Union else (plain,)


def _inside(setting: Setting, plain: dict[str, Any], path: str) -> tuple[dict[str, Setting], dict[str, Any]]:
    """Return the settings below a setting, and the mapping that holds their values."""
    kind, value = setting.kind, plain.get(setting.name, _shown_default(setting))
    if kind.group is not None:
        below = settings_of(kind.group)
    elif kind.makers and isinstance(value, dict) and _named(value) in kind.makers:
        below = settings_of(kind.makers[_named(value)])
    elif kind.makers:
        usual = near(str(value), list(kind.makers)) or next(iter(kind.makers))
        raise SettingError(path, f"is {value!r}, which has no settings of its own", nearest=f"{path} {usual}")
    else:
        raise SettingError(path, "has no settings of its own", nearest=f"{path} {_metavar(kind)}")
    if not isinstance(value, dict):
        value = {}
    plain[setting.name] = value
    return {each.name: each for each in below}, value


def _named(value: Any) -> str:
    return str(value.get(NAME)) if isinstance(value, dict) else ""


# --- text as JSON -----------------------------------------------------------------------------------------------------


def _read(setting: Setting, text: str, path: str) -> Any:
    """Return text as JSON of the type of a setting.

    Raises:
        SettingError: the text is no value of that type.
    """
    kind = setting.kind
    if kind.optional and text.lower() in ("none", "null"):
        return None
    if kind.makers:
        return _read_call(kind, text, path)
    if kind.group is not None:
        raise SettingError(path, "is a group of settings", nearest=f"{path}.{settings_of(kind.group)[0].name}")
    if kind.text is not None and kind.plain is None:
        try:
            return encode(kind.text(text), kind, path)
        except (PurestepError, KeyError, ValueError) as error:
            raise not_a_value(path, kind, text, _names(kind)) from error
    if not kind.known:
        raise SettingError(path, f"cannot be given as text: its type is {_typed(kind)}")
    return _typed_value(kind, text, path)


def _names(kind: Kind) -> list[str]:
    return kind.wanted.rpartition(": ")[2].removeprefix("one of ").split(", ")


def _read_call(kind: Kind, text: str, path: str) -> Any:
    if kind.plain is not None:
        with contextlib.suppress(SettingError):
            return _typed_value(kind, text, path)
    found = call_of(text, kind, path)
    if not isinstance(found, dict):
        raise not_a_value(path, kind, text)
    return found


def _typed_value(kind: Kind, text: str, path: str) -> Any:
    hints = [member for member in _members(kind.plain) if _is_simple(member)]
    for hint in hints or [str]:
        if hint is str:
            value: Any = text
        else:
            try:
                value = _reader(hint).parse_args([f"--value={_bracketed(hint, text)}"]).value
            except (jsonargparse.ArgumentError, ValueError):
                continue
        value = list(value) if isinstance(value, tuple) else value
        with contextlib.suppress(SettingError):
            decode(value, kind, path)
            return value
    names = [str(name) for hint in hints if typing.get_origin(hint) is Literal for name in typing.get_args(hint)]
    raise not_a_value(path, kind, text, names)


def _bracketed(hint: Any, text: str) -> str:
    """Return a list in YAML syntax; a command line may leave out the brackets: `1,2`."""
    is_list = (typing.get_origin(hint) or hint) in (list, tuple, collections.abc.Sequence)
    return f"[{text}]" if is_list and not text.strip().startswith("[") else text


@functools.cache
def _reader(hint: Any) -> jsonargparse.ArgumentParser:
    reader = jsonargparse.ArgumentParser(exit_on_error=False, default_env=False)
    reader.add_argument("--value", type=hint)
    return reader


def _read_yaml(text: str, source: str) -> dict[str, Any]:
    try:
        found = _reader(dict).parse_args([f"--value={text}"]).value if text.strip() else {}
    except (jsonargparse.ArgumentError, ValueError) as error:
        raise UsageError(f"{source} holds no settings: it is no mapping in YAML", "lines such as lr: 1e-3") from error
    return found if isinstance(found, dict) else {}


@contextlib.contextmanager
def _flag_errors(where: str = "") -> Iterator[None]:
    """Turn a `SettingError` into a `UsageError` that names the flag, in a `with` block."""
    try:
        yield
    except SettingError as error:
        instead = f"--{error.nearest}" if error.nearest else error.instead
        raise UsageError(f"{where}--{error.path} {error.problem}", instead) from error


# --- texts of the help ------------------------------------------------------------------------------------------------


def _typed(kind: Kind) -> str:
    if not kind.known:
        return getattr(kind.hint, "__name__", str(kind.hint))
    return wanted(kind)


def _metavar(kind: Kind) -> str:
    if kind.makers:
        return "NAME" if kind.plain is None else "VALUE|NAME"
    if kind.text is not None:
        return "TEXT"
    (first, *_) = _members(kind.plain)
    return {bool: "BOOL", int: "N", float: "X", str: "TEXT"}.get(first, "VALUE")
