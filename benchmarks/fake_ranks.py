"""A job of any number of ranks that are only pretended: one process is rank 0, and what it sends goes nowhere.

Values are wrong, and tensors may have no memory either; what is true is what a rank asks for: operators, collectives
with their bytes, and the memory that its tensors would take. For measurements only: what ranks agree on before their
first step is taken as agreed.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import weakref
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import purestep as ps
from purestep import _torch
from purestep.distributed import collectives, control, mesh
from purestep.parallel import absent, fsdp_units, same_inputs
from purestep.random import keys
from purestep.random.host_draws import unguarded
from purestep.sharding import placement
from purestep.state import TrainState

# Operators that compute nothing: they make another view, or memory that nothing is written into.
_VIEWS = frozenset(
    "view _unsafe_view reshape expand transpose t slice select unsqueeze squeeze permute alias detach as_strided split "
    "split_with_sizes unbind narrow unfold empty empty_like empty_strided new_empty new_empty_strided diagonal chunk "
    "_reshape_alias unflatten flatten lift_fresh is_same_size".split()
)


@contextlib.contextmanager
def job(world: int) -> Iterator[None]:
    """Let this process be rank 0 of a job of `world` ranks in a `with` block."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    dist.init_process_group("fake", rank=0, world_size=world, store=FakeStore())
    try:
        with patch.object(control, "gather", lambda value, **_: [value] * world):
            yield
    finally:
        dist.destroy_process_group()
        mesh._cache.clear()


@contextlib.contextmanager
def fake_tensors() -> Iterator[None]:
    """Let the tensors that a `with` block makes have shapes and no memory, and let purestep compute with them."""
    from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode

    def stand_in(name: str, shape: Any, like: Tensor, plan: Any) -> Tensor:
        return torch.empty(shape, dtype=like.dtype, device=like.device)

    on_host = keys._on_host

    def real(*given: Any) -> Any:  # keys of the host have values
        with _torch.disable_current_modes():
            return on_host(*given)

    with (
        patch.object(absent.Absent, "of", stand_in),
        patch.object(collectives, "numbers", lambda number, group, device: [number] * collectives.size_of(group)),
        patch.object(_torch, "dispatch_modes", lambda: 0),
        patch.object(keys, "_on_host", real),
        # What ranks tell of their batches: the same of all.
        patch.object(FakeTensor, "tolist", lambda tensor: np.zeros(tensor.shape, int).tolist()),
        patch.object(torch.UntypedStorage, "data_ptr", lambda storage: 64 * storage._cdata),
        unguarded(),
        FakeTensorMode(allow_non_fake_inputs=True),
    ):
        yield


def faked(split: Any) -> Any:
    """Return what this rank holds of a placed state on the meta device, as fake tensors; inside of `fake_tensors`."""
    made = ps.tree.map(
        lambda x: torch.empty_like(x, device="cpu") if isinstance(x, Tensor) else x, placement.local(split)
    )
    return placement.rewrap(made, split)


def agreed(plan: Any, count: int) -> None:
    """Let the ranks have compared the first call of a step."""
    same_inputs._once(dist.group.WORLD, plan, count).done = True


@dataclasses.dataclass
class Asked:
    """What a rank asks for.

    Attributes:
        launches: operators that compute, by name.
        collectives: calls of `torch.distributed`, by name.
        sent: bytes that leave this rank, by collective. A ring is assumed for sums: 2 (R - 1) / R of the bytes.
        live: bytes of memory that are held now.
        peak: most bytes that were held at once, until the update begins: that of a donated state is in place, which
            tensors without memory do not show.
    """

    launches: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    collectives: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    sent: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    live: int = 0
    peak: int = 0


class _Watch(TorchDispatchMode):
    def __init__(self, asked: Asked) -> None:
        super().__init__()
        self.asked = asked
        self.known: set[int] = set()
        self.updates = False  # whether the update has begun

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        name = func.overloadpacket.__name__
        if func.namespace in ("c10d", "_c10d_functional"):
            if name not in ("wait_tensor", "barrier"):
                self.asked.collectives[name] += 1
                self.asked.sent[name] += _bytes_sent(name, args)
        elif name not in _VIEWS:
            self.asked.launches[name] += 1
        for leaf in ps.tree.leaves(out):
            if isinstance(leaf, Tensor):
                self.hold(leaf)
        return out

    def hold(self, tensor: Tensor) -> None:
        """Count the memory of a tensor, once, until it is freed."""
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.known or tensor.device.type == "meta":
            return
        self.known.add(key)
        self.asked.live += size
        if not self.updates:
            self.asked.peak = max(self.asked.peak, self.asked.live)
        weakref.finalize(storage, self.free, key, size)

    def free(self, key: int, size: int) -> None:
        """Count the memory of a storage no more."""
        if key in self.known:
            self.known.remove(key)
            self.asked.live -= size

    def updating(self, apply: Any) -> Any:
        """Return what begins the update, and tells of it."""

        def called(*args: Any, **kwargs: Any) -> Any:
            self.updates = True
            return apply(*args, **kwargs)

        return called

    def releasing(self, release: Any) -> Any:
        """Return what frees a unit's parameters, and counts them as freed.

        It swaps the memory below tensors that autograd knows (`tensor.data = other`); a fake tensor keeps the old one.
        """

        def called(live: Any) -> None:
            storage = None if live.flat is None else live.flat.untyped_storage()
            release(live)
            if storage is not None:
                self.free(storage._cdata, storage.nbytes())

        return called


@contextlib.contextmanager
def watching(*held: Any) -> Iterator[Asked]:
    """Count what is asked for in a `with` block; the memory of `held` counts from the start."""
    asked = Asked()
    watch = _Watch(asked)
    for value in held:
        for leaf in ps.tree.leaves(placement.local(value)):
            if isinstance(leaf, Tensor):
                watch.hold(leaf)
    with (
        watch,
        patch.object(fsdp_units.Live, "release", watch.releasing(fsdp_units.Live.release)),
        patch.object(TrainState, "apply_gradients", watch.updating(TrainState.apply_gradients)),
    ):
        yield asked


def _bytes_sent(name: str, args: Any) -> int:
    given = [x for x in ps.tree.leaves(args) if isinstance(x, Tensor)]
    ranks = _ranks_of(args)
    if not given or ranks == 1:
        return 0
    # c10d takes what is received first, where that is another tensor; the functional ones take what is sent.
    sizes = [x.numel() * x.element_size() for x in given]
    small, large = min(sizes), max(sizes)
    if "all_gather" in name or "allgather" in name:
        return (ranks - 1) * small
    if "all_reduce" in name or "allreduce" in name:
        return 2 * (ranks - 1) * large // ranks
    if "reduce_scatter" in name or "alltoall" in name or "all_to_all" in name:
        return (ranks - 1) * large // ranks
    return 0 if "recv" in name else sizes[0]


def _ranks_of(args: Any) -> int:
    for value in ps.tree.leaves(args):
        if isinstance(value, str):
            with contextlib.suppress(Exception):
                return dist.get_world_size(_torch_group(value))
        if isinstance(value, torch.ScriptObject):
            with contextlib.suppress(Exception):
                return int(dist.ProcessGroup.unbox(value).size())
    return 1


def _torch_group(name: str) -> Any:
    from torch.distributed.distributed_c10d import _resolve_process_group

    return _resolve_process_group(name)
