"""Gradients: `grad_and_value`, and what keeps a value out of them.

The engine is `torch.autograd.grad` over detached leaves; inside a torch.func transform it is
`torch.func.grad_and_value`, so that steps compose with vmap, jvp and grad. `microbatch` slices batches into
microbatches, and adds up the gradients of those.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from purestep import _torch, transforms, tree
from purestep.arguments import checked
from purestep.errors import ConfigError, StepError, explain
from purestep.functional import GradientScope
from purestep.random.torch_mode import undispatched

T = TypeVar("T")
Engine = Literal["auto", "autograd", "func"]
Argnums = int | tuple[int, ...]
Args = tuple[Any, ...]
Kwargs = dict[str, Any]
# What torch.autograd.grad comes to for one number: the rest of it takes as long as the backward pass of a small model.
_TENSORS, _NOTHING = {Tensor}, type(None)
_engine = _torch.run_backward
_autograd_grad = undispatched(torch.autograd.grad)


@checked(ConfigError)
def grad_and_value(
    function: Callable[..., Any],
    *,
    argnums: int | tuple[int, ...] = 0,
    has_aux: bool = False,
    engine: Engine = "auto",
    collected: bool = False,
) -> Callable[..., Any]:
    """Transform a function of pytrees into one that returns its gradient and its value.

    Args:
        function: returns a 0-d floating tensor, or `(tensor, aux)` with `has_aux`.
        argnums: which argument, or arguments, to differentiate; each a pytree of floating tensors.
        has_aux: whether the function returns a second value that is not differentiated.
        engine: "autograd" (the default outside of transforms), "func" (inside of them), or "auto".
        collected: whether hooks take the gradients on their way, so that it is no mistake when none arrives.

    Returns:
        A function of the same arguments that returns `(grads, value)`, or `(grads, (value, aux))`. A parameter that the
        value does not depend on has gradient zero. Value and aux are detached.

    Raises:
        StepError: the value is not a 0-d floating tensor, or does not depend on any argument; or a leaf is not
            floating.

    Examples:
        >>> grads, value = grad_and_value(lambda p: (p["w"] ** 2).sum())({"w": torch.tensor([1.0, 3.0])})
        >>> grads["w"].tolist(), float(value)
        ([2.0, 6.0], 10.0)
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        if _by_func(engine):
            return _func(function, argnums, has_aux, args, kwargs)
        numbers = argnums if isinstance(argnums, tuple) else (argnums,)
        leaves, structure = tree.flatten(tuple(args[n] for n in numbers))
        tracked = [_track(leaf, i, structure) for i, leaf in enumerate(leaves)]
        arguments = list(args)
        for n, argument in zip(numbers, tree.unflatten(structure, tracked), strict=True):
            arguments[n] = argument
        found, value, aux = _autograd(function, arguments, kwargs, has_aux, leaves, tracked, collected)
        result, aux = tree.unflatten(structure, found), stop_gradient(aux)
        return (result if isinstance(argnums, tuple) else result[0]), ((value, aux) if has_aux else value)

    return wrapped


def loss_gradients(
    loss_of: Callable[[Any], tuple[Tensor, T]], params: Any, engine: Engine, collected: bool
) -> tuple[Any, T]:
    """Return the gradients of a loss, and what the function returns beside it, which has to be detached already.

    It is `grad_and_value(loss_of, has_aux=True)(params)` as a step calls it every time: without a new function, and
    without walks over a flat dict of tensors.
    """
    if (
        _by_func(engine)
        or type(params) is not dict
        or set(map(type, params.values())) != _TENSORS
        or not all(map(Tensor.is_floating_point, params.values()))
    ):
        grads, (_, aux) = grad_and_value(loss_of, has_aux=True, engine=engine, collected=collected)(params)
        return grads, aux
    leaves = list(params.values())
    tracked = {name: x.detach().requires_grad_() for name, x in params.items()}
    found, _, aux = _autograd(loss_of, (tracked,), {}, True, leaves, list(tracked.values()), collected)
    return dict(zip(tracked, found, strict=True)), aux


def _by_func(engine: Engine) -> bool:
    return engine == "func" or (engine == "auto" and _torch.transform_level() is not None)


def _func(
    function: Callable[..., Any],
    argnums: Argnums,
    has_aux: bool,
    args: Args,
    kwargs: Kwargs,
) -> Any:
    # torch.func takes only tensors out of a transform; what else is in aux goes around it.
    around: list[Any] = []

    def checked(*a: Any, **k: Any) -> Any:
        out = function(*a, **k)
        value, aux = out if has_aux else (out, None)
        _check_value(value, function)
        leaves, structure = tree.flatten(aux)
        around[:] = [[None if isinstance(x, Tensor) else x for x in leaves], structure]
        return value, tuple(x for x in leaves if isinstance(x, Tensor))

    grads, (value, tensors) = torch.func.grad_and_value(checked, argnums=argnums, has_aux=True)(*args, **kwargs)
    rest = iter(tensors)
    aux = tree.unflatten(around[1], [next(rest) if x is None else x for x in around[0]])
    return grads, ((value, aux) if has_aux else value)


def _autograd(
    function: Callable[..., Any],
    args: Sequence[Any],
    kwargs: Kwargs,
    has_aux: bool,
    leaves: Sequence[Tensor],
    tracked: list[Tensor],
    collected: bool,
) -> tuple[list[Tensor], Tensor, Any]:
    """Return the gradients of the value of a function, the value, detached, and what it returns besides.

    Args:
        function, args, kwargs: what is called; among the arguments are the tensors of `tracked`.
        has_aux: whether it returns anything besides the value.
        leaves: the tensors to differentiate.
        tracked: the same, each the leaf of a graph.
        collected: see `grad_and_value`.
    """
    with GradientScope() as scope:
        with transforms.recorded():
            out = function(*args, **kwargs)
            value, aux = out if has_aux else (out, None)
            _check_value(value, function)
            if not value.requires_grad:
                raise _independent(value)
        one = torch.ones_like(value)
        with scope.backward():
            found = pulled_back([value], [one], tracked)
    grads: list[Any] = list(found)
    if _NOTHING in map(type, grads) or not grads:
        if not collected and set(map(type, grads)) <= {_NOTHING}:
            raise _independent(value)
        grads = [torch.zeros_like(t) if g is None else g for g, t in zip(grads, leaves, strict=True)]
    return grads, value.detach(), aux


def _independent(value: Tensor) -> StepError:
    return StepError(
        explain(
            "the loss does not depend on the parameters",
            where=f"loss: {tree.describe(value)}",
            why="it was computed under no_grad, detached, or with other weights than those given",
            instead="compute it from net(batch[...]), not from the module that net was made of",
        )
    )


def pulled_back(values: Sequence[Tensor], given: Sequence[Tensor], inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Run the backward pass from values whose gradients are given, and say what went wrong in checkpoints."""
    try:
        return _gradient(values, given, inputs)
    except CheckpointError as error:
        raise StepError(
            explain(
                "activations recomputed by a checkpoint differ from those of the forward pass",
                why="it runs under the same keys, parameters and buffers again, so something else it reads has changed",
                instead="self.register_buffer(...) for what a call changes, and ps.random for what it draws",
            )
        ) from error
    except RuntimeError as error:
        # What all copies of the reentrant form say, torch's own since 1.0 and those of other libraries.
        if ".grad()" not in str(error):
            raise
        raise StepError(
            explain(
                "a checkpoint that is not torch's own calls backward() inside of the backward pass",
                why="it fills the grad fields of parameters, and a pure step has none",
                instead="return ps.checkpoint(block, x)    # or torch.utils.checkpoint.checkpoint",
            )
        ) from error


def _gradient(values: Sequence[Tensor], given: Sequence[Tensor], inputs: Sequence[Tensor]) -> Sequence[Tensor | None]:
    """Run the backward pass, with the modes of the backward scope active inside."""
    if torch.compiler.is_compiling():  # Dynamo knows the function by its identity
        return torch.autograd.grad(values, inputs, given, allow_unused=True)
    if _engine is None:
        return _autograd_grad(values, inputs, given, allow_unused=True)
    return _engine(tuple(values), tuple(given), False, False, tuple(inputs), True, accumulate_grad=False)


def _track(leaf: object, index: int, structure: tree.Structure) -> Tensor:
    if not isinstance(leaf, Tensor) or not (leaf.is_floating_point() or leaf.is_complex()):
        path = tree.paths(tree.unflatten(structure, range(structure.num_leaves)))[index]
        raise StepError(
            explain(
                "only floating tensors can be differentiated",
                where=f"argument{path}: {tree.describe(leaf)}",
                instead="keep integers and other data in buffers, or in another argument",
            )
        )
    return leaf.detach().requires_grad_()


def _check_value(value: object, function: Callable[..., Any]) -> None:
    if not isinstance(value, Tensor) or value.ndim != 0 or not value.is_floating_point():
        raise StepError(
            explain(
                "a loss is one floating-point number",
                where=f"{getattr(function, '__name__', 'the function')} returned {tree.describe(value)}",
                instead="return loss.mean()" if isinstance(value, Tensor) else "return loss",
            )
        )


def stop_gradient(value: T) -> T:
    """Detach every tensor of a tree; one that is part of no graph stays the very tensor it is."""
    if not any(isinstance(x, Tensor) and x.requires_grad for x in tree.leaves(value)):
        return value
    return tree.map(lambda x: x.detach() if isinstance(x, Tensor) and x.requires_grad else x, value)
