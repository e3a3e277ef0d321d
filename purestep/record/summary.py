"""What a run directory says at a glance: `run.json`, and the header of the newest snapshot.

`table` asks for it a thousand times, so no array, no log and no other manifest is read. Directories of earlier formats
have no `run.json`, and headers that know less.
"""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from purestep.errors import SnapshotError
from purestep.loop import origin
from purestep.snapshot import listing
from purestep.snapshot.header import Header
from purestep.snapshot.listing import root_of

UNFINISHED = "not finished"


@dataclasses.dataclass(frozen=True)
class Parent:
    """The run that another one was forked from.

    Attributes:
        run: its directory, absolute.
        at: the position at which it was forked: batches consumed.
        digest: of the train state there.
    """

    run: str
    at: int
    digest: str

    def __str__(self) -> str:
        return f"{Path(self.run).name}@{self.at}"


@dataclasses.dataclass(frozen=True)
class Summary:
    """A row of a table of runs.

    Attributes:
        name: of the run: its directory, from the root that was listed.
        path: of the directory.
        when: its first start; of an earlier version, when its newest snapshot was written. UTC; None if unknown.
        why: why it ended: "reached 5 epochs", "SIGTERM", an error, "not finished", or what is damaged.
        updates: `state.step` of the newest snapshot; of an earlier version the batches.
        batches: batches consumed at the newest snapshot.
        metrics: of the newest snapshot.
        settings: what `fit(..., settings=)` was given.
        digest: of the train state of the newest snapshot; "" where that records none.
        parent: what it was forked from, None for a run from the beginning.
        damage: what of it cannot be read, "" when all can.
    """

    name: str
    path: Path
    when: datetime.datetime | None = None
    why: str = UNFINISHED
    updates: int | None = None
    batches: int | None = None
    metrics: Mapping[str, float] = dataclasses.field(default_factory=dict)
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    digest: str = ""
    parent: Parent | None = None
    damage: str = ""


def is_run(directory: Path) -> bool:
    """Tell whether a directory is that of a run."""
    return (directory / origin.FILE).is_file() or (directory / "snapshots").is_dir()


def summarize(directory: Path, name: str) -> Summary:
    """Return what a run directory says; what cannot be read is named in `damage`."""
    damage: list[str] = []
    told: dict[str, Any] = {}
    try:
        told = origin.read(directory)
    except ValueError as error:
        damage.append(str(error))
    entry = listing.newest(root_of(directory))
    header = None if entry is None else entry.header
    if entry is not None and header is None:
        damage.append(f"snapshot {entry.step}: {entry.reason}")
    info = {} if header is None else header.info
    starts = started(told)
    when = _time(starts[0].get("time")) if starts else None if header is None else _time(header.created)
    return Summary(
        name,
        directory,
        when=when,
        why=f"damaged: {_first_line(damage[0])}" if damage else _why(told, entry),
        updates=None if header is None else _natural(info.get("updates"), header.step),
        batches=None if header is None else header.step,
        metrics={} if header is None else dict(header.metrics),
        settings=settings_of(told, info),
        digest="" if header is None else header.digests.get("state", ""),
        parent=parent_of(told),
        damage="\n".join(damage),
    )


def started(told: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the starts that `run.json` records."""
    found = told.get("starts")
    return [start for start in found if isinstance(start, dict)] if isinstance(found, list) else []


def settings_of(told: Mapping[str, Any], info: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of a run: of `run.json`, else those in the identity of a snapshot."""
    identity = info.get("identity")
    for found in (told.get("settings"), identity.get("settings") if isinstance(identity, Mapping) else None):
        if isinstance(found, Mapping) and found:
            return dict(found)
    return {}


def parent_of(told: Mapping[str, Any]) -> Parent | None:
    """Return the parent that `run.json` records."""
    found = told.get("parent")
    if not isinstance(found, Mapping):
        return None
    return Parent(str(found.get("run", "")), _natural(found.get("at"), 0), str(found.get("digest", "")))


def _why(told: Mapping[str, Any], entry: listing.Entry | None) -> str:
    end = told.get("end")
    if isinstance(end, Mapping):
        return str(end.get("reason", UNFINISHED))
    if told:
        return UNFINISHED if started(told) else "not started"
    if entry is None or entry.header is None:
        return UNFINISHED
    info = entry.header.info
    stop = info["stop"] if "stop" in info else _stored_stop(entry.path, entry.header)
    return UNFINISHED if stop is None else str(stop)


def _stored_stop(path: Path, header: Header) -> object:
    """Return why a run ended from the loop state in its last snapshot: of versions that said it nowhere else."""
    # Here, as a table of runs of this version needs none of them, nor torch.
    from purestep.loop.events import LoopState
    from purestep.snapshot.codec import from_text
    from purestep.snapshot.manifest import read_manifest
    from purestep.tree import node_name

    with contextlib.suppress(SnapshotError, ValueError, KeyError):
        manifest = read_manifest(path)
        root = manifest.structure
        if isinstance(root, Mapping) and root.get("class") == node_name(LoopState):
            for leaf in manifest.leaves:
                if leaf.path == ".status.stop" and leaf.text is not None:
                    return from_text(leaf.kind, leaf.text)
    return None


def _time(value: object) -> datetime.datetime | None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        return None
    with contextlib.suppress(ValueError, OverflowError, OSError):
        return datetime.datetime.fromtimestamp(value, datetime.UTC)
    return None


def _natural(value: object, otherwise: int) -> int:
    return value if isinstance(value, int) and not isinstance(value, bool) and value >= 0 else otherwise


def _first_line(text: str) -> str:
    return text.partition("\n")[0]
