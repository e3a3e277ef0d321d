"""Arithmetic over lists of tensors by `torch._foreach_*`, or by a loop over tensors where that cannot be used.

Each function returns a new list. With `reuse=True` it may overwrite its first argument, which the caller must own. With
`between=` the result may lie in a temporary buffer of that name, which the next call overwrites (`workspace`). Both
apply in plain eager mode only. Under `torch.func` transforms and autograd the same formulas run leaf by leaf, because
foreach has no batching rules, and its derivatives of 0-d tensors are wrong; under a tracer nothing is written in place.
"""

from __future__ import annotations

import itertools
import math
import operator
from collections.abc import Callable, Sequence
from typing import Any, TypeGuard, TypeVar

import torch
from torch import Tensor

from purestep import _torch, tree
from purestep.optim import _torch as kernels
from purestep.optim.kernels import workspace
from purestep.optim.kernels.flat import elementwise
from purestep.sharding import full_tensors
from purestep.tree import Structure

T = TypeVar("T")
Tensors = list[Tensor] | tuple[Tensor, ...]
Numbers = list[float]
_PLAIN, _TRACED, _LEAFWISE = 0, 1, 2
_transform_level, _recording = _torch.transform_level, torch.is_grad_enabled
_dtype_of = operator.attrgetter("dtype")


def _mode(*lists: Tensors) -> int:
    # Asked a dozen times in every update, so without calls of Python where there is neither transform nor trace.
    if _transform_level() is not None:
        return _LEAFWISE
    if _recording() and any(x.requires_grad for xs in lists for x in xs):
        return _LEAFWISE
    return _TRACED if _torch.dispatch_modes() > 0 else _PLAIN


def plain(*lists: Tensors) -> bool:
    """Tell whether these are plain tensors in eager mode: no tracing, no transform, no autograd."""
    return _mode(*lists) == _PLAIN


# Numbers as 0-d tensors, which no other code sees: torch makes one of a number for each tensor of a list, which takes
# several times as long as the arithmetic on a small one.
_numbers: dict[float, Tensor] = {}
_MOST_NUMBERS, _TENSORS = 64, {Tensor}
_FEW = 3  # tensors, for which making one costs as much


def operand(number: float, xs: Tensors) -> float | Tensor:
    """Return what plain tensors are computed with for a number; the bits and the dtype of the result are the same.

    Examples:
        >>> third, xs = 1 / 3, [torch.ones(1, dtype=torch.bfloat16)] * 4
        >>> torch.equal(mul(xs, third)[0], xs[0] * third), isinstance(operand(third, xs), Tensor)
        (True, True)
    """
    return operands((number,), xs)[0]


def operands(numbers: Sequence[float], xs: Tensors) -> list[Any]:
    """Return what plain tensors are computed with for each of some numbers, see `operand`."""
    ordinary = len(xs) > _FEW and xs[0].is_cpu and set(map(type, xs)) == _TENSORS
    # A 0-d tensor would take the dtype of the operand, and a DTensor takes no other kind of tensor.
    if not ordinary or not all(map(Tensor.dim, xs)) or not all(map(Tensor.is_floating_point, xs)):
        return list(numbers)
    return [_operand(number) for number in numbers]


def _operand(number: float) -> float | Tensor:
    if type(number) is not float or not number:  # 0 and -0 would be one key
        return number
    found = _numbers.get(number)
    if found is None:
        if len(_numbers) >= _MOST_NUMBERS:
            _numbers.clear()
        with _torch.disable_current_modes():  # a trace of one step would have it, and that of the next would not
            found = _numbers[number] = torch.full((), number, dtype=torch.float64, device="cpu")
    return found


def _unary(name: str, function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    fresh, inplace = kernels.foreach(name)

    def apply(xs: Tensors, *, reuse: bool = False, between: str | None = None) -> list[Tensor]:
        if not xs:
            return []
        mode = _mode(xs)
        if mode == _LEAFWISE:
            return [function(x) for x in xs]
        if reuse and mode == _PLAIN:
            inplace(xs)
            return list(xs)
        kept = workspace.into(between, function, xs) if between and mode == _PLAIN else None
        return list(fresh(xs)) if kept is None else kept

    apply.__name__ = name
    apply.__doc__ = f"Return `{name}(x)` for each tensor."
    return apply


abs = _unary("abs", torch.abs)
neg = _unary("neg", torch.neg)
sqrt = _unary("sqrt", torch.sqrt)
_sign = _unary("sign", torch.sign)
reciprocal = _unary("reciprocal", torch.reciprocal)
rsqrt = _unary("rsqrt", torch.rsqrt)


def _binary(name: str, function: Callable[..., Tensor]) -> Callable[..., list[Tensor]]:
    fresh, inplace = kernels.foreach(name)
    takes_tensor = name in ("mul", "div")  # of the lists of torch; the others take numbers

    def apply(
        xs: Tensors, other: Tensors | Numbers | float | Tensor, *, reuse: bool = False, between: str | None = None
    ) -> list[Tensor]:
        if not xs:
            return []
        if isinstance(other, Tensor):
            return _by_scalar_tensor(xs, other, reuse, between)
        mode = _mode(xs, other) if not isinstance(other, (int, float)) and _are_tensors(other) else _mode(xs)
        if mode == _LEAFWISE:
            if isinstance(other, (int, float)):
                return [function(x, other) for x in xs]
            return [function(x, y) for x, y in zip(xs, other, strict=True)]
        number = isinstance(other, (int, float))
        if number and mode == _PLAIN and takes_tensor:
            other = operand(other, xs)  # type: ignore[arg-type]
        if reuse and mode == _PLAIN:
            inplace(xs, other)
            return list(xs)
        kept = workspace.into(between, function, xs, other) if between and number and mode == _PLAIN else None
        return list(fresh(xs, other)) if kept is None else kept

    def _by_scalar_tensor(xs: Tensors, scalar: Tensor, reuse: bool, between: str | None) -> list[Tensor]:
        fitted = _fit(scalar, xs[0])
        mode = _mode(xs, (scalar,))
        if mode == _LEAFWISE or name in ("maximum", "minimum"):
            return cast([function(x, fitted) for x in xs], xs)
        if reuse and mode == _PLAIN:
            inplace(xs, fitted)
            return list(xs)
        kept = workspace.into(between, function, xs, fitted) if between and mode == _PLAIN else None
        return cast(fresh(xs, fitted), xs) if kept is None else kept

    apply.__name__ = name
    apply.__doc__ = f"Return `{name}(x, other)`; `other` is a list of tensors or numbers, a number or a 0-d tensor."
    return apply


def _are_tensors(values: Tensors | Numbers) -> TypeGuard[Tensors]:
    return isinstance(values[0], Tensor)


mul = _binary("mul", torch.mul)
div = _binary("div", torch.div)


def _on(x: Tensor, y: Tensor | float) -> Tensor:
    return y.to(x) if isinstance(y, Tensor) else torch.full((), y, dtype=x.dtype, device=x.device)


maximum = _binary("maximum", lambda x, y: torch.maximum(x, _on(x, y)))
minimum = _binary("minimum", lambda x, y: torch.minimum(x, _on(x, y)))


def add(
    xs: Tensors, other: Tensors | float | Tensor, *, alpha: float | Tensor = 1, reuse: bool = False
) -> list[Tensor]:
    """Return `x + alpha * other`; `other` is a list of tensors, a number or a 0-d tensor."""
    if not xs:
        return []
    if isinstance(other, (int, float)):
        mode = _mode(xs)
        if mode == _LEAFWISE:
            return [x + other for x in xs]
        number = operand(other, xs) if mode == _PLAIN else other
        if reuse and mode == _PLAIN:
            kernels.foreach_add_(xs, number)
            return list(xs)
        return list(kernels.foreach_add(xs, number))
    if isinstance(other, Tensor):
        scalar = other
        by: Callable[..., Tensor] = lambda x: x + _fit(scalar, x)  # noqa: E731
        return cast(elementwise(by, [xs]) if plain(xs, (scalar,)) else list(map(by, xs)), xs)
    if isinstance(alpha, Tensor):
        other, alpha = mul(other, alpha), 1
    mode = _mode(xs, other)
    if mode == _LEAFWISE:
        return [torch.add(x, y, alpha=alpha) for x, y in zip(xs, other, strict=True)]
    if reuse and mode == _PLAIN:
        kernels.foreach_add_(xs, other, alpha=alpha)
        return list(xs)
    return list(kernels.foreach_add(xs, other, alpha=alpha))


def sign(xs: Tensors) -> list[Tensor]:
    """Return the sign of each element; NaN for elements that are not finite (`torch.sign` of NaN is 0)."""
    return add(_sign(xs), mul(xs, 0.0), reuse=True)


def sub(xs: Tensors, ys: Tensors, *, reuse: bool = False) -> list[Tensor]:
    """Return `x - y`."""
    return add(xs, ys, alpha=-1, reuse=reuse)


def lerp(xs: Tensors, ys: Tensors, weight: float | Tensor, *, reuse: bool = False) -> list[Tensor]:
    """Return `x + weight * (y - x)`: the moving average of `x` towards `y`."""
    if not xs:
        return []
    mode = _mode(xs, ys)
    reuse = reuse and mode == _PLAIN
    if isinstance(weight, Tensor):
        by: Callable[..., Tensor] = lambda x, y: (x.lerp_ if reuse else x.lerp)(y, weight.to(x.dtype))  # noqa: E731
        return elementwise(by, [xs, ys], reuse=reuse) if plain(xs, ys, (weight,)) else list(map(by, xs, ys))
    if mode == _LEAFWISE:
        return [torch.lerp(x, y, weight) for x, y in zip(xs, ys, strict=True)]
    if reuse:
        kernels.foreach_lerp_(xs, ys, weight)
        return list(xs)
    return list(kernels.foreach_lerp(xs, ys, weight))


def addcmul(xs: Tensors, a: Tensors, b: Tensors, *, value: float | Tensor = 1, reuse: bool = False) -> list[Tensor]:
    """Return `x + value * a * b`."""
    if not xs:
        return []
    if isinstance(value, Tensor):
        return add(xs, mul(mul(a, b), value, reuse=True), reuse=reuse)
    mode = _mode(xs, a, b)
    if mode == _LEAFWISE:
        return [torch.addcmul(x, y, z, value=value) for x, y, z in zip(xs, a, b, strict=True)]
    if reuse and mode == _PLAIN:
        kernels.foreach_addcmul_(xs, a, b, value)
        return list(xs)
    return list(kernels.foreach_addcmul(xs, a, b, value))


def addcdiv(xs: Tensors, a: Tensors, b: Tensors, *, value: float | Tensor = 1, reuse: bool = False) -> list[Tensor]:
    """Return `x + value * a / b`."""
    if not xs:
        return []
    if isinstance(value, Tensor):
        return add(xs, div(mul(a, value), b, reuse=True), reuse=reuse)
    mode = _mode(xs, a, b)
    if mode == _LEAFWISE:
        return [torch.addcdiv(x, y, z, value=value) for x, y, z in zip(xs, a, b, strict=True)]
    if reuse and mode == _PLAIN:
        kernels.foreach_addcdiv_(xs, a, b, value)
        return list(xs)
    return list(kernels.foreach_addcdiv(xs, a, b, value))


def average_of_squares(nu: Tensors, xs: Tensors, decay: float | Tensor, *, reuse: bool = False) -> list[Tensor]:
    """Return `decay * nu + (1 - decay) * x**2`, in the order of operations of `torch.optim`."""
    return addcmul(mul(nu, decay, reuse=reuse), xs, xs, value=1 - decay, reuse=True)


def clamp(xs: Tensors, low: float | Tensor | None, high: float | Tensor | None) -> list[Tensor]:
    """Return each tensor limited to `[low, high]`."""
    result = list(xs)
    if low is not None:
        result = maximum(result, low)
    if high is not None:
        result = minimum(result, high)
    return result


def cast(xs: Tensors, like: Tensors) -> list[Tensor]:
    """Return the tensors in the dtypes of others; a tensor of the right dtype is returned as it is."""
    if list(map(_dtype_of, xs)) == list(map(_dtype_of, like)):
        return list(xs)
    return [x if x.dtype == y.dtype else x.to(y.dtype) for x, y in zip(xs, like, strict=True)]


def convert(xs: Tensors, dtypes: list[torch.dtype]) -> list[Tensor]:
    """Return the tensors in other dtypes, with few kernels; a tensor of the right dtype is returned as it is."""
    result = list(xs)
    at = [i for i, (x, dtype) in enumerate(zip(xs, dtypes, strict=True)) if x.dtype != dtype]
    if _mode(xs) != _PLAIN or all(xs[i].is_cpu for i in at):
        for i in at:
            result[i] = xs[i].to(dtypes[i])
        return result
    made = [torch.empty_like(xs[i], dtype=dtypes[i]) for i in at]
    kernels.foreach_copy_(made, [xs[i] for i in at])
    for i, x in zip(at, made, strict=True):
        result[i] = x
    return result


def dtypes(*lists: Tensors) -> set[torch.dtype]:
    """Return the dtypes of some tensors."""
    return set(map(_dtype_of, itertools.chain(*lists)))


def select(condition: Tensor, on_true: Tensors, on_false: Tensors | None) -> list[Tensor]:
    """Return the tensors of one list or the other, selected by a 0-d bool tensor that the host never reads.

    None stands for zeros, of which one number is made for each dtype and device, and no tensor.
    """
    if on_false is None:
        kinds = dict.fromkeys((x.dtype, x.device) for x in on_true)  # in order: a trace repeats it
        zeros = {kind: torch.zeros((), dtype=kind[0], device=kind[1]) for kind in kinds}
        return elements(lambda x: torch.where(condition, x, zeros[x.dtype, x.device]), on_true)
    return elements(lambda x, y: torch.where(condition, x, y), on_true, on_false)


def select_tree(condition: Tensor, on_true: T, on_false: T) -> T:
    """Return one of two trees of tensors, as `tree.select` does, with few kernels."""
    xs, structure = tree.flatten(on_true)
    ys, other = tree.flatten(on_false)
    if structure != other or not all(isinstance(x, Tensor) for x in (*xs, *ys)):
        return tree.select(condition, on_true, on_false)  # which says what differs
    at = [i for i, (x, y) in enumerate(zip(xs, ys, strict=True)) if x is not y]
    for i, x in zip(at, select(condition, [xs[i] for i in at], [ys[i] for i in at]), strict=True):
        xs[i] = x
    return tree.unflatten(structure, xs)


def copies(xs: Tensors) -> list[Tensor]:
    """Return copies of some tensors, on a device by few kernels."""
    if not plain(xs) or all(x.is_cpu for x in xs):
        return list(map(Tensor.clone, xs))
    made = [torch.empty_like(x) for x in xs]
    for dtype in dtypes(xs):
        kernels.foreach_copy_([x for x in made if x.dtype == dtype], [x for x in xs if x.dtype == dtype])
    return made


def elements(function: Callable[..., Tensor], *lists: Tensors) -> list[Tensor]:
    """Return `function(x, y, ...)` of the tensors at each place, for a function of elements; see `flat.elementwise`."""
    return elementwise(function, lists) if plain(*lists) else list(map(function, *lists))


def each(function: Callable[..., Tensor], xs: Tensors, numbers: Tensors) -> list[Tensor]:
    """Return `function(x, number)` of each tensor and a 0-d tensor of its own, for a function of elements."""
    return elementwise(function, [xs], numbers) if plain(xs, numbers) else list(map(function, xs, numbers))


def on_scalars(function: Callable[..., Tensor], *lists: Tensors) -> list[Tensor]:
    """Return `function(x, y, ...)` of the 0-d tensors at each place, computed together.

    Args:
        function: of elements, by operations that round as IEEE 754 says, so that a vector has the bits of a number.
        *lists: 0-d tensors.
    """
    rows = list(zip(*lists, strict=True))
    kinds = {(x.dtype, x.device) for row in rows for x in row}
    if len(kinds) > 1 or not plain(*lists):
        return [function(*row) for row in rows]
    return list(function(*[torch.stack(xs) for xs in lists]).unbind()) if rows else []


def norms(xs: Tensors, order: float = 2.0, *, widened: bool = True) -> list[Tensor]:
    """Return the norm of each tensor as a 0-d tensor, of at least float32 if `widened`, else of the tensor's dtype.

    Empty tensors have norm 0.
    """
    at = [i for i, x in enumerate(xs) if x.numel() > 0]
    filled = [xs[i] for i in at]
    kinds = [accumulator(x.dtype) if widened else x.dtype for x in xs]
    result = list(xs)
    if len(at) < len(xs):
        result = [torch.zeros((), dtype=kind, device=x.device) for x, kind in zip(xs, kinds, strict=True)]
    for i, norm in zip(at, _norms(filled, order, [kinds[i] for i in at]), strict=True):
        result[i] = norm
    return result


def _norms(xs: list[Tensor], order: float, kinds: list[torch.dtype]) -> list[Tensor]:
    if _mode(xs) == _LEAFWISE:
        return [torch.linalg.vector_norm(x, order, dtype=kind) for x, kind in zip(xs, kinds, strict=True)]
    found: list[Tensor] = list(xs)
    for dtype, kind in dict.fromkeys((x.dtype, kind) for x, kind in zip(xs, kinds, strict=True)):
        at = [i for i, x in enumerate(xs) if x.dtype == dtype]
        wider = None if kind == dtype else kind
        for i, norm in zip(at, kernels.foreach_norm([xs[i] for i in at], order, dtype=wider), strict=True):
            found[i] = norm
    return found


def global_norm(xs: Tensors, structure: Structure | None = None) -> Tensor:
    """Return the 2-norm of all tensors together: a 0-d tensor of at least float32.

    In the update of a step with a plan it is the norm of the full tensors, with the same bits for every placement.

    Args:
        xs: the leaves of a tree.
        structure: structure of the tree, whose names assign each shard to its parameter.
    """
    if not xs:
        return torch.zeros(())
    behind = full_tensors.current()
    if behind is not None and structure is not None:
        return torch.sqrt(behind.squares(xs, structure).sum()).to(xs[0].device, _widest(xs))
    return torch.linalg.vector_norm(_stacked(norms(xs)))


def all_finite(xs: Tensors) -> Tensor:
    """Return a 0-d bool tensor: whether all elements are finite. One pass over the memory; the host does not wait."""
    filled = [x for x in xs if x.numel() > 0]
    finite = torch.isfinite(_stacked(norms(filled, math.inf))).all() if filled else torch.ones((), dtype=torch.bool)
    behind = full_tensors.current()
    if behind is None or not behind.split:
        return finite
    return behind.reduce(finite.to(torch.int32), "min") > 0


def _stacked(scalars: list[Tensor]) -> Tensor:
    widest = _widest(scalars)
    return torch.stack([n.to(scalars[0].device, widest) for n in scalars])


def _widest(xs: Tensors) -> torch.dtype:
    return torch.float64 if any(accumulator(x.dtype) == torch.float64 for x in xs) else torch.float32


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """Return the dtype of sums over a tensor: float32, or float64 for float64."""
    return torch.float64 if dtype in (torch.float64, torch.complex128) else torch.float32


def _fit(scalar: Tensor, x: Tensor) -> Tensor:
    """Cast a 0-d hyperparameter to the dtype of arithmetic with a tensor, so that it does not promote the tensor."""
    target: Any = accumulator(x.dtype)
    return scalar if scalar.dtype == target else scalar.to(target)
