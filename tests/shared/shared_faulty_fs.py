"""A file system of fsspec in memory that breaks as told: at a certain write, for a while, in the middle of a file."""

from __future__ import annotations

import threading
from typing import ClassVar

import fsspec
from fsspec.implementations.memory import MemoryFileSystem


class Broken(OSError):
    """What it raises."""


class Faulty(MemoryFileSystem):
    protocol = "faulty"
    store: ClassVar[dict] = {}  # of its own, beside the one of memory://
    pseudo_dirs: ClassVar[list] = [""]
    lock = threading.Lock()
    writes = 0  # operations that changed something
    breaks_at: int | None = None  # the number of the write at which it breaks, for good
    failures: ClassVar[list[Exception]] = []  # raised by the next operations, one each
    refuses: Exception | None = None  # raised by every operation
    waits: threading.Event | None = None  # each write waits for it

    @classmethod
    def _strip_protocol(cls, path):
        return super()._strip_protocol(path.replace("faulty://", "memory://"))

    @classmethod
    def reset(cls):
        cls.store.clear()
        cls.pseudo_dirs[:] = [""]
        cls.mend()
        cls.writes = 0

    @classmethod
    def mend(cls):
        cls.breaks_at, cls.refuses, cls.waits = None, None, None
        cls.failures.clear()

    @classmethod
    def _asked(cls):
        if cls.failures:
            raise cls.failures.pop(0)
        if cls.refuses is not None:
            raise cls.refuses

    @classmethod
    def _written(cls):
        """Whether this write arrives."""
        cls._asked()
        if cls.waits is not None:
            cls.waits.wait(20)
        with cls.lock:
            cls.writes += 1
            return cls.breaks_at is None or cls.writes < cls.breaks_at

    def find(self, path, **options):
        self._asked()
        return super().find(path, **options)

    def cat_file(self, path, **options):
        self._asked()
        return super().cat_file(path, **options)

    def get_file(self, rpath, lpath, **options):
        self._asked()
        return super().get_file(rpath, lpath, **options)

    def put_file(self, lpath, rpath, **options):
        arrives = self._written()
        with open(lpath, "rb") as file:
            content = file.read()
        super().pipe_file(rpath, content if arrives else content[: len(content) // 2])
        if not arrives:
            raise Broken(f"{rpath} broke off")

    def pipe_file(self, path, value, **options):
        arrives = self._written()
        super().pipe_file(path, value if arrives else value[: len(value) // 2])
        if not arrives:
            raise Broken(f"{path} broke off")

    def rm_file(self, path):
        if not self._written():
            raise Broken(f"{path} stays")
        super().rm_file(path)

    def rm(self, path, recursive=False, maxdepth=None):
        if recursive and self.exists(path) and not self._written():
            # What it removes before it breaks is any part: every second file.
            for name in sorted(super().find(path))[::2]:
                self.store.pop(name, None)
            raise Broken(f"{path} stays")
        super().rm(path, recursive=recursive, maxdepth=maxdepth)


fsspec.register_implementation("faulty", Faulty, clobber=True)
