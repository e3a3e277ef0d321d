"""What a step has to know of the torch.func transforms around it: whether one is active, and not to cut its gradients.

Outside of transforms nothing that a step returns is part of a graph. Inside of one (`grad`, `jvp`, `vmap`), metrics,
buffers and the new state stay differentiable, because to differentiate through training is what the caller asks for.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
from torch import Tensor

from purestep import _torch


def active() -> bool:
    """Tell whether this runs inside a torch.func transform.

    Examples:
        >>> active(), torch.vmap(lambda x: x + active())(torch.zeros(1)).item()
        (False, 1.0)
    """
    return _torch.transform_level() is not None


def detached(value: Tensor) -> Tensor:
    """Return a tensor outside of any graph, or as it is inside a transform: there, `detach` would cut every gradient.

    Examples:
        >>> from torch.func import grad
        >>> grad(lambda x: detached(3 * x))(torch.tensor(1.0)), grad(lambda x: (3 * x).detach())(torch.tensor(1.0))
        (tensor(3.), tensor(0.))
    """
    return value.detach() if _torch.transform_level() is None else value


def unrecorded() -> contextlib.AbstractContextManager[Any]:
    """Return `torch.no_grad()`, or a context that does nothing inside a transform, which `no_grad` would cut too."""
    return _NOTHING if _torch.transform_level() is not None else _Recording(False)


def recorded() -> contextlib.AbstractContextManager[Any]:
    """Return `torch.enable_grad()`."""
    return _Recording(True)


class _Recording:
    """`torch.no_grad` and `torch.enable_grad` as contexts only, without what makes them decorators: half the time."""

    __slots__ = ("_before", "_on")

    def __init__(self, on: bool) -> None:
        self._on = on

    def __enter__(self) -> None:
        self._before = torch.is_grad_enabled()
        _torch.set_grad_enabled(self._on)

    def __exit__(self, *error: object) -> None:
        _torch.set_grad_enabled(self._before)


_NOTHING = contextlib.nullcontext()
