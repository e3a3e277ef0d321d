"""`bind` and `apply`: the public forms of a pure call, with their arguments checked."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn

from purestep.arguments import checked
from purestep.errors import StepError, explain
from purestep.functional.binding import Binding, Tensors
from purestep.module_tensors import Definition
from purestep.random.torch_mode import Handler, Key


@checked(StepError, failed=True)
class bind(Binding):
    """Put tensors in the places of a module's parameters and buffers for the duration of a `with` block.

    Inside the block the module itself is the bound model: its `forward`, other methods and attributes all see the given
    tensors, and all randomness of torch comes from the key. On leaving, everything is put back, whatever happened.

    Args:
        module: any module. It is not changed: flags, tensors and hooks are as before afterwards.
        params: tensors by parameter name, as `named_parameters` has them (a tied one once, under its first name).
        buffers: tensors by buffer name; parameters that are not trained may be among them. Buffers are cloned first.
        rng: int64[2] key of everything random, or a function that makes it if it is needed; or None: then random
            operations raise RandomnessError.
        train: True runs in training mode (as `module.train()` would set it; if the module is in training mode already,
            the flags of its submodules are respected, so a frozen BatchNorm stays frozen). False runs in evaluation
            mode.
        around: makes a context that is entered in the block, and in every recomputation of it (hooks of a precision
            policy).
        handlers: a table of functions of torch that run otherwise in the block (see `KeyedRandom`); those that draw by
            default.

    Attributes:
        new_buffers: after the block, the buffers as the call left them, by name.

    Raises:
        StepError: a name is missing or unknown; or, on leaving, the model has written into a parameter.

    Examples:
        >>> import torch
        >>> model = nn.BatchNorm1d(2)
        >>> params, buffers = dict(model.named_parameters()), dict(model.named_buffers())
        >>> with bind(model, params, buffers) as net:
        ...     y = net(torch.ones(4, 2))
        >>> int(buffers["num_batches_tracked"]), int(net.num_batches_tracked)
        (0, 0)
    """

    def __init__(
        self,
        module: nn.Module | Definition,
        params: Tensors,
        buffers: Tensors | None = None,
        *,
        rng: Key = None,
        train: bool = True,
        around: Callable[[], contextlib.AbstractContextManager[Any]] | None = None,
        handlers: Mapping[Any, Handler] | None = None,
    ) -> None:
        _check_options(train, around, handlers)
        super().__init__(module, params, buffers, rng=rng, train=train, around=around, handlers=handlers)


def _check_options(train: object, around: object, handlers: object) -> None:
    """Refuse options of `bind` of another type: at every call, so by hand."""
    fine = isinstance(train, bool) and (around is None or callable(around))
    if not fine or not (handlers is None or isinstance(handlers, Mapping)):
        what = "train= is True or False, around= a function that makes a context, handlers= a table of functions"
        raise StepError(explain(what, where=f"train={train!r}, around={around!r}, handlers={handlers!r:.80}"))


@checked(StepError, failed=True)
def apply(
    module: nn.Module | Definition,
    params: Tensors,
    buffers: Tensors | None = None,
    *args: object,
    rng: Tensor | None = None,
    train: bool = True,
    **kwargs: object,
) -> tuple[Any, dict[str, Tensor]]:
    """Call a module as a pure function of its parameters, buffers and inputs.

    Args:
        module: any module, which is not changed; or the definition that a state carries, as `state.model`.
        params: tensors by parameter name.
        buffers: tensors by buffer name; they are not changed either.
        *args, **kwargs: what `module.forward` takes.
        rng: int64[2] key of dropout and all other randomness of the call.
        train: training or evaluation mode, see `bind`.

    Returns:
        What the module returns, and the buffers after the call.

    Raises:
        StepError: the names of the tensors do not fit the module.
        RandomnessError: the module draws random numbers and `rng` is None.

    Examples:
        >>> import torch
        >>> model = nn.Linear(3, 2)
        >>> y, buffers = apply(model, dict(model.named_parameters()), {}, torch.ones(4, 3))
        >>> y.shape, buffers
        (torch.Size([4, 2]), {})
    """
    bound = bind(module, params, buffers, rng=rng, train=train)
    out = bound.run(lambda net: net(*args, **kwargs))
    return out, bound.new_buffers
