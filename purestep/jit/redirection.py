"""One method of a class of Inductor, replaced while any thread is inside a `with` block, and restored after the last.

Inductor has no settings for what `compile_units` and `instruction_sets` change, so they replace a method for the time
of a compilation. Threads outside of the block call the original method through the replaced one.
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable, Iterator
from typing import Any, Generic, TypeVar

T = TypeVar("T")
Method = Callable[..., Any]


class Redirection(Generic[T]):
    """Replaces one method.

    Threads that compile at the same time share the change, because there is one class to change; the last one restores
    the class.

    Args:
        name: of the method. A class without it is left alone.
        instead: called by threads inside of the block, as `instead(value, original, self, *args)`.
    """

    def __init__(self, name: str, instead: Callable[..., Any]) -> None:
        self.name, self.instead = name, instead
        self.lock = threading.Lock()
        self.users = 0
        self.original: Method | None = None
        self.ours: Method | None = None
        self.here = threading.local()

    @contextlib.contextmanager
    def redirected(self, cls: type, value: T) -> Iterator[None]:
        """Change a class for the duration of a `with` block, and keep a value for this thread's calls."""
        with self.lock:
            self.users += 1
            if self.users == 1:
                self._put(cls)
        outer, self.here.value = getattr(self.here, "value", None), value
        try:
            yield
        finally:
            self.here.value = outer
            with self.lock:
                self.users -= 1
                # Code that patched it meanwhile calls our version, which calls Inductor's outside of the block.
                if self.users == 0 and self.ours is not None and vars(cls)[self.name] is self.ours:
                    setattr(cls, self.name, self.original)

    def _put(self, cls: type) -> None:
        original = self.original = vars(cls).get(self.name)
        self.ours = None
        if original is None:
            return

        def method(*args: Any) -> Any:
            value = getattr(self.here, "value", None)
            return original(*args) if value is None else self.instead(value, original, *args)

        self.ours = method
        setattr(cls, self.name, method)
