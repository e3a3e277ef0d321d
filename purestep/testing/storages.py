"""The bytes that tensors of this thread hold: `Storages` sees every storage from its birth to its death.

Tests and benchmarks compare it with what `ps.step_memory` predicts. Workspace of kernels and what an allocator keeps
are not in it. `step_memory` has a counter of its own, which this one checks.
"""

from __future__ import annotations

import weakref
from collections.abc import Callable
from typing import Any

import torch

from purestep import _torch, tree


class Storages(_torch.Watcher):
    """Counts the storages of what operators return, on top of those of the trees that it is given.

    Attributes:
        now: bytes at this time.
        most: bytes at the time at which most were there; set it to `now` to begin anew.
    """

    def __init__(self, *given: object) -> None:
        super().__init__()
        self.alive: dict[int, weakref.ref[Any]] = {}
        self.now = self.most = 0
        self._count(given)

    def __torch_dispatch__(
        self, func: Callable[..., Any], kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        out = func(*args, **(kwargs or {}))
        self._count(out)
        return out

    def _count(self, values: object) -> None:
        for leaf in tree.leaves(values):
            if isinstance(leaf, torch.Tensor):
                self._born(leaf.untyped_storage())

    def _born(self, storage: torch.UntypedStorage) -> None:
        key, size = _torch.storage_id(storage), storage.nbytes()
        if key in self.alive or not size:
            return
        self.alive[key] = weakref.ref(storage, lambda _: self._died(key, size))
        self.now += size
        self.most = max(self.most, self.now)

    def _died(self, key: int, size: int) -> None:
        del self.alive[key]
        self.now -= size
