"""How a run directory is kept elsewhere: each snapshot in a directory of its own, and the other files by content.

    snapshots/<name>/...          a snapshot's files, as on the disk
    snapshots/<name>/copy.json    their names, sizes and checksums, written last: without it there is no copy
    base/<part>/...               frozen leaves that snapshots share, with a list of the same kind
    record/<checksum>-<size>      the content of a file: metrics.csv, run.json, ...
    record/<number>.json          which file had which content; the highest intact number counts

Both kinds of JSON carry a checksum of themselves, so one that was cut off counts as missing.
"""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from purestep.errors import SnapshotError
from purestep.remote import bases
from purestep.remote.contents import COPY, Content, below, complete_in, get, get_file, parsed, put, sealed
from purestep.remote.files import Files
from purestep.snapshot import durable_directories, free_space, listing, stored_digest
from purestep.snapshot.header import DATA, Header, parse_header
from purestep.snapshot.packing import BASE
from purestep.snapshot.retention import Record

SNAPSHOTS, RECORD = "snapshots", "record"
_NAME = re.compile(r"(0|[1-9][0-9]{0,18})(?:[.]([1-9][0-9]{0,18}))?", re.ASCII)
_NUMBERED = re.compile(r"([0-9]{1,18})[.]json", re.ASCII)


@dataclass(frozen=True)
class Copy:
    """A complete copy of a snapshot: the name of its directory, the content of each file, and its header."""

    name: str
    revision: int
    files: Mapping[str, Content]
    header: Header

    @property
    def nbytes(self) -> int:
        return sum(content.size for content in self.files.values())


# --- snapshots --------------------------------------------------------------------------------------------------------


def listed(files: Files) -> list[Copy]:
    """Return the complete copies of snapshots, in order of step and revision."""
    copies = [copy for name in complete_in(files, SNAPSHOTS) if (copy := _read(files, name)) is not None]
    parts = set(complete_in(files, BASE)) if any(copy.header.base.parts for copy in copies) else set()
    copies = [copy for copy in copies if parts.issuperset(copy.header.base.parts)]
    return sorted(copies, key=lambda copy: (copy.header.step, copy.revision))


def current(copies: Iterable[Copy]) -> dict[int, Copy]:
    """Return one copy for each step: its highest revision."""
    return {copy.header.step: copy for copy in copies}


def records(copies: Iterable[Copy]) -> list[Record]:
    """Return (step, metrics) of copies, for a preservation policy."""
    return [(step, copy.header.metrics) for step, copy in sorted(current(copies).items())]


def _read(files: Files, name: str) -> Copy | None:
    """Return a copy whose list of files and whose header are intact; None for any other."""
    match = _NAME.fullmatch(name)
    told = files.read(f"{SNAPSHOTS}/{name}/{COPY}") if match else None
    head = files.read(f"{SNAPSHOTS}/{name}/{DATA}") if told is not None else None
    if match is None or told is None or head is None:
        return None
    with contextlib.suppress(SnapshotError):  # cut off, of a later format, or of another program
        contents = parsed(told, name)
        known = contents.get(DATA)
        header = parse_header(head, f"{files.url}/{SNAPSHOTS}/{name}/{DATA}")
        if known == Content(len(head), xxhash.xxh3_64_hexdigest(head)) and header.step == int(match[1]):
            return Copy(name, int(match[2] or 0), contents, header)
    return None


def upload(files: Files, source: Path, taken: Iterable[str]) -> Copy:
    """Copy a snapshot from the disk; it is listed when this returns, and not before.

    Args:
        files: where to.
        source: its directory. Where the writer deletes it meanwhile, the copy fails.
        taken: names that copies have already.

    Raises:
        FileNotFoundError: the writer has deleted the snapshot.
        Unreachable: the place does not answer, or keeps other sizes than were sent.
    """
    step = source.name.partition(".")[0]
    revisions = [int(match[2] or 0) for name in taken if (match := _NAME.fullmatch(name)) and match[1] == step]
    name = listing.directory_name(int(step), max(revisions, default=-1) + 1)
    top = f"{SNAPSHOTS}/{name}"
    files.remove_all(top)  # what an upload that was interrupted has left
    head = (source / DATA).read_bytes()
    header = parse_header(head, str(source / DATA))
    for part in header.base.parts:  # before the snapshot, which is nothing without them
        bases.upload(files, source.parent, part)
    contents = put(files, top, source)
    files.write(f"{top}/{COPY}", sealed(contents))
    match = _NAME.fullmatch(name)
    return Copy(name, int(match[2] or 0) if match else 0, contents, header)


def download(files: Files, copy: Copy, root: Path) -> Path:
    """Copy a snapshot to the disk, durably, once its checksums and digests are those of its manifest.

    Args:
        files: where from.
        copy: as it was listed.
        root: directory of snapshots, which has one writer: the caller.

    Raises:
        CorruptSnapshot: bytes are missing, or are not those that were saved.
        Unreachable: the place does not answer.
    """
    durable_directories.make_root(root)
    free_space.check_room(root, copy.nbytes)
    step = copy.header.step
    final = root / listing.directory_name(step, listing.next_revision(root, step))
    temporary = durable_directories.begin(root, final.name)

    try:
        for part in copy.header.base.parts:
            bases.download(files, part, root)
        get(files, f"{SNAPSHOTS}/{copy.name}", temporary, copy.files)
        stored_digest.check(temporary)
        durable_directories.commit(temporary, final)
    except BaseException:
        durable_directories.abandon(temporary)
        raise
    return final


def remove(files: Files, name: str) -> None:
    """Remove a copy, so that it is never listed with a part of its files."""
    files.remove(f"{SNAPSHOTS}/{name}/{COPY}")
    files.remove_all(f"{SNAPSHOTS}/{name}")


def remove_incomplete(files: Files, copies: Iterable[Copy]) -> None:
    """Remove what interrupted uploads and removals have left. Only the one writer may."""
    complete = {copy.name for copy in copies}
    for name in {path.partition("/")[0] for path in files.sizes(SNAPSHOTS)} - complete:
        remove(files, name)
    remove_unused_bases(files, copies)


def remove_unused_bases(files: Files, copies: Iterable[Copy]) -> None:
    """Remove what no copy refers to. Only the one writer may."""
    bases.remove_unused(files, {part for copy in copies for part in copy.header.base.parts})


# --- the record: every other file -------------------------------------------------------------------------------------


@dataclass(frozen=True)
class RunFiles:
    """The other files of a run directory at one moment, as they are kept elsewhere."""

    number: int = -1
    files: Mapping[str, Content] | None = None


def record(files: Files) -> RunFiles:
    """Return the newest intact list of the other files of a run."""
    numbers = sorted((int(m[1]) for path in files.sizes(RECORD) if (m := _NUMBERED.fullmatch(path))), reverse=True)
    for number in numbers:
        told = files.read(f"{RECORD}/{number}.json")
        with contextlib.suppress(SnapshotError):
            if told is not None:
                return RunFiles(number, parsed(told, f"{number}.json"))
    return RunFiles(max(numbers, default=-1), None)


def upload_record(files: Files, run_dir: Path, before: RunFiles, excluded: Iterable[str]) -> RunFiles:
    """Copy the other files of a run directory, those whose content is not there yet, and then the list of them.

    Args:
        files: where to.
        run_dir: the run directory.
        before: the list that is there.
        excluded: names in the run directory that are not copied.
    """
    stored = set((before.files or {}).values())
    contents: dict[str, Content] = {}
    for path in below(run_dir, frozenset(excluded)):
        # It may grow, or be replaced, while it is read: what was read is what is written, under the checksum of it.
        with contextlib.suppress(FileNotFoundError):
            content = path.read_bytes()
            known = Content(len(content), xxhash.xxh3_64_hexdigest(content))
            contents[str(path.relative_to(run_dir))] = known
            if known not in stored:
                files.write(f"{RECORD}/{known.name}", content)
                stored.add(known)
    if contents == before.files:
        return before
    now = RunFiles(before.number + 1, contents)
    files.write(f"{RECORD}/{now.number}.json", sealed(contents))
    # The list before stays until the next one, for whoever is reading it.
    kept = {content.name for told in (before.files or {}, contents) for content in told.values()}
    kept |= {f"{number}.json" for number in (before.number, now.number)}
    for name in files.sizes(RECORD):
        if name not in kept:
            files.remove(f"{RECORD}/{name}")
    return now


def download_record(files: Files, told: RunFiles, run_dir: Path) -> None:
    """Write the other files of a run into its directory, over those that are there.

    Raises:
        CorruptSnapshot: the content of one is not what was copied.
    """
    for name, content in (told.files or {}).items():
        target = run_dir / name
        target.parent.mkdir(parents=True, exist_ok=True)
        partial = target.with_name(f"{target.name}.{os.getpid()}.partial")
        try:
            get_file(files, f"{RECORD}/{content.name}", partial, content)
            durable_directories.fsync(partial)
            partial.replace(target)
        finally:
            partial.unlink(missing_ok=True)
    durable_directories.fsync(run_dir)
