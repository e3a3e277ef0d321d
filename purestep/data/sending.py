"""Pickling of loaders for worker processes: by reference if workers can import all definitions, else by value.

Owns the choice between the two, the pickler by value, and the error that names an object that cannot be sent. A worker
is a new process. It imports the definitions of a file. Definitions of a notebook cell, lambdas and nested functions are
pickled themselves (cloudpickle). `workers` sends the result; the batches that come back hold the classes of the main
process, not copies of them.
"""

from __future__ import annotations

import collections
import dataclasses
import functools
import hashlib
import io
import itertools
import pickle
import sys
import types
import weakref
from collections.abc import Callable, Iterator, Mapping
from multiprocessing.reduction import ForkingPickler
from typing import Any

import cloudpickle
import numpy as np
from torch import Tensor

from purestep import _cells, tree
from purestep.closures import free_variables, named_globals
from purestep.data.loading import Loader
from purestep.errors import DataError, explain

_FIELDS = ("dataset", "transform", "collate")  # the fields of a loader that hold the user's objects
_DEEPEST = 32  # levels of an object that are searched for a part that cannot be sent
_SMALL = 1 << 20  # bytes up to which arrays are compared by content; larger ones are compared by identity
_FAILURES = (pickle.PicklingError, AttributeError, TypeError, ValueError, RecursionError)
_PLAIN = (bool, int, float, complex, str, bytes, type(None), Tensor, np.ndarray)


def by_value(loader: Loader) -> bool:
    """Tell whether a loader holds definitions that workers cannot import, so that it is sent by value.

    Raises:
        DataError: an object in the loader can be sent in neither way.
    """
    check = _References()
    try:
        for field in _FIELDS:
            check.dump(getattr(loader, field))
    except RuntimeError as error:
        if isinstance(error, RecursionError):
            raise _refused(loader) from error
        # A RuntimeError comes from locks, queues and shared values, which can be pickled only while a process starts.
    except _FAILURES:
        fingerprint(loader)
        return True
    return check.in_session and _session() is not None


def fingerprint(loader: Loader) -> str | None:
    """Return a digest of a loader pickled by value; None if it can be pickled only while a process starts.

    The digest changes when a cell redefines a function that the loader uses: workers must not go on with the old
    definition.

    Raises:
        DataError: an object in the loader cannot be sent.
    """
    content = io.BytesIO()
    check = _Values(content, arrays=False)
    try:
        check.dump(tuple(getattr(loader, field) for field in _FIELDS))
    except _FAILURES as error:
        raise _refused(loader) from error
    except RuntimeError:
        return None
    return hashlib.sha256(content.getvalue()).hexdigest()


# --- by reference -----------------------------------------------------------------------------------------------------


class _References(ForkingPickler):
    """Pickles all but the arrays: fails on an object that cannot be imported, and notes definitions of `__main__`."""

    def __init__(self) -> None:
        super().__init__(io.BytesIO())
        self.in_session = False

    def persistent_id(self, value: object) -> str | None:
        # Arrays always pickle; leaving them out makes the check cost nothing however large the data set is.
        if isinstance(value, (Tensor, np.ndarray)):
            return "array"
        if isinstance(value, (type, types.FunctionType)) and value.__module__ == "__main__":
            self.in_session = True
        return None


def _session() -> types.ModuleType | None:
    """Return the main module of a notebook or an interactive session; None if a file defines the main module."""
    main = sys.modules.get("__main__")
    shell = _cells.shell()
    if main is None or (hasattr(main, "__file__") and (shell is None or shell.user_module is not main)):
        return None
    return main


# --- by value ---------------------------------------------------------------------------------------------------------


class _Values(cloudpickle.Pickler):
    """Pickles definitions by value, and tensors and locks as multiprocessing does.

    Attributes:
        classes: the classes pickled so far by value, by number.
    """

    def __init__(self, file: io.BytesIO, *, arrays: bool = True) -> None:
        # pickle reads the table once, in its constructor.
        self.dispatch_table = collections.ChainMap(
            cloudpickle.Pickler.dispatch_table, ForkingPickler(io.BytesIO()).dispatch_table
        )
        super().__init__(file)
        self._arrays = arrays
        self.classes: dict[int, type] = {}

    def persistent_id(self, value: object) -> object:
        return None if self._arrays or not isinstance(value, (Tensor, np.ndarray)) else _array(value)

    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, io.TextIOWrapper):
            # cloudpickle would send a copy of its content.
            raise TypeError(f"cannot pickle {type(value).__name__!r} instances: a file that is open")
        reduced = super().reducer_override(value)
        if isinstance(value, type) and reduced is not NotImplemented:
            self.classes[_number(value)] = value
        return reduced


def _array(value: Tensor | np.ndarray) -> object:
    """Return a key of an array: the digest of a small one, the identity of a large one."""
    if value.nbytes <= _SMALL:
        try:
            return tree.digest(value)
        except Exception:  # a tensor without storage, or an array of objects
            pass
    return id(value), tuple(value.shape)


def packed(loader: Loader) -> bytes:
    """Return the pickle of a loader and of a dict of the classes that it pickled by value, with their numbers."""
    content = io.BytesIO()
    pickler = _Values(content)
    # The loader is pickled first, which fills the dict of classes.
    pickler.dump((loader, pickler.classes))
    return content.getvalue()


def unpacked(content: bytes) -> Loader:
    """Return the loader, in a worker, and note the numbers of its classes for the way back."""
    loader, classes = pickle.loads(content)
    _arrived.update({cls: number for number, cls in classes.items()})
    return loader


# --- the way back -----------------------------------------------------------------------------------------------------

_numbers: weakref.WeakKeyDictionary[type, int] = weakref.WeakKeyDictionary()  # in the main process
_sent: weakref.WeakValueDictionary[int, type] = weakref.WeakValueDictionary()
_count = itertools.count()
_arrived: weakref.WeakKeyDictionary[type, int] = weakref.WeakKeyDictionary()  # in a worker


def _number(cls: type) -> int:
    if cls not in _numbers:
        _numbers[cls] = number = next(_count)
        _sent[number] = cls
    return _numbers[cls]


def _class(number: int) -> type:
    return _sent[number]


class Returned:
    """A batch on its way from a worker to the main process: classes that were sent by value are sent back by number."""

    def __init__(self, value: object) -> None:
        self.value = value

    def __reduce__(self) -> tuple[Callable[[bytes], Any], tuple[bytes]]:
        content = io.BytesIO()
        _Backwards(content).dump(self.value)
        return pickle.loads, (content.getvalue(),)


class _Backwards(_Values):
    def reducer_override(self, value: Any) -> Any:
        if isinstance(value, type) and value in _arrived:
            return _class, (_arrived[value],)
        return super().reducer_override(value)


def is_plain(batch: object) -> bool:
    """Tell whether a batch consists of tensors, numbers and builtin containers, which every process can unpickle."""
    if type(batch) in (tuple, list):
        return all(is_plain(item) for item in batch)  # type: ignore[attr-defined]
    if type(batch) is dict:
        return all(is_plain(item) for pair in batch.items() for item in pair)
    return type(batch) in _PLAIN


# --- the error for objects that cannot be sent ------------------------------------------------------------------------


def _refused(loader: Loader) -> DataError:
    """Name the part of a loader that cannot be pickled, down to the attribute that holds it."""
    for field in _FIELDS:
        error = _failure(getattr(loader, field))
        if error is not None:
            path, value, error = _innermost_failure(field, getattr(loader, field), error)
            named = value if hasattr(value, "__qualname__") else type(value)
            return DataError(
                explain(
                    f"the {field} of a loader cannot be sent to worker processes",
                    where=f"{path}: {named.__module__}.{named.__qualname__}",
                    why=f"{type(error).__name__}: {error}",
                    instead="open files and connections in __getitem__, not before; or num_workers=0",
                )
            )
    return DataError(explain("a loader cannot be sent to worker processes", instead="num_workers=0"))


def _failure(value: object) -> Exception | None:
    try:
        _Values(io.BytesIO(), arrays=False).dump(value)
    except _FAILURES as error:
        return error
    except RuntimeError:  # a lock or a queue, which can be pickled only while a process starts
        return None
    return None


def _innermost_failure(path: str, value: object, error: Exception) -> tuple[str, object, Exception]:
    """Find the innermost part of a value that cannot be pickled: descend into the first part that fails, repeatedly."""
    seen = {id(value)}
    for _ in range(_DEEPEST):
        for suffix, part in _parts(value):
            inner = None if id(part) in seen else _failure(part)
            if inner is not None:
                path, value, error = path + suffix, part, inner
                seen.add(id(part))
                break
        else:
            break
    return path, value, error


def _parts(value: Any) -> Iterator[tuple[str, Any]]:
    """Yield the objects that the pickle of a value holds, each with the suffix of its path."""
    if isinstance(value, Mapping):
        yield from ((f"[{key!r}]", item) for key, item in value.items())
    elif isinstance(value, (list, tuple, set, frozenset, collections.deque)):
        yield from ((f"[{index}]", item) for index, item in enumerate(value))
    elif isinstance(value, functools.partial):
        yield from ((f".{name}", getattr(value, name)) for name in ("func", "args", "keywords"))
    elif isinstance(value, types.MethodType):
        yield from ((".__self__", value.__self__), (".__func__", value.__func__))
    elif isinstance(value, types.FunctionType):
        yield from _used_by(value)
    elif isinstance(value, type):
        yield from ((f".{name}", part) for name, part in vars(value).items() if not name.startswith("__"))
        yield from ((f".{name}", part) for name, part in vars(value).items() if isinstance(part, types.FunctionType))
    else:
        yield from _state(value)
        yield f" (class {type(value).__qualname__})", type(value)


def _used_by(function: types.FunctionType) -> Iterator[tuple[str, Any]]:
    yield from ((f" (its variable {name!r})", part) for name, part in free_variables(function).items())
    yield from ((f" (the global {name!r} that it uses)", part) for name, part in named_globals(function).items())
    yield from ((f" (default {index})", part) for index, part in enumerate(function.__defaults__ or ()))
    yield from ((f" (default of {name})", part) for name, part in (function.__kwdefaults__ or {}).items())


def _state(value: Any) -> Iterator[tuple[str, Any]]:
    try:
        state = value.__getstate__()
    except Exception:  # the object itself refuses, so it is the innermost part
        return
    for part in state if isinstance(state, tuple) else (state,):
        if isinstance(part, dict):
            yield from ((f".{name}", item) for name, item in part.items())


@dataclasses.dataclass(frozen=True)
class Sent:
    """How a loader was sent to a pool of workers, to tell whether its definitions have changed since.

    Attributes:
        by_value: whether the loader was sent by value.
        fingerprint: digest of the loader sent by value; None by reference.
    """

    by_value: bool
    fingerprint: str | None

    @classmethod
    def of(cls, loader: Loader) -> Sent:
        """Return how a loader is sent now.

        Raises:
            DataError: the loader cannot be sent.
        """
        values = by_value(loader)
        return cls(values, fingerprint(loader) if values else None)

    def is_current(self, loader: Loader) -> bool:
        """Tell whether the workers still have the definitions of the main process."""
        return not self.by_value or self.fingerprint == fingerprint(loader)
