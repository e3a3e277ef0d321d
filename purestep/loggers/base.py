"""What a logger is: a frozen value that opens a sink, and the sink that takes rows.

Owns the checks that every sink shares (names, numbers, order of steps, use after close), so that a new sink only
writes. It knows nothing of the loop, which opens sinks, feeds them and survives their errors.
"""

from __future__ import annotations

import abc
import json
import os
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any, ClassVar

from purestep.errors import ConfigError, MetricError, explain

STEP = "step"


class SkippedMediaWarning(UserWarning):
    """A logger was handed an image, a histogram or a text, and takes none of its kind."""


class Media(abc.ABC):
    """What a row may hold besides numbers: `Image`, `Histogram`, `Text`."""

    suffix: ClassVar[str]

    @abc.abstractmethod
    def content(self) -> bytes:
        """Return it as a file of its kind."""


class Logger(abc.ABC):
    """A logger's configuration: a frozen value that says where rows go. It holds no file and no connection."""

    @abc.abstractmethod
    def open(self, run_dir: Path, *, resume_step: int | None = None) -> Sink:
        """Open the sink of one run.

        Args:
            run_dir: directory of the run; made when it is missing.
            resume_step: None starts afresh. A step k continues a run from the state at step k: what the earlier process
                logged beyond k is taken back, because it will be logged again.

        Raises:
            MissingExtra: the logger needs a package that is not installed.
        """


class Sink(abc.ABC):
    """Where the rows of one run go. There is one x-axis, `state.step`, and it never goes back.

    A subclass writes `_write`, and `_write_hparams`, `flush` and `_close` where it has something to do there. One that
    has a place for images, histograms or texts names those classes in `takes`, and writes `_write_media`.
    """

    takes: ClassVar[tuple[type[Media], ...]] = ()

    def __init__(self, *, first_step: int = 0) -> None:
        self._last = first_step
        self._closed = False
        self._skipped = False

    def log(self, step: int, row: Mapping[str, float | Media]) -> None:
        """Log one row. Rows of the same step are merged, the later value of a name wins.

        An image, a histogram or a text of which the sink takes none is left out, with one warning.

        Args:
            step: `state.step` of the row: applied updates, not smaller than that of the row before.
            row: numbers by name; NaN and infinities too. Reading a 0-d tensor waits for its device. Or a `Media`.

        Raises:
            MetricError: a name or a number cannot be logged, or the step went back.
            ConfigError: the sink is closed.
        """
        self._check_open("log")
        step = int(step)
        if step < self._last:
            what = f"a row of step {step} came after one of step {self._last}"
            why = "the x-axis is state.step, which never goes back; a resumed run says where it resumes when it opens"
            raise MetricError(explain(what, where=f"row: {', '.join(map(str, row))}", why=why))
        media = {check_name(name, row): value for name, value in row.items() if isinstance(value, Media)}
        clean = check_row({name: value for name, value in row.items() if name not in media})
        self._last = step
        if clean:
            self._write(step, clean)
        for name, value in media.items():
            if isinstance(value, self.takes):
                self._write_media(step, name, value)
            else:
                self._skip(name, value)

    def _skip(self, name: str, value: Media) -> None:
        if not self._skipped:
            self._skipped = True
            kinds = ", ".join(kind.__name__ for kind in self.takes) or "numbers only"
            warnings.warn(
                f"{name!r} is left out of {type(self).__name__}, which has no place for {_a(type(value).__name__)}\n"
                f"  why:     it takes {kinds}\n"
                "  instead: loggers=[..., ps.loggers.csv()] writes it into the run directory; this is said once",
                SkippedMediaWarning,
                stacklevel=3,
            )

    def hparams(self, values: Mapping[str, Any]) -> None:
        """Record hyperparameters. Nested mappings get names with slashes; what JSON cannot hold is kept as its repr."""
        self._check_open("hparams")
        flat = flatten_hparams(values)
        if flat:
            self._write_hparams(flat)

    def close(self) -> None:
        """Write what is left and let go of files and connections. Closing twice is fine."""
        if not self._closed:
            self._closed = True
            self._close()

    def flush(self) -> None:
        """Make what was logged durable. The loop calls it before a snapshot, which must not know more than the log."""

    @abc.abstractmethod
    def _write(self, step: int, row: dict[str, float]) -> None: ...

    def _write_media(self, step: int, name: str, value: Any) -> None:
        """Write a value of a class that `takes` has."""

    def _write_hparams(self, values: dict[str, Any]) -> None:
        """Record flat hyperparameters; a sink with no place for them drops them."""

    def _close(self) -> None:
        self.flush()

    def _check_open(self, call: str) -> None:
        if self._closed:
            raise ConfigError(explain(f"{call}() on a sink that is closed", where=repr(self), instead="open it again"))

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at step {self._last}{', closed' if self._closed else ''}>"


def check_row(row: Mapping[str, Any]) -> dict[str, float]:
    """Return the row with python floats, or raise a MetricError that names what cannot be logged."""
    return {check_name(name, row): _number(name, value) for name, value in row.items()}


def check_name(name: Any, row: Mapping[str, Any]) -> str:
    """Return the name of a value of a row, or raise a MetricError."""
    if not isinstance(name, str) or not name.strip() or name == STEP or not name.isprintable():
        what = f"{name!r} cannot be the name of a logged number"
        why = f"names are non-empty printable strings other than {STEP!r}, which is the x-axis"
        raise MetricError(explain(what, where=f"row: {', '.join(map(repr, row))}", why=why))
    return name


def _a(noun: str) -> str:
    return f"{'an' if noun[0] in 'AEIOU' else 'a'} {noun}"


def _number(name: str, value: Any) -> float:
    if isinstance(value, (int, float)):
        return float(value)
    if not isinstance(value, (str, bytes, complex)) and getattr(value, "shape", None) == ():
        try:
            return float(value)
        except (TypeError, ValueError, RuntimeError):
            pass  # a complex tensor, a traced or a fake one: refused below, with its description
    kind = f"{getattr(value, 'dtype', type(value).__name__)}{list(getattr(value, 'shape', ()))}"
    raise MetricError(
        explain(
            f"the value of {name!r} is not a number",
            where=f"row[{name!r}]: {kind.removesuffix('[]')}",
            why="a logger draws one number a name and step",
            instead="reduce it first, for instance value.mean(), or compute() of a metric\n"
            "ps.loggers.Image(value), ps.loggers.Histogram(value), ps.loggers.Text(value) for what is no number",
        )
    )


def flatten_hparams(values: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Flatten nested mappings into one with slashed names and values that JSON holds.

    Examples:
        >>> flatten_hparams({"adam": {"lr": 0.1, "betas": (0.9, 0.99)}, "seed": 0})
        {'adam/lr': 0.1, 'adam/betas': '(0.9, 0.99)', 'seed': 0}
    """
    flat: dict[str, Any] = {}
    for key, value in values.items():
        name = f"{prefix}{key}"
        if isinstance(value, Mapping):
            flat |= flatten_hparams(value, f"{name}/")
        else:
            flat[name] = value if value is None or isinstance(value, (bool, int, float, str)) else repr(value)
    return flat


def write_atomically(path: Path, content: str | bytes) -> None:
    """Write a small file so that a reader sees the old or the new content, never a part."""
    partial = path.with_name(f"{path.name}.{os.getpid()}.partial")
    partial.unlink(missing_ok=True)  # what a killed process of this number left, or a link that leads elsewhere
    try:
        with partial.open("xb") as file:
            file.write(content.encode("utf-8") if isinstance(content, str) else content)
            file.flush()
            os.fsync(file.fileno())
        partial.replace(path)
        _fsync(path.parent)  # or a power cut takes the name back, and with it what later writes add to the new file
    finally:
        partial.unlink(missing_ok=True)


def _fsync(directory: Path) -> None:
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def remove_partials(path: Path) -> None:
    """Remove what `write_atomically` left behind where its process was killed. Only the one writer of a file may."""
    for partial in path.parent.glob(f"{path.name}.*.partial"):
        partial.unlink(missing_ok=True)


def remembered_id(path: Path, *, resume: bool) -> str | None:
    """Return the id that a tracking service gave this run, as an earlier process wrote it; None for a fresh run."""
    if not resume or not path.is_file():
        return None
    try:
        return str(json.loads(path.read_text(encoding="utf-8"))["id"])
    except (ValueError, KeyError, TypeError):
        return None  # a file torn by a power cut: a new run is better than none
