"""Gradients: `grad_and_value`, and the fixed-order sum of microbatch gradients.

The engine is `torch.autograd.grad` over detached leaves; inside a torch.func transform it is
`torch.func.grad_and_value`, so that steps compose with vmap, jvp and grad. `microbatched` is what accumulation and
data parallelism share.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any, Literal, TypeVar

import torch
from torch import Tensor
from torch.utils.checkpoint import CheckpointError

from purestep import transforms, tree
from purestep.errors import StepError, explain
from purestep.functional import backward_scope, gradient_scope
from purestep.keyed.mode import undispatched
from purestep.metrics import sample_count

T = TypeVar("T")
Engine = Literal["auto", "autograd", "func"]
_gradient = undispatched(torch.autograd.grad)


def grad_and_value(
    function: Callable[..., Any], *, argnums: int | tuple[int, ...] = 0, has_aux: bool = False, engine: Engine = "auto"
) -> Callable[..., Any]:
    """Transform a function of pytrees into one that returns its gradient and its value.

    Args:
        function: returns a 0-d floating tensor, or `(tensor, aux)` with `has_aux`.
        argnums: which argument, or arguments, to differentiate; each a pytree of floating tensors.
        has_aux: whether the function returns a second value that is not differentiated.
        engine: "autograd" (the default outside of transforms), "func" (inside of them), or "auto".

    Returns:
        A function of the same arguments that returns `(grads, value)`, or `(grads, (value, aux))`. A parameter that the
        value does not depend on has gradient zero. Value and aux are detached.

    Raises:
        StepError: the value is not a 0-d floating tensor, or does not depend on any argument; or a leaf is not
            floating.

    Example:
        >>> grads, value = grad_and_value(lambda p: (p["w"] ** 2).sum())({"w": torch.tensor([1.0, 3.0])})
        >>> grads["w"].tolist(), float(value)
        ([2.0, 6.0], 10.0)
    """

    @functools.wraps(function)
    def wrapped(*args: Any, **kwargs: Any) -> Any:
        func = engine == "func" or (engine == "auto" and transforms.active())
        return (_func if func else _autograd)(function, argnums, has_aux, args, kwargs)

    return wrapped


def _func(function: Callable[..., Any], argnums: Any, has_aux: bool, args: Any, kwargs: Any) -> Any:
    # torch.func takes only tensors out of a transform; what else is in aux goes around it.
    around: list[Any] = []

    def checked(*a: Any, **k: Any) -> Any:
        out = function(*a, **k)
        value, aux = out if has_aux else (out, None)
        _check_value(value, getattr(function, "__name__", "the function"))
        leaves, structure = tree.flatten(aux)
        around[:] = [[None if isinstance(x, Tensor) else x for x in leaves], structure]
        return value, tuple(x for x in leaves if isinstance(x, Tensor))

    grads, (value, tensors) = torch.func.grad_and_value(checked, argnums=argnums, has_aux=True)(*args, **kwargs)
    rest = iter(tensors)
    aux = tree.unflatten(around[1], [next(rest) if x is None else x for x in around[0]])
    return grads, ((value, aux) if has_aux else value)


def _autograd(function: Callable[..., Any], argnums: Any, has_aux: bool, args: Any, kwargs: Any) -> Any:
    numbers = argnums if isinstance(argnums, tuple) else (argnums,)
    leaves, structure = tree.flatten(tuple(args[n] for n in numbers))
    tracked = [_track(leaf, i, structure) for i, leaf in enumerate(leaves)]
    arguments = list(args)
    for n, argument in zip(numbers, tree.unflatten(structure, tracked), strict=True):
        arguments[n] = argument
    with torch.enable_grad(), gradient_scope() as scope:
        out = function(*arguments, **kwargs)
        value, aux = out if has_aux else (out, None)
        _check_value(value, getattr(function, "__name__", "the function"))
        if not value.requires_grad:
            raise StepError(
                explain(
                    "the loss does not depend on the parameters",
                    where=f"loss: {tree.describe(value)}",
                    why="it was computed under no_grad, detached, or with other weights than those given",
                    instead="compute it from net(batch[...]), not from the module that net was made of",
                )
            )
    # Dynamo knows the function by its identity; elsewhere the modes of the backward scope have to be active inside.
    gradient = torch.autograd.grad if torch.compiler.is_compiling() else _gradient
    try:
        with backward_scope(scope):
            found = gradient(value, tracked, allow_unused=True)
    except CheckpointError as error:
        raise StepError(
            explain(
                "activations recomputed by torch.utils.checkpoint differ from those of the forward pass",
                why="it has to run under the same keys, parameters and buffers again",
                instead="return ps.checkpoint(block, x)    # in place of torch.utils.checkpoint.checkpoint",
            )
        ) from error
    grads = [torch.zeros_like(t) if g is None else g for g, t in zip(found, leaves, strict=True)]
    result = tree.unflatten(structure, grads)
    value, aux = value.detach(), stop_gradient(aux)
    return (result if isinstance(argnums, tuple) else result[0]), ((value, aux) if has_aux else value)


def _track(leaf: Any, index: int, structure: Any) -> Tensor:
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


def _check_value(value: Any, name: str) -> None:
    if not isinstance(value, Tensor) or value.ndim != 0 or not value.is_floating_point():
        raise StepError(
            explain(
                "a loss is one floating-point number",
                where=f"{name} returned {tree.describe(value)}",
                instead="return loss.mean()" if isinstance(value, Tensor) else "return loss",
            )
        )


def stop_gradient(value: T) -> T:
    """Detach every tensor of a tree."""
    return tree.map(lambda x: x.detach() if isinstance(x, Tensor) else x, value)


# --- microbatches -----------------------------------------------------------------------------------------------------


def microbatch_sizes(samples: int, parts: int) -> list[int]:
    """Return the sizes of the microbatches: equal, or with the first ones larger by one sample.

    Example:
        >>> microbatch_sizes(10, 4)
        [3, 3, 2, 2]
    """
    base, rest = divmod(samples, parts)
    return [base + (i < rest) for i in range(parts)]


def split_batch(batch: T, parts: int) -> list[tuple[T, int]]:
    """Cut a batch into microbatches along dim 0 of its tensors.

    Args:
        batch: pytree of tensors with the same size of dim 0. Leaves without dims go into every microbatch.
        parts: number of microbatches, at least 1. Empty ones (a batch smaller than `parts`) are left out.

    Returns:
        `(microbatch, samples)` pairs.

    Raises:
        StepError: leaves differ in their number of samples.

    Example:
        >>> [(b["x"].tolist(), n) for b, n in split_batch({"x": torch.arange(5)}, 2)]
        [([0, 1, 2], 3), ([3, 4], 2)]
    """
    samples = sample_count(batch)
    if parts == 1:
        return [(batch, samples)]
    uneven = [
        f"{path}: {tree.describe(leaf)}"
        for path, leaf in zip(tree.paths(batch, "batch"), tree.leaves(batch), strict=True)
        if getattr(leaf, "ndim", 0) and leaf.shape[0] != samples
    ]
    if uneven:
        raise StepError(
            explain(
                f"the leaves of a batch differ in their number of samples, so it cannot be cut into {parts} parts",
                where=f"{', '.join(uneven)}; the first leaf has {samples}",
                instead="give every tensor of the batch the samples as dim 0, or make shared values 0-d",
            )
        )
    out, start = [], 0
    for size in microbatch_sizes(samples, parts):
        if size:
            piece = slice(start, start + size)
            out.append((tree.map(lambda x, s=piece: x[s] if getattr(x, "ndim", 0) else x, batch), size))
            start += size
    return out


class TreeSum:
    """Sum values in a fixed balanced binary tree, holding at most log2(n) + 1 of them at a time.

    The order of additions depends on the number of values only: 4 values give (a + b) + (c + d). Contiguous aligned
        parts
    of it can be summed elsewhere, which is what makes the sum independent of who computes which microbatch.

    Example:
        >>> total = TreeSum(lambda a, b: f"({a}+{b})")
        >>> for x in "abcdef":
        ...     total.add(x)
        >>> total.result()
        '(((a+b)+(c+d))+(e+f))'
    """

    def __init__(self, merge: Callable[[Any, Any], Any]) -> None:
        self._merge = merge
        self._stack: list[tuple[int, Any]] = []

    def add(self, value: Any) -> None:
        level = 0
        while self._stack and self._stack[-1][0] == level:
            value = self._merge(self._stack.pop()[1], value)
            level += 1
        self._stack.append((level, value))

    def result(self) -> Any:
        total = self._stack[-1][1]
        for _, left in reversed(self._stack[:-1]):
            total = self._merge(left, total)
        return total


def add_trees(a: T, b: T) -> T:
    """Add two trees of tensors, leaf by leaf."""
    return tree.map(torch.add, a, b)


def scale_tree(values: T, factor: Any) -> T:
    """Multiply every leaf by a number or a 0-d tensor, keeping its dtype."""
    if isinstance(factor, float) and factor == 1.0:
        return values
    return tree.map(lambda x: x * (factor.to(x.dtype) if isinstance(factor, Tensor) else factor), values)


def weighted_mean(values: Sequence[Any], weights: Sequence[int | Tensor]) -> Any:
    """Return the weighted mean of trees of tensors, summed in a fixed binary tree.

    Args:
        values: one tree a microbatch.
        weights: samples of each (ints), or any weights as 0-d tensors.

    Example:
        >>> weighted_mean([torch.tensor(1.0), torch.tensor(4.0)], [2, 1])
        tensor(2.)
    """
    if len(values) == 1:
        return values[0]
    total = TreeSum(add_trees)
    if all(isinstance(w, int) for w in weights):
        samples, equal = sum(weights), len(set(weights)) == 1
        for value, weight in zip(values, weights, strict=True):
            total.add(value if equal else scale_tree(value, weight / samples))
        return scale_tree(total.result(), 1.0 / len(values)) if equal else total.result()
    for value, weight in zip(values, weights, strict=True):
        # A microbatch of weight 0 (all padding) may have a NaN mean; it must not count.
        weight = torch.as_tensor(weight)
        total.add((tree.map(lambda x, w=weight: torch.where(w > 0, x * w.to(x.dtype), 0), value), weight))
    summed, weight = total.result()
    return scale_tree(summed, 1.0 / weight)
