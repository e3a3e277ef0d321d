"""Rules of split tensors for arithmetic: element by element, reductions, and products of matrices."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from purestep.parallel import split_positions
from purestep.parallel.split_tensor import Split, aligned, each, named, rule, split, split_of, whole

# --- element by element -----------------------------------------------------------------------------------------------

_TWO = """add sub subtract mul multiply div divide true_divide floor_divide remainder fmod pow float_power rsub atan2
maximum minimum fmax fmin where eq ne lt le gt ge greater less greater_equal less_equal not_equal logical_and logical_or
logical_xor bitwise_and bitwise_or bitwise_xor lerp addcmul addcdiv masked_fill clamp clip clamp_min clamp_max hypot
copysign xlogy isclose threshold""".split()
_ONE = """neg negative abs absolute exp exp2 expm1 log log1p log2 log10 sqrt rsqrt square reciprocal sin cos tan asin
acos atan sinh cosh tanh sigmoid erf erfc erfinv relu relu6 gelu silu mish softplus elu selu celu leaky_relu hardtanh
hardswish hardsigmoid logsigmoid softsign tanhshrink hardshrink softshrink isnan isinf isfinite logical_not bitwise_not
sign sgn round floor ceil trunc frac nan_to_num float half bfloat16 double int long bool clone detach contiguous
zeros_like ones_like full_like empty_like positive expit logit sinc digamma lgamma deg2rad rad2deg""".split()
_OPERATORS = """add radd sub rsub mul rmul truediv rtruediv floordiv rfloordiv mod rmod pow rpow neg pos abs invert and
rand or ror xor rxor eq ne lt le gt ge div rdiv""".split()
_IN_PLACE = """iadd isub imul itruediv ifloordiv ipow imod iand ior ixor idiv""".split()


@rule(*named(*_TWO, *_ONE, *(f"__{name}__" for name in _OPERATORS)))
def pointwise(func: Any, *args: Any, **kwargs: Any) -> Any:
    """Compute with the elements that meet in each part."""
    operands = [*args, *kwargs.values()]
    if kwargs.get("out") is not None or (func.__name__ == "where" and len(operands) == 1):
        return NotImplemented
    like = _widest(operands)
    columns = [aligned(x, like) for x in args]
    outs = each(func, columns, **{k: aligned(x, like) for k, x in kwargs.items()})
    back, blocks = like.cut
    return split(outs, outs[0].ndim + back, blocks, like.team)


@rule(*named(*(f"{name}_" for name in (*_TWO, *_ONE)), *(f"__{name}__" for name in _IN_PLACE)))
def pointwise_in_place(func: Any, target: Any, *args: Any, **kwargs: Any) -> Any:
    """Write into the parts what meets them."""
    if not isinstance(target, Split):
        return NotImplemented
    columns = [target.parts, *(aligned(x, target) for x in args)]
    each(func, columns, **{k: aligned(x, target) for k, x in kwargs.items()})
    return target


def _widest(operands: Sequence[Any]) -> Split:
    """Return the operand that decides how the result is cut: the first that no other one broadcasts."""
    splits = [x for x in operands if isinstance(x, Split)]
    return max(splits, key=lambda x: x.ndim - x.at)


@rule(*named("to", "type_as", "type"))
def _converted(func: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    like = [x.parts[0] if isinstance(x, Split) else x for x in args]
    if not isinstance(value, Split):
        return func(value, *like, **kwargs)
    if not args and not kwargs:
        return NotImplemented
    return split([func(x, *like, **kwargs) for x in value.parts], value.at, value.blocks, value.team)


# --- reductions -------------------------------------------------------------------------------------------------------

_REDUCED = "sum mean amax amin logsumexp argmax argmin all any max min median nansum prod"


@rule(*named(*_REDUCED.split()))
def _reduced(func: Any, value: Any, dim: Any = None, keepdim: bool = False, **kwargs: Any) -> Any:
    if not isinstance(value, Split) or isinstance(dim, Tensor) or "axis" in kwargs:
        return NotImplemented
    dims = _dims(dim, value.ndim)
    if dims is None or value.at in dims:
        return _over_parts(func, value, dims, keepdim, kwargs)
    outs = [func(x, dim, **({"keepdim": True} if keepdim else {}), **kwargs) for x in value.parts]
    at = value.at if keepdim else value.at - sum(d < value.at for d in dims)
    if isinstance(outs[0], Tensor):
        return split(outs, at, value.blocks, value.team)
    fields = zip(*outs, strict=True)
    return type(outs[0])([split(field, at, value.blocks, value.team) for field in fields])


def _over_parts(func: Any, value: Split, dims: Any, keepdim: bool, kwargs: dict[str, Any]) -> Any:
    if func.__name__ not in ("sum", "mean") or not value.is_floating_point():
        return NotImplemented
    dims = tuple(range(value.ndim)) if dims is None else dims
    total = value.team.sum([torch.sum(x, dims, keepdim, **kwargs) for x in value.parts])
    if func.__name__ == "sum":
        return total
    count = 1
    for d in dims:
        count *= value.shape[d]
    return total / count


def _dims(dim: Any, ndim: int) -> tuple[int, ...] | None:
    if dim is None or dim == ():
        return None
    return tuple(d % ndim for d in (dim if isinstance(dim, (tuple, list)) else (dim,)))


@rule(*named("var", "std"))
def _spread(func: Any, value: Any, dim: Any = None, *rest: Any, **kwargs: Any) -> Any:
    # The third argument is `unbiased` in one form and `keepdim` in none.
    return NotImplemented if rest else _reduced(func, value, dim, kwargs.pop("keepdim", False), **kwargs)


@rule(*named("softmax", "log_softmax", "cumsum", "cumprod", "softmin"))
def _along(func: Any, value: Any, *args: Any, **kwargs: Any) -> Any:
    """Functions along a dim that keep all dims."""
    if not isinstance(value, Split):
        return NotImplemented
    dim = kwargs.get("dim", args[0] if args else None)
    if not isinstance(dim, int) or dim % value.ndim == value.at:
        return NotImplemented
    return split([func(x, *args, **kwargs) for x in value.parts], value.at, value.blocks, value.team)


# --- products of matrices ---------------------------------------------------------------------------------------------


@rule(*named("matmul", "bmm", "mm", "__matmul__"))
def matmul(func: Any, a: Any, b: Any) -> Any:
    """Multiply `[..., m, k]` and `[..., k, n]`."""
    if a.ndim < 2 or b.ndim < 2:
        return NotImplemented
    team = split_of((a, b)).team
    cut_a, cut_b = (x.cut[0] if isinstance(x, Split) else 0 for x in (a, b))
    batch = min(cut_a, cut_b)
    if batch <= -3:  # both are cut along one dim of the batch
        like = a if cut_a == batch else b
        outs = each(torch.matmul, [aligned(a, like), aligned(b, like)])
        return split(outs, outs[0].ndim + batch, like.blocks, team)
    if team.context and cut_a == -2 and cut_b < 0:
        return split_positions.matmul(func, a, b)
    if cut_b == -2 and cut_a in (0, -1):  # the dim that is summed
        if cut_a == 0 or a.blocks != b.blocks:
            a = split(team.cut(whole(a), a.ndim - 1, b.blocks), a.ndim - 1, b.blocks, team)
        return summed(each(torch.matmul, [a.parts, b.parts]), team)
    if cut_b == -1:
        outs = each(torch.matmul, [team.enter(whole(a)), b.parts])
        return split(outs, -1, b.blocks, team)
    if cut_a == -2 and cut_b == 0:
        outs = each(torch.matmul, [a.parts, team.enter(b)])
        return split(outs, outs[0].ndim - 2, a.blocks, team)
    return NotImplemented


def summed(addends: Sequence[Tensor], team: Any) -> Any:
    """Return the sum of one tensor from each part: whole, or cut along the positions `[batch, position, width]`."""
    first = addends[0]
    if team.sequence and first.ndim == 3 and first.shape[1] % team.parts == 0:
        return split(team.sum_cut(addends, 1), 1, (first.shape[1],), team)
    return team.sum(addends)


@rule(*named("addmm", "baddbmm"))
def _addmm(func: Any, bias: Any, a: Any, b: Any, *, beta: float = 1, alpha: float = 1) -> Any:
    if beta != 1 or alpha != 1:
        return NotImplemented
    return torch.matmul(a, b) + bias


@rule(F.linear)
def linear(func: Any, x: Any, weight: Any, bias: Any = None) -> Any:
    """Multiply by the rows or the columns that a part has of a weight `[outputs, inputs]`."""
    team = split_of((x, weight, bias)).team
    if not isinstance(weight, Split):
        if not isinstance(x, Split) or x.at == x.ndim - 1:
            return NotImplemented
        outs = each(func, [x.parts, team.enter(weight), _entered(bias, team)])
        return split(outs, x.at, x.blocks, team)
    if weight.at == 0:
        bias = (None,) * team.own if bias is None else aligned(bias, weight, 1)
        outs = each(func, [team.enter(whole(x)), weight.parts, bias])
        return split(outs, -1, weight.blocks, team)
    if not (isinstance(x, Split) and x.cut == (-1, weight.blocks)):
        x = split(team.cut(whole(x), x.ndim - 1, weight.blocks), -1, weight.blocks, team)
    out = summed(each(func, [x.parts, weight.parts]), team)
    return out if bias is None else out + whole(bias)


def _entered(value: Any, team: Any) -> Sequence[Any]:
    return (None,) * team.own if value is None else team.enter(whole(value))
