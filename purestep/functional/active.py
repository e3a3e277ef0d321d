"""The bindings that are active in this thread, for recomputations: a checkpoint calls its module again in the backward
pass, under the tensors and the keys of the forward pass.

Owns the stack of active bindings, the list in which a gradient collects those of its forward pass, and `checkpoint`.
While a binding is active, torch's own checkpoints recompute in the same way (`recompute.Redirection`).
"""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from typing import Any, Protocol

from purestep.arguments import checked
from purestep.errors import StepError
from purestep.recompute import Contexts, Redirection


class Active(Protocol):
    """What is asked of a binding."""

    held: bool

    def let_go(self) -> None:
        """Put back what was in the places of tensors that were held for the backward pass."""

    def repeating(self) -> Callable[[], Any]:
        """Return what makes the binding of a recomputation of what comes next."""


class Here(threading.local):
    """What is active in this thread.

    Attributes:
        active: the active bindings, the innermost last.
        scope: collects the bindings of a forward pass that is differentiated; None outside of one.
    """

    def __init__(self) -> None:
        self.active: list[Active] = []
        self.scope: list[Any] | None = None


here = Here()


def push(bound: Active) -> None:
    """Note that a binding is active, the innermost one."""
    here.active.append(bound)
    _redirection.enter()


def pop(bound: Active) -> None:
    """Note that a binding is active no more, if it is the innermost one."""
    active = here.active
    if active and active[-1] is bound:
        active.pop()
        _redirection.leave()


def stack() -> list[Active]:
    """Return the active bindings of this thread, the innermost last."""
    return here.active


@checked(StepError, failed=True)
def checkpoint(function: Callable[..., Any], *args: object, **kwargs: Any) -> Any:
    """Run a function without storing its activations; the backward pass recomputes them (activation checkpointing).

    It is `torch.utils.checkpoint.checkpoint(..., use_reentrant=False)`. Inside a pure call that one, its reentrant form
    and `checkpoint_sequential` recompute as this does: dropout and other randomness is drawn from the same keys again,
    and the module sees the same bound parameters.

    Args:
        function: a module or function of tensors, called inside a pure call of a model.
        *args, **kwargs: its arguments.

    Returns:
        What the function returns.

    Examples:
        >>> import torch
        >>> from torch import nn
        >>> from purestep import random
        >>> from purestep.functional import apply
        >>> block = nn.Sequential(nn.Linear(4, 4), nn.Dropout(0.5))
        >>> class Net(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.block = block
        ...     def forward(self, x):
        ...         return checkpoint(self.block, x)
        >>> net = Net()
        >>> y, _ = apply(net, dict(net.named_parameters()), {}, torch.ones(2, 4), rng=random.key(0))
        >>> y.shape
        torch.Size([2, 4])
    """
    from torch.utils.checkpoint import checkpoint as torch_checkpoint

    return torch_checkpoint(function, *args, use_reentrant=False, preserve_rng_state=False, **kwargs)


def _recomputation() -> Contexts | None:
    """Return what makes the context in which what runs now can run again; None outside of pure calls."""
    repeating = [bound.repeating() for bound in here.active]
    return (lambda: _Entered([again() for again in repeating])) if repeating else None


class _Entered(contextlib.ExitStack):
    """Several contexts, which are entered together."""

    def __init__(self, contexts: list[Any]) -> None:
        super().__init__()
        self.contexts = contexts

    def __enter__(self) -> Any:
        try:
            for context in self.contexts:
                self.enter_context(context)
        except BaseException:
            self.close()
            raise
        return self


_redirection = Redirection(_recomputation)
