"""`metrics.csv`: one row a step, in the run directory; always written, and read by plots and people.

Owns the file's format and its repair after a kill. A row is one `write` to the operating system, so a killed process
loses at most the row that it was writing; a resumed run leaves the same file as an uninterrupted one.
"""

from __future__ import annotations

import csv as table
import io
import json
import os
from collections.abc import Iterable, Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from purestep._cells import located
from purestep.arguments import Location, Name, checked
from purestep.errors import ConfigError, explain
from purestep.loggers.base import STEP, Logger, Media, Sink, remove_partials, write_atomically
from purestep.loggers.media_files import MediaFiles

_HPARAMS = "hparams.json"
_EDGE = 1 << 18  # bytes at each end of a long file that a resume reads


@dataclass(frozen=True)
class Csv(Logger):
    """Rows go to `run_dir/name`; hyperparameters to `hparams.json` beside it. Made by `csv`."""

    name: str = "metrics.csv"

    def open(self, run_dir: Path, *, resume_step: int | None = None) -> Sink:
        run_dir.mkdir(parents=True, exist_ok=True)
        return CsvSink(run_dir / self.name, resume_step=resume_step)


@checked(ConfigError)
def csv(*, name: Name = "metrics.csv") -> Csv:
    """Log to a CSV file in the run directory.

    The first column is `step`. Columns are in the order in which their names were first logged; a name that appears
    late has empty cells in earlier rows. Numbers are written with all digits of a float64; `nan` and `inf` are written
    as such. Images, histograms and texts become files of the directory `media`, which `read_media` finds.

    Args:
        name: of the file in the run directory.

    Returns:
        A logger: a frozen value. `open(run_dir)` returns its sink.

    Raises:
        ConfigError: the name is empty or is a path.

    Examples:
        >>> import tempfile
        >>> run_dir = Path(tempfile.mkdtemp())
        >>> sink = csv().open(run_dir)
        >>> sink.log(1, {"loss": 0.5})
        >>> sink.log(1, {"accuracy": 0.75})
        >>> sink.log(2, {"loss": 0.25})
        >>> sink.close()
        >>> print((run_dir / "metrics.csv").read_text(), end="")
        step,loss,accuracy
        1,0.5,0.75
        2,0.25,
    """
    if not name or Path(name).name != name:
        raise ConfigError(
            explain(f"{name!r} is not the name of a file in the run directory", instead='name="metrics.csv"')
        )
    return Csv(name)


class CsvSink(Sink):
    """An open `metrics.csv`. Only the rows of the last step are held in memory."""

    takes = (Media,)

    def __init__(self, path: Path, *, resume_step: int | None) -> None:
        super().__init__(first_step=resume_step or 0)
        self._path, self._media = path, MediaFiles(path.parent, resume_step=resume_step)
        for name in (path.name, _HPARAMS):
            remove_partials(path.with_name(name))
        kept = None if resume_step is None else _cut_in_place(path, resume_step)
        if kept is None:
            kept = _surviving_rows(path, resume_step)
            write_atomically(path, "".join(_lines(*kept)))
        columns, rows = kept
        self._columns = columns
        self._open_file()
        # The row of the step to resume at may get more values; it is the last one, because later ones were removed.
        self._row_step = rows[-1][0] if rows else None
        self._rows_of_step = [dict(row) for step, row in rows if step == self._row_step]
        self._row_start = self._end - len(_line(columns, *rows[-1]).encode()) if rows else self._end

    def _open_file(self) -> None:
        self._file: BinaryIO = self._path.open("r+b", buffering=0)
        self._end = self._file.seek(0, io.SEEK_END)

    def _write(self, step: int, row: dict[str, float]) -> None:
        earlier = self._rows_of_step if step == self._row_step else []
        if any(_contains(other, row) for other in earlier):
            return  # a resumed run logs again what it had logged before it stopped
        # Two batches of one update (`optim.accumulate`) have the same step, and each keeps its own line.
        extends = bool(earlier) and not _differs(earlier[-1], row)
        merged = earlier[-1] | row if extends else row
        new = [name for name in row if name not in self._columns]
        if new:
            self._add_columns(new)
        start = self._row_start if extends else self._end
        content = _line(self._columns, step, merged).encode()
        try:
            self._write_at(start, content)
        except OSError:
            # A full disk: restore the line that was there, so that the next attempt does not append to half a line.
            with suppress(OSError):
                self._write_at(start, _line(self._columns, step, earlier[-1]).encode() if extends else b"")
            raise
        self._rows_of_step = [*(earlier[:-1] if extends else earlier), merged]
        self._row_step, self._row_start, self._end = step, start, start + len(content)

    def _write_at(self, start: int, content: bytes) -> None:
        self._file.seek(start)
        written = 0
        while written < len(content):
            written += self._file.write(content[written:])
        self._file.truncate(start + len(content))

    def _add_columns(self, new: list[str]) -> None:
        """Add columns: every line gets empty cells at its end, in a new file that replaces the old one."""
        columns = [*self._columns, *new]
        # The rows are read by the path and written by the open file; of two different files one would be lost.
        if not os.path.samestat(self._path.stat(), os.fstat(self._file.fileno())):
            raise OSError(f"{self._path} is another file now: it was replaced, or the run directory was moved")
        _, _, body = self._path.read_text(encoding="utf-8").partition("\n")
        lines = [line + "," * len(new) + "\n" for line in body.split("\n")[:-1]]
        write_atomically(self._path, _header(columns) + "".join(lines))
        self._file.close()
        self._columns = columns
        self._open_file()
        self._row_start = self._end - len(lines[-1].encode()) if lines else self._end

    def _write_media(self, step: int, name: str, value: Media) -> None:
        self._media.write(step, name, value)

    def _write_hparams(self, values: dict[str, Any]) -> None:
        write_atomically(self._path.with_name(_HPARAMS), json.dumps(values, indent=2) + "\n")

    def flush(self) -> None:
        os.fsync(self._file.fileno())

    def _close(self) -> None:
        try:
            self.flush()
        finally:
            self._file.close()


@checked(ConfigError)
def read_csv(path: Location) -> dict[str, list[Any]]:
    """Read a `metrics.csv` into one list a column, in the order of the file.

    Args:
        path: the file, or the run directory that holds a `metrics.csv`.

    Returns:
        `step` is a list of int; every other column a list of `float | None`, None where nothing was logged. An
        incomplete last line, of a process that was killed, is left out.

    Raises:
        FileNotFoundError: there is no such file.
        ConfigError: the file is not one of ours.

    Examples:
        >>> import tempfile
        >>> path = Path(tempfile.mkdtemp()) / "metrics.csv"
        >>> _ = path.write_text("step,loss,val/loss\\n1,0.5,\\n2,nan,0.75\\n3,0.")
        >>> read_csv(path)
        {'step': [1, 2], 'loss': [0.5, nan], 'val/loss': [None, 0.75]}
    """
    path = located(path)
    path = path / "metrics.csv" if path.is_dir() else path
    if not path.is_file():
        raise FileNotFoundError(explain("there is no such file", where=f"path={str(path)!r}"))
    columns, rows = _read(path)
    result: dict[str, list[Any]] = {STEP: [step for step, _ in rows]}
    return result | {name: [row.get(name) for _, row in rows] for name in columns}


def _contains(logged: dict[str, float], row: dict[str, float]) -> bool:
    # Compared as text, because a NaN is unequal to itself, and -0.0 is equal to 0.0.
    return all(name in logged and repr(logged[name]) == repr(value) for name, value in row.items())


def _differs(logged: dict[str, float], row: dict[str, float]) -> bool:
    return any(name in logged and repr(logged[name]) != repr(value) for name, value in row.items())


Logged = list[tuple[int, dict[str, float]]]  # (step, values by name), a line each


def _surviving_rows(path: Path, resume_step: int | None) -> tuple[list[str], Logged]:
    """The columns and rows that a new process keeps: none for a fresh start, else those up to the resumed step."""
    if not path.exists():
        return [], []
    columns, rows = _read(path)  # also refuses to overwrite a file that is not ours
    if resume_step is None:
        return [], []
    rows = [(step, row) for step, row in rows if step <= resume_step]
    # In an uninterrupted run, a column that only later rows have would not exist yet.
    used = {name for _, row in rows for name in row}
    return [name for name in columns if name in used], rows


def _cut_in_place(path: Path, resume_step: int) -> tuple[list[str], Logged] | None:
    """Remove the rows after a step from the end of a long file, and read no more than both ends of it.

    Returns:
        The columns and the last rows that are left, several steps of them. None where the file has to be read as a
        whole: it is short, a line at an end is damaged, or a column may be one that only removed rows have.
    """
    if not path.exists() or path.stat().st_size < 4 * _EDGE:
        return None
    with path.open("r+b", buffering=0) as file:
        columns, first = _parsed(file.read(_EDGE), path)
        at = size = file.seek(0, io.SEEK_END)
        lines: list[bytes] = []
        while at > _EDGE and (not lines or not _is_before(lines[0], resume_step)):
            at -= _EDGE
            file.seek(at)
            lines = file.read(size - at).split(b"\n")[1:]  # the first one is cut
        body = b"".join(line + b"\n" for line in lines[:-1])  # the last one is empty, or torn by a kill
        rows = list(_parse(columns, table.reader(io.StringIO(body.decode("utf-8", errors="replace")))))
        kept = [(step, row) for step, row in rows if step <= resume_step]
        used = {name for _, row in (*first, *kept) for name in row}
        if len(rows) < len(lines) - 1 or not kept or kept[0][0] == kept[-1][0] or not used.issuperset(columns):
            return None
        file.truncate(size - len(lines[-1]) - sum(len(line) + 1 for line in lines[len(kept) : -1]))
        os.fsync(file.fileno())
    return columns, kept


def _is_before(line: bytes, step: int) -> bool:
    number = line.partition(b",")[0]
    return number.isdigit() and int(number) < step


def _read(path: Path) -> tuple[list[str], Logged]:
    return _parsed(path.read_bytes(), path)


def _parsed(content: bytes, path: Path) -> tuple[list[str], Logged]:
    text = content.decode("utf-8", errors="replace")
    text = text[: text.rfind("\n") + 1]  # a line without a newline is incomplete: its process was killed
    if not text:
        return [], []
    header, *body = table.reader(io.StringIO(text, newline=""))
    if header[:1] != [STEP]:
        what, where = "the file is not a log of metrics", f"{path}: its first column is {''.join(header[:1])!r}"
        raise ConfigError(
            explain(what, where=where, why=f"the first column is {STEP!r}", instead="use another run_dir")
        )
    return header[1:], list(_parse(header[1:], body))


def _parse(columns: list[str], body: Iterable[list[str]]) -> Iterator[tuple[int, dict[str, float]]]:
    for cells in body:
        # A line that a crash of the machine has damaged is dropped: an error would keep the run from resuming.
        with suppress(ValueError):
            values = {name: float(cell) for name, cell in zip(columns, cells[1:], strict=True) if cell}
            yield int(cells[0]), values


def _cells(cells: Iterable[str | int]) -> str:
    text = io.StringIO()
    table.writer(text, lineterminator="\n").writerow(cells)
    return text.getvalue()


def _header(columns: list[str]) -> str:
    return _cells([STEP, *columns])


def _line(columns: list[str], step: int, row: dict[str, float]) -> str:
    return _cells([step, *(repr(row[name]) if name in row else "" for name in columns)])


def _lines(columns: list[str], rows: Logged) -> Iterator[str]:
    if columns:
        yield _header(columns)
        yield from (_line(columns, step, row) for step, row in rows)
