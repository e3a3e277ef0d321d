"""Activation checkpoints of torch inside a pure call, so that third-party models may have them.

Torch recomputes without the modes and bindings of the forward pass, its reentrant form not at all where gradients are
asked for by name. Models hold `torch.utils.checkpoint.checkpoint` by any name; it looks up what it is made of in its
own module, so that is where a pure call puts other functions, and takes them out again when it ends. On threads without
a pure call they do what torch's do. `functional` enters it, and says what a recomputation runs in.
"""

from __future__ import annotations

import contextlib
import dataclasses
import sys
import threading
from collections.abc import Callable, Iterator
from typing import Any

from torch.utils import checkpoint as torch_checkpoint

from purestep import _torch, transforms

Contexts = Callable[[], contextlib.AbstractContextManager[Any]]

_reentrant = torch_checkpoint.CheckpointFunction
_generator = _torch.checkpoint_generator
_OWN = {"CheckpointFunction": _reentrant, _torch.CHECKPOINT_GENERATOR: _generator}

_local = threading.local()


def recomputing() -> bool:
    """Tell whether this thread runs a function again in the backward pass."""
    return getattr(_local, "depth", 0) > 0


@dataclasses.dataclass(frozen=True)
class _Recomputed:
    """A function as it is called in the backward pass."""

    function: Callable[..., Any]
    contexts: Contexts

    def __call__(self, *args: object, **kwargs: object) -> object:
        _local.depth = getattr(_local, "depth", 0) + 1
        try:
            with self.contexts():
                return self.function(*args, **kwargs)
        finally:
            _local.depth -= 1


def _stored() -> Iterator[None]:
    """Checkpoint nothing: transforms of torch.func have no hooks of saved tensors, and the values are the same."""
    yield


class Redirection:
    """Checkpoints of torch, from `enter` to `leave`, recompute in what `capture` returns.

    Args:
        capture: called in the forward pass. Returns what makes the context that a recomputation runs in, or None where
            this thread is in no pure call.
    """

    def __init__(self, capture: Callable[[], Contexts | None]) -> None:
        class Reentrant(_reentrant):
            """In place of the form that calls `backward` inside of the backward pass, and so fills `grad` fields."""

            @classmethod
            def apply(cls, function: Callable[..., Any], preserve: bool, *args: object) -> object:
                if capture() is None:
                    return _reentrant.apply(function, preserve, *args)
                return torch_checkpoint.checkpoint(function, *args, use_reentrant=False)

        self.capture = capture
        self.made: dict[str, Any] = {"CheckpointFunction": Reentrant, _torch.CHECKPOINT_GENERATOR: self._generate}
        self.lock = threading.Lock()
        self.entered = 0
        self.replaced: dict[tuple[str, str], Any] = {}

    def _generate(self, function: Callable[..., Any], *args: object, **kwargs: object) -> Iterator[None]:
        contexts = self.capture()
        if contexts is None:
            return _generator(function, *args, **kwargs)
        if transforms.active():
            return _stored()
        # There is no state of generators to go back to: keys say what is drawn, and the contexts have them.
        if _torch.CHECKPOINT_PACKED:
            return _generator(_Recomputed(function, contexts), *args, **{**kwargs, "preserve_rng_state": False})
        return _generator(_Recomputed(function, contexts), False, *args[1:], **kwargs)

    def enter(self) -> None:
        """Put the functions in place, unless a call has that is under way; it may be one of another thread."""
        with self.lock:
            self.entered += 1
            if self.entered > 1:
                return
            for module, names in _torch.CHECKPOINT_PLACES:
                if module in sys.modules:
                    place = sys.modules[module].__dict__
                    for name in names:
                        if name in place:
                            self.replaced[module, name] = place[name]
                            place[name] = self.made[name]

    def leave(self) -> None:
        """Put back what was there, once no call is under way."""
        with self.lock:
            self.entered -= 1
            if self.entered:
                return
            for module, names in _torch.CHECKPOINT_PLACES:
                if module in sys.modules:
                    place = sys.modules[module].__dict__
                    for name in names:
                        # A module that was imported meanwhile took the function that it found.
                        if place.get(name) is self.made[name]:
                            place[name] = self.replaced.get((module, name), _OWN[name])
            self.replaced.clear()
