"""Typed reading of JSON from a file: a value of the right type, or `CorruptSnapshot`, for any content.

A valid seal proves that a file was written with a seal, not that it is the right file, nor of this version. So every
field is read as the type that it must have. Fields that this version does not know are skipped. No torch is needed.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from purestep.errors import CorruptSnapshot, explain

JSON = Any  # None, bool, int, float, str, list or dict of JSON
LARGEST = 1 << 62  # more than any number of elements, bytes, ranks or steps
_WORDS = {"nan": math.nan, "inf": math.inf, "-inf": -math.inf}
_MISSING = object()


def parse(text: bytes, file: str) -> Field:
    """Return the value of JSON text.

    Raises:
        CorruptSnapshot: it is no JSON, or nested too deeply to be read.
    """
    try:
        return Field(json.loads(text), file)
    except (ValueError, RecursionError) as error:  # ValueError: no JSON, no UTF-8, or a number of too many digits
        why = f"{type(error).__name__}: {str(error)[:200]}"
        raise CorruptSnapshot(explain("a file of the snapshot does not make sense", where=file, why=why)) from error


@dataclass(frozen=True)
class Field:
    """A value of a file and its path in it: each method returns it as one type.

    Raises:
        CorruptSnapshot: the value is of another type; the message names the file and the field.

    Examples:
        >>> Field({"step": [3]}, "meta/data.json")["step"].natural()
        Traceback (most recent call last):
        purestep.errors.CorruptSnapshot: a file of the snapshot does not make sense
          where:   meta/data.json: step
          why:     expected a whole number from 0 up, found a list
    """

    value: JSON
    file: str
    path: str = ""

    def wrong(self, expected: str) -> CorruptSnapshot:
        """Return the error of a value that is not what is expected."""
        what, where = "a file of the snapshot does not make sense", f"{self.file}: {self.path or 'all of it'}"
        return CorruptSnapshot(explain(what, where=where, why=f"expected {expected}, found {_describe(self.value)}"))

    def __getitem__(self, name: str) -> Field:
        value = self.get(name)
        if value is None:
            raise self.wrong(f"a record with the field {name!r}")
        return value

    def get(self, name: str) -> Field | None:
        """Return a field of a record, None when it has none of that name."""
        value = self.record().get(name, _MISSING)
        return None if value is _MISSING else self._below(value, name)

    def record(self) -> dict[str, JSON]:
        if type(self.value) is not dict:
            raise self.wrong("a record")
        return self.value

    def entries(self) -> dict[str, Field]:
        return {name: self._below(value, name) for name, value in self.record().items()}

    def items(self) -> list[Field]:
        if type(self.value) is not list:
            raise self.wrong("a list")
        return [Field(value, self.file, f"{self.path}[{i}]") for i, value in enumerate(self.value)]

    def _below(self, value: JSON, name: str) -> Field:
        return Field(value, self.file, f"{self.path}.{name[:80]}" if self.path else name[:80])

    def text(self, pattern: re.Pattern[str] | None = None) -> str:
        if type(self.value) is not str or (pattern is not None and not pattern.fullmatch(self.value)):
            raise self.wrong("a text" if pattern is None else f"a text of the form {pattern.pattern}")
        return self.value

    def natural(self, below: int = LARGEST) -> int:
        if type(self.value) is not int or not 0 <= self.value < below:
            raise self.wrong("a whole number from 0 up" + (f" and below {below}" if below < LARGEST else ""))
        return self.value

    def naturals(self) -> tuple[int, ...]:
        return tuple(item.natural() for item in self.items())

    def number(self) -> float:
        if type(self.value) is str and self.value in _WORDS:
            return _WORDS[self.value]
        if type(self.value) is float or (type(self.value) is int and abs(self.value) < LARGEST):
            return float(self.value)
        raise self.wrong("a number")


def _describe(value: JSON) -> str:
    if value is None or isinstance(value, (bool, float)):
        return repr(value)
    if isinstance(value, int):
        return str(value) if abs(value) < LARGEST else f"an integer of {value.bit_length()} bits"
    return repr(value[:60]) if isinstance(value, str) else f"a {'record' if isinstance(value, dict) else 'list'}"


def texts(entry: Field | None, pattern: re.Pattern[str] | None = None) -> Mapping[str, str]:
    """Return a record of texts; an empty one where there is none."""
    return {} if entry is None else {name: value.text(pattern) for name, value in entry.entries().items()}
