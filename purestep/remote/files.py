"""The files of one directory elsewhere, through fsspec: list, read, put, get, remove; with retries.

Owns what a failure is and how it reads. It knows nothing of snapshots. fsspec is imported when a place is opened.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

from purestep.errors import ConfigError, SnapshotError, explain, import_extra

T = TypeVar("T")
_THREADS = 8  # files that are copied at a time; one costs a round trip, whatever its size
_LONGEST_PAUSE = 30.0
# Where a file needs a directory around it. Object stores have none, and "making" one there might make a bucket.
_WITH_DIRECTORIES = {"file", "local", "sftp", "ssh", "ftp", "smb", "hdfs", "webhdfs"}
_EXTRAS = {"s3": "s3", "s3a": "s3", "gs": "gs", "gcs": "gs", "hf": "hf"}
# What another try does not mend.
_FINAL = (FileNotFoundError, PermissionError, IsADirectoryError, NotADirectoryError)


class Unreachable(SnapshotError):
    """A place elsewhere did not answer, or refused, however often it was asked."""


class Files:
    """A directory elsewhere.

    Args:
        url: such as "s3://bucket/runs/a".
        options: what fsspec passes to the file system, such as credentials.
        tries: how often an operation is tried.
        pause: seconds before the second try; twice as many before each further one.
        halted: set when the caller gives up: no further try, and no further file.

    Raises:
        ConfigError: fsspec does not know such a url, or the options.
        MissingExtra: fsspec, or what it needs for the url, is not installed.
    """

    def __init__(
        self,
        url: str,
        options: Mapping[str, Any],
        *,
        tries: int,
        pause: float,
        halted: threading.Event | None = None,
    ) -> None:
        self.url = url.rstrip("/")
        self._tries, self._pause = tries, pause
        self.halted = threading.Event() if halted is None else halted
        self._system, root = _opened(url, options)
        self._root = root.rstrip("/")

    # --- reading ------------------------------------------------------------------------------------------------------

    def sizes(self, under: str = "") -> dict[str, int]:
        """Return the size of every file below a directory, by its name from there; nothing where it is missing."""
        top = self._path(under) if under else self._root

        def find() -> dict[str, int]:
            self._system.invalidate_cache()  # others may have written since
            with contextlib.suppress(FileNotFoundError):
                found = self._system.find(top, detail=True)
                return {path[len(top) :].lstrip("/"): int(info.get("size") or 0) for path, info in found.items()}
            return {}

        return self._tried("list", under, find)

    def read(self, name: str) -> bytes | None:
        """Return the content of a small file, None where there is none."""
        with contextlib.suppress(FileNotFoundError):
            return bytes(self._tried("read", name, lambda: self._system.cat_file(self._path(name))))
        return None

    def get(self, name: str, target: Path) -> None:
        """Copy a file from there to a path whose directory exists.

        Raises:
            FileNotFoundError: it is not there.
        """
        self._tried("read", name, lambda: self._system.get_file(self._path(name), str(target)))

    # --- writing ------------------------------------------------------------------------------------------------------

    def put(self, name: str, source: Path) -> None:
        """Copy a file to there.

        Raises:
            FileNotFoundError: there is no such source.
        """

        def put() -> None:
            self._make_directory(name)
            self._system.put_file(str(source), self._path(name))

        self._tried("write", name, put)

    def write(self, name: str, content: bytes) -> None:
        """Write a small file."""

        def write() -> None:
            self._make_directory(name)
            self._system.pipe_file(self._path(name), content)

        self._tried("write", name, write)

    def remove(self, name: str) -> None:
        """Remove a file; one that is not there is no error."""
        with contextlib.suppress(FileNotFoundError):
            self._tried("remove", name, lambda: self._system.rm_file(self._path(name)))

    def remove_all(self, directory: str) -> None:
        """Remove a directory and everything below it."""
        with contextlib.suppress(FileNotFoundError):
            self._tried("remove", directory, lambda: self._system.rm(self._path(directory), recursive=True))

    def each(self, work: Callable[[str], None], names: Iterable[str]) -> None:
        """Do something with several files, a few at a time; the first error ends it."""
        with ThreadPoolExecutor(_THREADS, thread_name_prefix="purestep-remote") as pool:
            futures = [pool.submit(work, name) for name in names]
            try:
                for future in futures:
                    future.result()
            except BaseException:
                pool.shutdown(wait=True, cancel_futures=True)
                raise

    # --- patience -----------------------------------------------------------------------------------------------------

    def _tried(self, verb: str, name: str, work: Callable[[], T]) -> T:
        pause = self._pause
        for left in reversed(range(self._tries)):
            if self.halted.is_set():
                raise Unreachable(self._failed(verb, name, "the run has ended meanwhile"))
            try:
                return work()
            except FileNotFoundError:
                raise
            # Each file system has errors of its own: of its HTTP client, of its service, of its caches.
            except Exception as error:
                if not left or isinstance(error, _FINAL):
                    said = str(error).partition("\n")[0][:300]
                    raise Unreachable(self._failed(verb, name, f"{type(error).__name__}: {said}")) from error
                self.halted.wait(pause)
                pause = min(2 * pause, _LONGEST_PAUSE)
        raise Unreachable(self._failed(verb, name, "it was not tried"))

    def _failed(self, verb: str, name: str, why: str) -> str:
        return explain(
            f"the remote copy cannot be used: {verb} failed", where=f"{self.url}/{name}".rstrip("/"), why=why
        )

    def _path(self, name: str) -> str:
        return f"{self._root}/{name}"

    def _make_directory(self, name: str) -> None:
        protocol = self._system.protocol
        names = {protocol} if isinstance(protocol, str) else set(protocol)
        if names & _WITH_DIRECTORIES:
            self._system.makedirs(self._path(name).rpartition("/")[0], exist_ok=True)


def _opened(url: str, options: Mapping[str, Any]) -> tuple[Any, str]:
    protocol = url.partition("://")[0]
    fsspec = import_extra("fsspec.core", extra="remote", needed_by=f"Remote({url!r})")
    try:
        return fsspec.url_to_fs(url, **options)
    except ImportError as error:
        name = {"s3": "s3fs", "gs": "gcsfs", "hf": "huggingface_hub"}.get(_EXTRAS.get(protocol, ""), "")
        if not name:
            raise ConfigError(explain(f"fsspec cannot open {protocol}://", where=url, why=str(error))) from error
        import_extra(name, extra=_EXTRAS[protocol], needed_by=f"Remote({url!r})")
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(
            explain(
                "fsspec cannot open this url",
                where=url,
                why=str(error).partition("\n")[0],
                instead='"s3://bucket/runs/a", "gs://bucket/runs/a", "hf://datasets/me/runs/a" or "file:///disk/runs/a"\n'
                "and in storage_options= what its file system takes",
            )
        ) from error
