"""Descriptions of values as plain JSON: equal for equal values in any process, without addresses.

Owns `stable`, which describes what a run is made of: settings, functions, transformations, callbacks, data sources. It
never raises, calls no `repr` of other people's classes, and visits a bounded number of values. `identity` calls it.
"""

from __future__ import annotations

import dataclasses
import datetime
import decimal
import dis
import enum
import fractions
import functools
import hashlib
import inspect
import json
import linecache
import math
import pathlib
import re
import textwrap
import types
import uuid
from collections.abc import Callable, Mapping
from typing import Any, Protocol

import numpy as np
import torch
from torch import Tensor, nn

from purestep import _torch, tree
from purestep.closures import free_variables, named_globals, nested_code
from purestep.snapshot.codec import JSON
from purestep.tree import stable_name

_DEPTH = 10  # levels of values
_NODES = 4000  # values in all
_ITEMS = 64  # of one sequence or mapping
_PLAIN_ITEMS = 4096  # of a sequence of plain values, which is condensed
_TEXT = 200  # characters
_BYTES = 1 << 16  # of a tensor whose content is digested
_SHOWN = 8  # elements of a tensor that is written out
_BITS = 256  # of an integer
_VERSIONED = ("torch", "numpy", "purestep", "builtins")  # their version says what the source of a function would
# How batches are fetched, which changes none of them.
_HARMLESS = {"num_workers", "prefetch", "prefetch_factor", "persistent_workers", "pin_memory"}
_CONSTANTS = (bool, int, float, complex, str, type(None), torch.dtype)
_BY_REPR = (
    *(complex, range, slice, decimal.Decimal, fractions.Fraction, datetime.date, datetime.time, datetime.timedelta),
    *(re.Pattern, uuid.UUID, torch.dtype, torch.device, torch.layout, torch.memory_format, type(...)),
)


class Identified(Protocol):
    """What says itself what it is. A data source, callback or transformation of your own may."""

    def identity(self) -> Any:
        """Return what tells it from others of its class: a mapping of settings, another value that stands for it, or
        None where a run is the same with and without it."""


def stable(value: object) -> JSON:
    """Describe a value as plain JSON.

    | value | description |
    |---|---|
    | numbers, strings, lists, mappings, sets | themselves; long ones by length and digest |
    | tensors, arrays | dtype and shape, and the content of small ones on the CPU: values, or a digest |
    | what has a method `identity()` | its class, and what that returns |
    | dataclasses | their class, and their fields without those of `compare=False` |
    | functions | their qualified name, a digest of their source, and the constants that they read from outside |
    | other objects | their class, their `__call__`, and constructor arguments that they keep under the same name |

    Examples:
        >>> stable({"lr": 0.1, "betas": (0.9, 0.999), "weight": torch.ones(2)})
        {'lr': 0.1, 'betas': [0.9, 0.999], 'weight': {'tensor': 'float32[2]', 'values': [1.0, 1.0]}}
        >>> stable(object())
        {'class': 'builtins.object'}
    """
    return _Describer().of(value, 0)


class _Describer:
    """One description: counts what it visits, and describes each function once."""

    def __init__(self) -> None:
        self._left = _NODES
        self._functions: dict[types.FunctionType, JSON] = {}

    def of(self, value: object, depth: int) -> JSON:
        self._left -= 1
        if depth > _DEPTH or self._left < 0:
            return {"class": stable_name(type(value))}
        try:
            return self._described(value, depth)
        except Exception:
            # Attributes of other people's objects may do anything. A name is less, and never wrong.
            return {"class": stable_name(type(value))}

    def _described(self, value: Any, depth: int) -> JSON:
        if value is None or type(value) in (bool, int, float, str):
            return _scalar(value)
        if isinstance(value, type):
            return stable_name(value)
        if callable(getattr(type(value), "identity", None)):
            return self._identified(value, depth)
        for kinds, describe in _KINDS:
            if isinstance(value, kinds):
                return describe(self, value, depth)
        if hasattr(type(value), "__dataclass_fields__"):
            return self._object(value, _dataclass_fields(value) | _code(value, "__call__"), depth)
        if callable(value) and hasattr(value, "__wrapped__"):
            return self._object(value, {"wraps": value.__wrapped__}, depth)
        return self._object(value, _constructor_arguments(value) | _code(value, "__call__"), depth)

    def _identified(self, value: Identified, depth: int) -> JSON:
        said = value.identity()
        return self._object(value, said, depth) if isinstance(said, Mapping) else self.of(said, depth + 1)

    def _object(self, value: object, fields: Mapping[str, Any], depth: int) -> JSON:
        shown = {str(name): self.of(field, depth + 1) for name, field in fields.items() if name not in _HARMLESS}
        return {"class": stable_name(type(value)), **shown}

    def mapping(self, value: Mapping[Any, Any], depth: int) -> JSON:
        if len(value) > _ITEMS:
            return {"class": stable_name(type(value)), "length": len(value)}
        keys = [(key, key if isinstance(key, str) else _line(self.of(key, depth))) for key in value]
        return {name: self.of(value[key], depth + 1) for key, name in keys}

    def sequence(self, value: Any, depth: int) -> JSON:
        if hasattr(value, "_fields"):
            return self._object(value, dict(zip(value._fields, value, strict=True)), depth)
        if len(value) <= _ITEMS:
            return [self.of(item, depth + 1) for item in value]
        about = {"class": stable_name(type(value)), "length": len(value)}
        plain = len(value) <= _PLAIN_ITEMS and all(type(item) in _CONSTANTS for item in value)
        return {**about, "digest": _digest(repr(value))} if plain else about

    def unordered(self, value: Any, depth: int) -> JSON:
        if len(value) > _ITEMS:
            return {"class": stable_name(type(value)), "length": len(value)}
        return sorted((self.of(item, depth + 1) for item in value), key=_line)

    def partial(self, value: Any, depth: int) -> JSON:
        fields = {"function": value.func, "arguments": value.args, "keywords": value.keywords}
        return self._object(value, fields, depth)

    def method(self, value: Any, depth: int) -> JSON:
        return self._object(value, {"function": value.__func__, "of": value.__self__}, depth)

    def function(self, value: Any, depth: int) -> JSON:
        if value not in self._functions:
            self._functions[value] = {"function": stable_name(value)}  # for those that lead back to it
            self._functions[value] = self._function(value, depth)
        return self._functions[value]

    def _function(self, value: Any, depth: int) -> JSON:
        name = {"function": stable_name(value)}
        if _is_versioned(value):
            return name
        wrapped = getattr(value, "__wrapped__", None)
        around = {} if wrapped is None else {"wraps": self.of(wrapped, depth + 1)}
        reads = {key: self.of(content, depth + 1) for key, content in sorted(_reads(value).items())}
        return {**name, "source": source_digest(value), **around, **({"reads": reads} if reads else {})}


# --- leaves ---------------------------------------------------------------------------------------------------------


def _scalar(value: object) -> JSON:
    if type(value) is float and not math.isfinite(value):
        return repr(value)  # NaN and infinity are no JSON
    if type(value) is int and value.bit_length() > _BITS:
        return {"class": "builtins.int", "bits": value.bit_length(), "digest": _digest(hex(value))}
    if type(value) is str and len(value) > _TEXT:
        return {"class": "builtins.str", "length": len(value), "digest": _digest(value)}
    return value


def _tensor(describer: _Describer, value: Any, depth: int) -> JSON:
    about = {"tensor": tree.describe(value)}
    if isinstance(value, Tensor):
        near = type(value) in (Tensor, nn.Parameter) and value.device.type == "cpu" and value.layout == torch.strided
        count, nbytes = value.numel(), value.numel() * value.element_size()
    else:
        near, count, nbytes = value.dtype.kind in "biufc", value.size, value.nbytes
    if not near or nbytes > _BYTES:  # nothing is read from a device, and little from a disk
        return about
    if count <= _SHOWN:
        return {**about, "values": describer.of(value.tolist(), depth + 1)}
    return {**about, "digest": tree.digest(value)[:16]}


def _content(describer: _Describer, value: Any, depth: int) -> JSON:
    return {"class": stable_name(type(value)), "length": len(value), "digest": _digest(bytes(value))}


def _module(describer: _Describer, value: nn.Module, depth: int) -> JSON:
    """A loss module is what its arguments make it; a model is told by its parameters, which the state has."""
    if next(value.parameters(), None) is not None:
        return {"class": stable_name(type(value))}
    return describer._object(value, _constructor_arguments(value) | _code(value, "forward"), depth)


_KINDS: tuple[tuple[Any, Callable[[_Describer, Any, int], JSON]], ...] = (
    (enum.Enum, lambda describer, value, depth: f"{stable_name(type(value))}.{value.name}"),
    ((Tensor, np.ndarray), _tensor),
    (np.generic, lambda describer, value, depth: describer.of(value.item(), depth + 1)),
    ((bytes, bytearray), _content),
    (pathlib.PurePath, lambda describer, value, depth: _scalar(str(value))),
    (types.FunctionType, _Describer.function),
    (types.MethodType, _Describer.method),
    ((types.BuiltinFunctionType, types.MethodDescriptorType), lambda d, value, depth: {"function": stable_name(value)}),
    (functools.partial, _Describer.partial),
    ((list, tuple), _Describer.sequence),
    (nn.Module, _module),
    (Mapping, _Describer.mapping),
    ((set, frozenset), _Describer.unordered),
    (_BY_REPR, lambda describer, value, depth: _scalar(repr(value))),
)


def _dataclass_fields(value: Any) -> dict[str, Any]:
    return {
        field.name: getattr(value, field.name) for field in dataclasses.fields(value) if field.init and field.compare
    }


def _code(value: object, name: str) -> dict[str, Any]:
    """Return the method of an object that is what it does, where the script may have edited it."""
    method = getattr(type(value), name, None)
    return {name: method} if isinstance(method, types.FunctionType) and not _is_versioned(method) else {}


def _is_versioned(function: types.FunctionType) -> bool:
    return str(function.__module__).partition(".")[0] in _VERSIONED


def _constructor_arguments(value: object) -> dict[str, Any]:
    """Return the arguments of the constructor that an object keeps as attributes of the same names."""
    init = inspect.unwrap(type(value).__init__)
    if not isinstance(init, types.FunctionType):
        return {}
    code, kept = init.__code__, dict(getattr(value, "__dict__", {}))
    if isinstance(value, nn.Module):
        kept |= _torch.buffers_of(value)
    names = code.co_varnames[1 : code.co_argcount + code.co_kwonlyargcount]
    return {name: kept[name] for name in names if name in kept}


# --- functions ------------------------------------------------------------------------------------------------------


def source_digest(function: types.FunctionType) -> str | None:
    """Return a digest of the source of a function, without comments, blank lines and indentation; None where there is
    no source to be read."""
    try:
        text = _source(function)
    except Exception:
        return None
    lines = (line.rstrip() for line in textwrap.dedent(text).splitlines())
    return _digest("\n".join(line for line in lines if line and not line.lstrip().startswith("#")))


def _source(function: types.FunctionType) -> str:
    """Return the lines of a function, and of a lambda its expression: the statement around it may name other settings.

    The compiler has noted where everything is. `inspect` would look for the end among the tokens, and first for the
    module among all that are loaded, which takes some 40 ms and wakes those that load themselves when they are touched.
    """
    code = function.__code__
    spots: list[Any] = [spot for part in nested_code(code) for spot in part.co_positions() if spot[1] is not None]
    linecache.checkcache(code.co_filename)
    lines = linecache.getlines(code.co_filename, function.__globals__)
    if not lines:
        raise OSError(f"there is no source at {code.co_filename}")
    lines = lines[: max(end for _, end, _, _ in spots)]
    # The first instruction of all is at no column.
    spots = [spot for spot in spots if None not in spot and spot[2:] != (0, 0)]
    if code.co_name != "<lambda>" or not spots:
        return "".join(lines[code.co_firstlineno - 1 :])
    first, start = min((line, column) for line, _, column, _ in spots)
    last, stop = max((line, column) for _, line, _, column in spots)
    cut = [line.encode() for line in lines[first - 1 : last]]
    cut[-1] = cut[-1][:stop]
    cut[0] = cut[0][start:]
    names = code.co_varnames[: code.co_argcount + code.co_kwonlyargcount]
    return f"lambda {', '.join(names)}: {b''.join(cut).decode()}"


def _reads(function: types.FunctionType) -> dict[str, Any]:
    """Return the constants that a function reads from outside of itself, by name.

    They are its defaults, and what it finds in its closure and in its module, unless it assigns them itself. Functions
    in the closure count too, because decorators keep there what they decorate; those of the module do not.
    """
    code = function.__code__
    names, defaults = code.co_varnames[: code.co_argcount], function.__defaults__ or ()
    found = dict(zip(names[len(names) - len(defaults) :], defaults, strict=True)) | (function.__kwdefaults__ or {})
    # Names of attributes are among them.
    outside = named_globals(function) | free_variables(function)
    cells = set(code.co_freevars)
    kept = [name for name, value in outside.items() if _is_constant(value) or (name in cells and _is_function(value))]
    if kept:
        loaded, assigned = _names(code)
        found |= {name: outside[name] for name in kept if name in (loaded | cells) - assigned}
    return {name: value for name, value in found.items() if _is_constant(value) or _is_function(value)}


def _names(code: types.CodeType) -> tuple[set[str], set[str]]:
    """Return the globals that some code reads, and the globals and cells that it assigns."""
    loaded, assigned = set(), set()
    for part in nested_code(code):
        for instruction in dis.get_instructions(part):
            if instruction.opname == "LOAD_GLOBAL":
                loaded.add(instruction.argval)
            elif instruction.opname in ("STORE_GLOBAL", "STORE_DEREF"):
                assigned.add(instruction.argval)
    return loaded, assigned


def _is_function(value: object) -> bool:
    return isinstance(value, types.FunctionType)


def _is_constant(value: object) -> bool:
    if isinstance(value, tuple):
        return type(value) is tuple and len(value) <= _ITEMS and all(type(item) in _CONSTANTS for item in value)
    if isinstance(value, nn.Module):
        return next(value.parameters(), None) is None
    return type(value) in _CONSTANTS


def _digest(content: str | bytes) -> str:
    data = content.encode("utf-8", "surrogatepass") if isinstance(content, str) else content
    return hashlib.sha256(data).hexdigest()[:16]


def _line(value: JSON) -> str:
    return json.dumps(value, sort_keys=True)
