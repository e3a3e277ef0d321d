"""The bytes that tensors of this thread hold: every storage from its birth to its death, and the most at one time."""

from __future__ import annotations

import weakref

import torch

import purestep as ps
from purestep import _torch


class Storages(_torch.Watcher):
    """Watch what operators return, on top of the tensors of a tree."""

    def __init__(self, *given):
        super().__init__()
        self.alive, self.now, self.most = {}, 0, 0
        for leaf in ps.tree.leaves(given):
            if isinstance(leaf, torch.Tensor):
                self.born(leaf.untyped_storage())

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        for leaf in ps.tree.leaves(out):
            if isinstance(leaf, torch.Tensor):
                self.born(leaf.untyped_storage())
        return out

    def born(self, storage):
        key, size = storage._cdata, storage.nbytes()
        if key in self.alive or not size:
            return
        self.alive[key] = weakref.ref(storage, lambda _: self.died(key, size))
        self.now += size
        self.most = max(self.most, self.now)

    def died(self, key, size):
        del self.alive[key]
        self.now -= size
