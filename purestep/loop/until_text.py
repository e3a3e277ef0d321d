"""The end of a run from text, as a command line or a file of settings gives it; `str` of an end is read back by it."""

from __future__ import annotations

import re

from purestep.arguments import checked
from purestep.errors import ConfigError, explain
from purestep.loop.cadence import Until, epochs, seconds, steps

_SECONDS = {
    "s": 1,
    "sec": 1,
    "second": 1,
    "m": 60,
    "min": 60,
    "minute": 60,
    "h": 3600,
    "hour": 3600,
    "d": 86400,
    "day": 86400,
}
_TOKEN = re.compile(
    r"\s*(?:(?P<clock>\d+(?::\d+){2,3})|(?P<number>(?:\d[\d_]*\.?\d*(?:e[+-]?\d+)?|\.\d+|inf))\s*(?P<unit>[a-z]+)"
    r"|(?P<word>or\b|and\b|[|&()]))",
    re.IGNORECASE,
)


@checked(ConfigError)
def until(text: str) -> Until:
    """Read the end of a run from text.

    Args:
        text: `5 epochs`, `1000 steps`, or a time of training: `90 seconds`, `2h`, `1h30m`, `1 day 2 hours`, `12:30:00`
            (hours, minutes, seconds), `01:12:30:00` (days before them). Combined with `|` or `or`, `&` or `and`, which
            binds more strongly, and parentheses.

    Returns:
        What `ps.epochs(5)`, `ps.epochs(5) | ps.seconds(60)` and so on return; `until(str(end)) == end` for each.

    Raises:
        ConfigError: the text is none of this; the message says where.

    Examples:
        >>> until("5 epochs | 1000 steps") == epochs(5) | steps(1000)
        True
        >>> print(until("2h30m & 3 epochs"))
        9000 seconds and 3 epochs
    """
    return _Reader(text).read()


class _Reader:
    """One text, read from left to right."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0

    def read(self) -> Until:
        found = self._either()
        if self._text[self._at :].strip():
            raise self._wrong()
        return found

    def _either(self) -> Until:
        found = self._both()
        while self._word("|", "or"):
            found = found | self._both()
        return found

    def _both(self) -> Until:
        found = self._one()
        while self._word("&", "and"):
            found = found & self._one()
        return found

    def _one(self) -> Until:
        if self._word("("):
            found = self._either()
            if not self._word(")"):
                raise self._wrong()
            return found
        match = self._next()
        if match is None or match["word"]:
            raise self._wrong()
        if match["clock"]:
            self._at = match.end()
            parts = [int(part) for part in match["clock"].split(":")]
            return seconds(sum(part * size for part, size in zip(reversed(parts), (1, 60, 3600, 86400), strict=False)))
        unit = _unit(match["unit"])
        if unit in ("epoch", "step"):
            self._at = match.end()
            return (epochs if unit == "epoch" else steps)(_number(match["number"]))  # type: ignore[arg-type]
        return seconds(self._time())

    def _time(self) -> float:
        """Read numbers of seconds, minutes, hours and days as long as they follow each other."""
        total: float = 0
        first = True
        while (match := self._next()) is not None and match["unit"]:
            unit = _unit(match["unit"])
            if unit not in _SECONDS:
                break
            self._at, first = match.end(), False
            total += _number(match["number"]) * _SECONDS[unit]
        if first:
            raise self._wrong()
        return total

    def _word(self, *words: str) -> bool:
        match = self._next()
        if match is None or (match["word"] or "").lower() not in words:
            return False
        self._at = match.end()
        return True

    def _next(self) -> re.Match[str] | None:
        return _TOKEN.match(self._text, self._at)

    def _wrong(self) -> ConfigError:
        place = f"at {self._text[self._at :].strip()!r}" if self._text[self._at :].strip() else "at its end"
        return ConfigError(
            explain(
                "until: this text is no end of a run",
                where=f"text={self._text!r}, {place}",
                why="it is read as numbers of epochs, steps, seconds, minutes, hours or days, with | & and parentheses",
                instead='ps.until("5 epochs | 1000 steps"), ps.until("2h30m"), ps.until("1 epoch & 90 seconds")',
            )
        )


def _unit(word: str) -> str:
    word = word.lower()
    return word if word in _SECONDS else word.removesuffix("s")


def _number(text: str) -> float:
    """An int where it is written as one: counts are exact, and so is what a time prints as."""
    digits = text.replace("_", "")
    return int(digits) if digits.isdigit() else float(digits)
