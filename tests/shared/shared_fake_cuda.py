"""Steps on fake CUDA tensors, which have shapes and devices and no memory: what a card would be asked to do, counted
without one.

Needs a build of torch with CUDA, not a card. Autograd's engine wants a card for the backward pass, so gradients are
nothing of the right shape, and launches of the backward pass are not counted. All else of a step is what a GPU would be
asked for: purestep is told that no mode watches, so that it takes the paths of eager mode.
"""

from __future__ import annotations

import collections
import contextlib
import dataclasses
import functools
import traceback
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

import purestep as ps
from purestep import _torch, grad
from purestep.random import card, card_dropout, keys
from purestep.random.host_draws import unguarded

needs_cuda_build = pytest.mark.skipif(
    not torch.backends.cuda.is_built(),
    reason=f"torch {torch.__version__} is built without CUDA; `make test-device` makes an environment with it, no card",
)
PACKAGE = str(Path(ps.__file__).parent)
# Operators that launch nothing: they make another view, or memory that nothing is written into.
_VIEWS = {
    *("view", "_unsafe_view", "reshape", "expand", "transpose", "t", "slice", "select", "unsqueeze", "squeeze"),
    *("permute", "alias", "detach", "as_strided", "split", "split_with_sizes", "unbind", "narrow", "unfold"),
    *("set_", "empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided", "view_as_real", "lift_fresh"),
    *(
        "device",
        "diagonal",
        "chunk",
        "is_same_size",
        "_reshape_alias",
        "unflatten",
        "flatten",
        "view_as_complex",
        "real",
    ),
}
_ALLOWED = "c10d"  # collectives are counted apart: their transfers are not launches of ours


@dataclasses.dataclass
class Counts:
    """What a step asks of the card.

    Attributes:
        launches: operators on CUDA tensors that run a kernel, by name.
        blocking: copies between host and card for which the host waits, by operator and line.
        collectives: operators of `torch.distributed`, by name.
    """

    launches: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    blocking: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)
    collectives: collections.Counter[str] = dataclasses.field(default_factory=collections.Counter)

    @property
    def total(self) -> int:
        """Number of launches."""
        return self.launches.total()


class _Count(TorchDispatchMode):
    def __init__(self, counts: Counts) -> None:
        super().__init__()
        self.counts = counts

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        out = func(*args, **kwargs)
        name, space = func.overloadpacket.__name__, func.namespace
        given = {x.device.type for x in ps.tree.leaves((args, kwargs)) if isinstance(x, torch.Tensor)}
        made = {x.device.type for x in ps.tree.leaves(out) if isinstance(x, torch.Tensor)}
        if space in (_ALLOWED, "_c10d_functional"):
            self.counts.collectives[name] += 1
        elif "copy" in name and {"cpu", "cuda"} <= given | made:
            if not kwargs.get("non_blocking") and not (name == "copy_" and len(args) > 2 and args[2]):
                self.counts.blocking[f"{name} at {_line()}"] += 1
            self.counts.launches[name] += _kernels(name, args)
        elif "cuda" in given | made and name not in _VIEWS:
            self.counts.launches[name] += _kernels(name, args)
        return out


def _kernels(name: str, args: Any) -> int:
    """Return how many kernels an operator launches: one over lists runs tensor by tensor where they are not alike."""
    lists = [x for x in args if isinstance(x, (list, tuple)) and x and isinstance(x[0], torch.Tensor)]
    if not name.startswith("_foreach_") or not lists:
        return 1
    copies = "copy" in name  # may convert, from one dtype to one other
    dtypes = [{x.dtype for x in xs} for xs in lists]
    alike = all(len(own) == 1 for own in dtypes) and (copies or len(set.union(*dtypes)) == 1)
    places = [{(x.shape, x.stride()) for x in xs} for xs in zip(*lists, strict=True)]
    most = (110, 64, 48, 36)[len(lists) - 1]  # tensors whose addresses fit into the arguments of a kernel
    return -(-len(lists[0]) // most) if alike and all(len(found) == 1 for found in places) else len(lists[0])


def _line() -> str:
    """The line of purestep that is nearest."""
    frames = [f for f in traceback.extract_stack() if f.filename.startswith(PACKAGE)]
    return f"{frames[-1].filename.removeprefix(PACKAGE)}:{frames[-1].lineno}" if frames else "?"


@contextlib.contextmanager
def fake_cuda() -> Iterator[None]:
    """Let tensors of a `with` block be fake, and backward passes give zeros."""
    # The guards of the host's generators compare values, and fake tensors of a process group draw some.
    with pytest.MonkeyPatch.context() as patch, unguarded(), _mode():
        patch.setattr(grad, "_gradient", lambda value, one, inputs: [torch.empty_like(x) for x in inputs])
        patch.setattr(_torch, "dispatch_modes", lambda: 0)
        patch.setattr(keys, "_on_host", _real(keys._on_host))  # keys of the host have values
        patch.setattr(card, "is_capturing", lambda: False)
        patch.setattr(card_dropout, "_generator", lambda device: _GENERATOR)
        patch.setattr(torch.UntypedStorage, "data_ptr", lambda storage: storage._cdata)  # memory that is not there
        yield


_GENERATOR = torch.Generator()  # in place of that of a card, which is not there


def _real(function: Any) -> Any:
    def called(*args: Any) -> Any:
        with _torch.disable_current_modes():
            return function(*args)

    return called


@functools.cache
def _mode() -> Any:
    """One for the process: what is cached on the card under it is used again under it."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    return FakeTensorMode(allow_non_fake_inputs=True)


@contextlib.contextmanager
def counting() -> Iterator[Counts]:
    """Count what is asked of the card in a `with` block, inside of `fake_cuda`."""
    counts = Counts()
    with _Count(counts):
        yield counts


def on_cuda(value: Any) -> Any:
    """Return a tree with fake CUDA tensors in place of real ones."""
    return ps.tree.map(lambda x: torch.empty_like(x, device="cuda") if isinstance(x, torch.Tensor) else x, value)


def elsewhere(value: Any) -> dict[str, str]:
    """Return the leaves of a tree that are not on the card."""
    leaves = zip(ps.tree.paths(value), ps.tree.leaves(value), strict=True)
    return {p: str(x.device) for p, x in leaves if isinstance(x, torch.Tensor) and x.device.type != "cuda"}


def counted(function: Any, state: Any, batch: Any) -> tuple[Counts, Any]:
    """Call a function of state and batch on fake CUDA tensors twice, and count the second call.

    Tensors of two devices in one operator are an error of the fake tensors, as on a card; so is reading a value.
    """
    with fake_cuda():
        given = on_cuda(state), on_cuda(batch)
        function(*given)  # what is copied to a card once, and kept there
        with counting() as counts:
            out = function(*given)
        return counts, out
