"""Errors of the command line, in one or two lines; exit code 2."""

from __future__ import annotations

import argparse
import sys
from typing import Any, NoReturn

from purestep.errors import nearest_name


class UsageError(Exception):
    """The command line, or a file that it names, is wrong.

    Args:
        problem: one line.
        instead: what to write instead, one line; "" for no advice.
    """

    def __init__(self, problem: str, instead: str = "") -> None:
        super().__init__(problem)
        self.problem, self.instead = _line(problem), _line(instead)

    def __str__(self) -> str:
        return self.problem + (f"\n  instead: {self.instead}" if self.instead else "")


def _line(text: str) -> str:
    text = " ".join(text.split())
    return text if len(text) <= 240 else text[:239] + "…"


def of_explained(error: BaseException) -> UsageError:
    """Return an error of purestep, which has four parts on several lines, as a `UsageError`."""
    lines = str(error).splitlines() or [type(error).__name__]
    parts = {
        label: line.partition(label)[2].strip()
        for line in lines
        for label in ("where:", "why:", "instead:")
        if label in line
    }
    where = f" ({parts['where:']})" if parts.get("where:") else ""
    why = f": {parts['why:']}" if parts.get("why:") else ""
    return UsageError(f"{lines[0]}{where}{why}", parts.get("instead:", ""))


class Parser(argparse.ArgumentParser):
    """argparse's parser with `UsageError` for errors, which names the most similar option or command."""

    def __init__(self, prog: str, **kwargs: Any) -> None:
        self._takes: dict[str, bool] = {}
        kwargs |= {"allow_abbrev": False, "formatter_class": argparse.RawDescriptionHelpFormatter}
        super().__init__(prog, **kwargs)

    def error(self, message: str) -> NoReturn:
        raise UsageError(message, f"{self.prog} --help")

    def parse_args(self, args: Any = None, namespace: Any = None) -> Any:
        found, rest = self.parse_known_args(args, namespace)
        if rest:
            raise self.unknown(rest[0])
        return found

    def unknown(self, word: str) -> UsageError:
        """Return the error for an unknown argument."""
        if not word.startswith("-"):
            return UsageError(f"there is no argument {word!r}", f"{self.prog} --help")
        near = nearest_name(word.partition("=")[0], self.options())
        return UsageError(f"there is no option {word.partition('=')[0]}", near or f"{self.prog} --help")

    def add_argument(self, *names: Any, **kwargs: Any) -> argparse.Action:
        action = super().add_argument(*names, **kwargs)
        self._takes |= dict.fromkeys(action.option_strings, action.nargs != 0)
        return action

    def options(self) -> dict[str, bool]:
        """Return the options by name, and whether each takes a value."""
        return self._takes


def version() -> str:
    """Return the version of purestep."""
    return str(sys.modules[__name__.partition(".")[0]].__version__)
