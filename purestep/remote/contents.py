"""Files elsewhere with their sizes and checksums: what a list of them says, and what is compared with it."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import xxhash

from purestep.errors import CorruptSnapshot, SnapshotError, explain
from purestep.remote.files import Files
from purestep.snapshot.header import seal, unseal
from purestep.snapshot.json_fields import Field

COPY = "copy.json"  # of a directory: names, sizes and checksums of its files, written last
_FORMAT = 1
_CHECKSUM = re.compile(r"[0-9a-f]{16}")
_BLOCK = 1 << 20


@dataclass(frozen=True)
class Content:
    """The size in bytes of a file, and its xxh3."""

    size: int
    checksum: str

    @property
    def name(self) -> str:
        return f"{self.checksum}-{self.size}"


def content_of(path: Path) -> Content:
    """Return size and checksum of a file."""
    digest, size = xxhash.xxh3_64(), 0
    with path.open("rb") as file:
        while block := file.read(_BLOCK):
            digest.update(block)
            size += len(block)
    return Content(size, digest.hexdigest())


def put(files: Files, top: str, source: Path) -> dict[str, Content]:
    """Copy a directory to an empty place, without its list, and return that.

    Raises:
        FileNotFoundError: there is no such directory any more.
        SnapshotError: the place keeps other sizes than were sent.
    """
    contents = {str(path.relative_to(source)): content_of(path) for path in below(source)}
    files.each(lambda path: files.put(f"{top}/{path}", source / path), contents)
    _check_sizes(files, top, contents)
    return contents


def get(files: Files, top: str, target: Path, contents: Mapping[str, Content]) -> None:
    """Copy the files of a directory to the disk and compare them with their checksums."""

    def fetch(name: str) -> None:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        get_file(files, f"{top}/{name}", path, contents[name])

    files.each(fetch, contents)


def _check_sizes(files: Files, top: str, contents: Mapping[str, Content]) -> None:
    """Refuse a copy that was cut off without an error, as some file systems do."""
    sizes = files.sizes(top)
    for name, content in contents.items():
        if sizes.get(name) != content.size:
            why = f"{content.size} bytes were sent, {sizes.get(name, 'none')} are there"
            raise SnapshotError(explain("a file arrived incomplete", where=f"{files.url}/{top}/{name}", why=why))


def complete_in(files: Files, folder: str) -> list[str]:
    """Return the names of the directories in a folder that are there in full: their list is."""
    return [name for path in files.sizes(folder) if (name := path.removesuffix(f"/{COPY}")) != path]


def get_file(files: Files, name: str, target: Path, content: Content) -> None:
    """Copy a file to the disk and compare it with its checksum."""
    try:
        files.get(name, target)
        found = content_of(target)
    except FileNotFoundError as error:
        raise CorruptSnapshot(explain("a file of the remote copy is missing", where=f"{files.url}/{name}")) from error
    if found != content:
        why = f"{content.size} bytes with xxh3 {content.checksum} were copied; {found.size} with {found.checksum} came"
        raise CorruptSnapshot(explain("a file of the remote copy is corrupt", where=f"{files.url}/{name}", why=why))


def below(directory: Path, excluded: frozenset[str] = frozenset()) -> list[Path]:
    """Return the regular files below a directory, in order; links are not followed."""
    found = []
    for parent, directories, names in os.walk(directory):
        top = Path(parent) == directory
        directories[:] = sorted(name for name in directories if not (top and name in excluded))
        kept = (name for name in names if not (top and name in excluded) and not name.endswith(".partial"))
        found += [path for name in sorted(kept) if not (path := Path(parent, name)).is_symlink() and path.is_file()]
    return found


def sealed(contents: Mapping[str, Content]) -> bytes:
    return seal({"format": _FORMAT, "files": {name: [c.size, c.checksum] for name, c in contents.items()}})


def parsed(told: bytes, name: str) -> dict[str, Content]:
    body = Field(unseal(told, name), name)
    if body["format"].natural() != _FORMAT:
        raise SnapshotError(explain("the remote copy is of a later version of purestep", where=name))
    contents = {}
    for path, field in body["files"].entries().items():
        size, checksum = field.items()[:2]
        # It becomes a path on this machine: one that leads out of the directory is not ours.
        if os.path.isabs(path) or ".." in Path(path).parts:
            raise field.wrong("a file inside of the directory")
        contents[path] = Content(size.natural(), checksum.text(_CHECKSUM))
    return contents
