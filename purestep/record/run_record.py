"""`open`: a finished or unfinished run as a read-only value.

It reads `run.json`, manifests and the log when they are asked for, and arrays only for `state`. Nothing is written, and
no stored code is executed.
"""

from __future__ import annotations

import dataclasses
import datetime
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from purestep import _cells
from purestep.arguments import Location, checked
from purestep.display import curves, plots
from purestep.errors import ConfigError, SnapshotError, explain, import_extra
from purestep.loggers import read_csv, read_media
from purestep.loop import origin
from purestep.loop.identity import seat_of, warmup_of
from purestep.loop.origin import Program
from purestep.loop.resume import restore
from purestep.record.summary import Parent, Summary, is_run, started, summarize
from purestep.snapshot import root_of
from purestep.snapshot.listing import Index
from purestep.snapshot.manifest import Header
from purestep.step_protocol import Seat
from purestep.views import Block, Note, Printed, Table, written

if TYPE_CHECKING:
    from matplotlib.figure import Figure


class Columns(Printed, Mapping[str, list[Any]]):
    """The log of a run: a list for each metric, with None where it was not logged, and "step".

    Examples:
        >>> columns = Columns({"step": [1, 2], "loss": [0.5, None]})
        >>> columns["loss"], columns.at(2)
        ([0.5, None], {})
        >>> columns
        step  loss
           1   0.5
           2
    """

    def __init__(self, columns: Mapping[str, list[Any]]) -> None:
        self._columns = dict(columns)

    def __getitem__(self, name: str) -> list[Any]:
        return self._columns[name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._columns)

    def __len__(self) -> int:
        return len(self._columns)

    def at(self, step: int) -> dict[str, float]:
        """Return what was logged at a step, the later value of a name where there are several."""
        places = [place for place, logged in enumerate(self._columns.get("step", [])) if logged == step]
        names = [name for name in self._columns if name != "step"]
        found = {name: self._columns[name][place] for place in places for name in names}
        return {name: value for name, value in found.items() if value is not None}

    def to_pandas(self) -> Any:
        """Return a `pandas.DataFrame` with `step` as its index.

        Raises:
            MissingExtra: pandas is not installed.
        """
        pandas = import_extra("pandas", extra="pandas", needed_by="to_pandas()")
        return pandas.DataFrame(self._columns).set_index("step")

    def _rows(self, most: int) -> list[list[object]]:
        rows = [list(row) for row in zip(*self._columns.values(), strict=True)]
        return rows if len(rows) <= most else [*rows[: most // 2], ["…"] * len(self._columns), *rows[-most // 2 :]]

    def view(self) -> list[Block]:
        return [Table(list(self._columns), self._rows(20))] if self._columns else [Note("nothing was logged")]


@dataclasses.dataclass(frozen=True, repr=False)
class RunRecord(Printed):
    """A run, read-only. Made by `ps.open`; it is as of the moment when it was opened.

    Attributes:
        path: the run directory, absolute.
        summary: what `ps.runs` shows of it.
        programs: what started it, the first start first and resumes after it; none for a run of an earlier version.
    """

    path: Path
    summary: Summary
    programs: tuple[Program, ...] = ()
    headers: tuple[Header, ...] = dataclasses.field(default=(), repr=False)

    @property
    def name(self) -> str:
        return self.summary.name

    @property
    def when(self) -> datetime.datetime | None:
        """Its first start, UTC."""
        return self.summary.when

    @property
    def why(self) -> str:
        """Why it ended."""
        return self.summary.why

    @property
    def updates(self) -> int | None:
        return self.summary.updates

    @property
    def digest(self) -> str:
        """Of the train state of the newest snapshot."""
        return self.summary.digest

    @property
    def parent(self) -> Parent | None:
        return self.summary.parent

    @property
    def settings(self) -> Mapping[str, Any]:
        return self.summary.settings

    def settings_at(self, position: int) -> dict[str, Any]:
        """Return the settings under which the run trained the step that led to a position, in batches.

        They are `settings`, unless the run was resumed under other ones later: then those that the first snapshot at or
        after the position records.
        """
        for header in self.headers:
            identity = header.info.get("identity")
            if header.step >= position and isinstance(identity, Mapping):
                held = identity.get("settings")
                return {**self.settings, **(held if isinstance(held, Mapping) else {})}
        return dict(self.settings)

    def seat_at(self, position: int) -> Seat | None:
        """Return the seat at which the step was computed that led to a position, in batches.

        It is what the first snapshot at or after the position records, or the newest one; None for a run that did not
        train together with others.
        """
        later = (header for header in self.headers if header.step >= position)
        header = next(later, self.headers[-1] if self.headers else None)
        return None if header is None else seat_of(header.info)

    @property
    def warmup(self) -> int | None:
        """Counter of the state from which on its steps were compiled, after uncompiled ones; None without a warm-up,
        and while a step of `warmup="eager"` is being compiled.
        """
        return next((found for header in self.headers[::-1] if (found := warmup_of(header.info)) is not None), None)

    @property
    def identity(self) -> Mapping[str, Any]:
        """What the run was made of, as its newest snapshot says: data, step, callbacks, versions."""
        found = self.headers[-1].info.get("identity") if self.headers else None
        return found if isinstance(found, Mapping) else {}

    @property
    def environment(self) -> Mapping[str, Any]:
        """Where it ran, as its newest snapshot says: versions, threads, processor, deterministic flags."""
        return self.headers[-1].environment if self.headers else {}

    @property
    def snapshots(self) -> tuple[int, ...]:
        """The positions of the intact snapshots: batches consumed."""
        return tuple(header.step for header in self.headers)

    @functools.cached_property
    def metrics(self) -> Columns:
        """The log, from `metrics.csv`; empty where there is none.

        Raises:
            ConfigError: the file is not a log of metrics.
        """
        return Columns(read_csv(self.path) if (self.path / "metrics.csv").is_file() else {})

    @property
    def media(self) -> dict[str, dict[int, Path]]:
        """The files of images, histograms and texts that were logged, by name and step; see `ps.loggers.read_media`."""
        return read_media(self.path)

    def header(self, step: int) -> Header:
        """Return what the snapshot at a position says of itself.

        Raises:
            SnapshotError: there is no intact snapshot there.
        """
        for header in self.headers:
            if header.step == step:
                return header
        raise SnapshotError(
            explain(
                f"there is no intact snapshot at {step}",
                where=f"{self.path}: {', '.join(map(str, self.snapshots)) or 'none'}",
                instead="ps.callbacks.snapshots(keep=ps.snapshot.all_()) keeps all of them",
            )
        )

    def state(
        self,
        like: Any = ...,
        *,
        step: int | None = None,
        best: str | None = None,
        mode: Literal["min", "max"] = "min",
    ) -> Any:
        """Return the train state of a snapshot, verified; see `ps.restore`, which reads it.

        Args:
            like: a template: the state that `fit` was called with, whose model and static fields it takes.
            step: the position of the snapshot, in batches; the newest by default.
            best: name of a metric: take the snapshot that is best in it.
            mode: whether the smallest or the largest value is best.
        """
        return restore(self.path, like, step=step, best=best, mode=mode, verify="digest")

    def plot(self, *keys: str, title: str | None = None) -> Figure:
        """Draw what the run logged; see `ps.display.plot`, which says how.

        Args:
            *keys: names of metrics, in this order; all by default.
            title: the name of the run by default.

        Raises:
            ConfigError: the run has logged nothing, or not a key.
            MissingExtra: matplotlib is not installed.
        """
        return plots.plot(self.metrics, keys=keys or None, title=self.name if title is None else title)

    def facts(self) -> list[list[object]]:
        """Return names and values of what a reader asks first."""
        program = self.programs[-1] if self.programs else Program()
        seat = self.seat_at(self.snapshots[-1]) if self.snapshots else None
        mapped = None if seat is None else f"by vmap, as run {seat.number + 1} of {seat.members} together"
        commit = None if program.commit is None else program.commit[:12] + ("" if program.clean else ", changed")
        settings: dict[str, object] = {name: written(value) for name, value in self.settings.items()}
        media: dict[str, object] = {name: f"at {', '.join(map(str, files))}" for name, files in self.media.items()}
        facts: list[list[object]] = [
            ["when", self.when],
            ["why it ended", self.why],
            ["updates", self.updates],
            ["snapshots", ", ".join(map(str, self.snapshots))],
            *([f"setting {name}", value] for name, value in settings.items()),
            *([name, value] for name, value in self.summary.metrics.items()),
            *([f"media {name}", steps] for name, steps in media.items()),
            ["parent", self.parent],
            ["trained", mapped],
            ["compiled", None if self.warmup is None else f"from step {self.warmup}"],
            ["program", f"{program.cell} of a notebook" if program.cell else " ".join(program.command)],
            ["commit", commit],
            ["torch", self.environment.get("torch")],
            ["digest", self.digest],
        ]
        return [fact for fact in facts if fact[1] not in (None, "")]

    def view(self) -> list[Block]:
        return [Table(["run", self.name], self.facts(), wide=True), *curves.shown(self.metrics)]


@checked(ConfigError)
def open(run_dir: Location) -> RunRecord:
    """Open a run directory for reading, whichever version wrote it.

    Args:
        run_dir: the run directory.

    Raises:
        ConfigError: there is no run.

    Examples:
        >>> import tempfile, torch
        >>> import purestep as ps
        >>> tx = ps.optim.sgd(0.1)
        >>> step = ps.make_step(lambda net, batch: net(batch["x"]).square().mean(), tx)
        >>> state = ps.init(lambda: torch.nn.Linear(2, 1), tx)
        >>> data, run_dir = ps.data.batches({"x": torch.ones(8, 2)}, 4), tempfile.mkdtemp()
        >>> result = ps.fit(step, state, data, until=ps.steps(2), run_dir=run_dir, settings={"lr": 0.1})
        >>> run = ps.open(run_dir)
        >>> run.why, run.updates, run.snapshots, run.settings
        ('reached 2 steps', 2, (2,), {'lr': 0.1})
        >>> ps.digest(run.state(state)) == run.digest == ps.digest(result.state)
        True
    """
    path = _cells.located(run_dir)
    if not is_run(path):
        raise ConfigError(
            explain(
                "this is no run directory",
                where=f"run_dir={str(run_dir)!r}",
                why=f"it has neither {origin.FILE} nor snapshots" if path.is_dir() else "there is no such directory",
                instead="ps.runs(directory) lists those below a directory",
            )
        )
    summary = summarize(path, path.name)
    try:
        told = origin.read(path)
    except ValueError:
        told = {}  # the summary says so
    headers = [entry.header for entry in Index(root_of(path)).entries() if entry.header is not None]
    return RunRecord(path, summary, tuple(_program(start, told) for start in started(told)), tuple(headers))


def _program(start: Mapping[str, Any], told: Mapping[str, Any]) -> Program:
    """Return a recorded start; a field of another type than is written is left out."""
    sources = told.get("sources")
    texts = {n: sources.get(start.get(n)) if isinstance(sources, dict) else None for n in ("source", "session")}
    command = start.get("command")
    plain = ("module", "function", "file", "directory", "cell", "notebook")
    words = {**{name: start.get(name) for name in plain}, **texts}
    return Program(
        **{name: word for name, word in words.items() if isinstance(word, str)},
        line=start["line"] if isinstance(start.get("line"), int) else 0,
        command=tuple(map(str, command)) if isinstance(command, list) else (),
        commit=str(start["commit"]) if start.get("commit") is not None else None,
        clean=start["clean"] if isinstance(start.get("clean"), bool) else None,
    )
