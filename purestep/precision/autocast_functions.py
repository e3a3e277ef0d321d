"""Functions of torch that compute in float32 inside a model that was cast to a half precision.

Owns the lists of autocast as tables of handlers for `KeyedRandom`, the function mode that guards randomness and sees
every function call of a pure call anyway. `cast_params` selects the table of a policy; without one no call is looked
up.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import TYPE_CHECKING, Any

import torch
import torch.nn.functional as F
from torch import Tensor

from purestep.random.torch_mode import Handler, handlers, undispatched
from purestep.random.torch_random import KeyedRandom

if TYPE_CHECKING:
    from purestep.precision.policies import Policy

Function = Callable[..., Any]
Arguments = tuple[object, ...]
Keywords = dict[str, object]
HALVES = frozenset({torch.float16, torch.bfloat16})
_WIDE = torch.float32

# The names of CUDA's autocast list (AT_FORALL_FP32 in ATen/autocast_mode.h) and of torch's functions composed of them.
# The list for CPUs lacks most of them, because kernels there compute in float32 and round; and it has padding and
# pooling, which do not round. With one list a policy computes the same on every device.
_LOSSES = """binary_cross_entropy binary_cross_entropy_with_logits cosine_embedding_loss cross_entropy ctc_loss
    gaussian_nll_loss hinge_embedding_loss huber_loss kl_div l1_loss margin_ranking_loss mse_loss multi_margin_loss
    multilabel_margin_loss multilabel_soft_margin_loss nll_loss nll_loss2d poisson_nll_loss smooth_l1_loss
    soft_margin_loss triplet_margin_loss triplet_margin_with_distance_loss"""
_POINTWISE = """acos arccos asin arcsin cosh erfinv exp expm1 log log10 log1p log2 pow reciprocal rsqrt sinh softplus
    square tan __pow__ __rpow__ __rdiv__ __rtruediv__"""
_NORMS = """layer_norm native_layer_norm rms_norm group_norm local_response_norm normalize cosine_similarity
    pairwise_distance dist pdist cdist renorm lp_pool1d lp_pool2d lp_pool3d frobenius_norm nuclear_norm"""
_REDUCTIONS = "logsumexp trapezoid trapz cumulative_trapezoid softmin gumbel_softmax"
_WITH_DTYPE = "cumprod cumsum log_softmax matrix_norm norm prod softmax sum vector_norm"
_RESIZED = "interpolate upsample upsample_bilinear upsample_nearest"
_PRODUCTS = """__matmul__ __rmatmul__ addbmm addmm addmv addr baddbmm bmm chain_matmul conv1d conv2d conv3d conv_tbc
    conv_transpose1d conv_transpose2d conv_transpose3d convolution einsum gru_cell linear lstm_cell matmul mm multi_dot
    mv prelu rnn_relu_cell rnn_tanh_cell scaled_dot_product_attention vecdot"""
_PROMOTED = """addcdiv addcmul atan2 arctan2 bilinear cross dot grid_sample grid_sampler index_add index_copy index_put
    lerp masked_scatter scatter scatter_add tensordot vdot"""
_WRITTEN = """__setitem__ addcdiv_ addcmul_ index_add_ index_copy_ index_put_ lerp_ masked_scatter_ scatter_
    scatter_add_"""


def _widened(mode: KeyedRandom, func: Function, /, *args: object, **kwargs: object) -> object:
    """Call a function of the float32 list. With `out=` the dtype of that tensor counts."""
    if kwargs.get("out") is not None:
        return _keyed(mode, func, args, kwargs)
    return _keyed(mode, func, *_cast(args, kwargs, HALVES, _WIDE))


def _accumulated(mode: KeyedRandom, func: Function, /, *args: object, **kwargs: object) -> object:
    """Call a function that has an argument for the dtype to accumulate in; a dtype that the caller passes stays.

    The kernel widens each element as it reads it, so that there is no copy in float32.
    """
    passed = [kwargs.get("dtype"), kwargs.get("out"), *(a for a in args if isinstance(a, torch.dtype))]
    first = args[0] if args else kwargs.get("input")
    if all(value is None for value in passed) and isinstance(first, Tensor) and first.dtype in HALVES:
        kwargs["dtype"] = _WIDE
    return func(*args, **kwargs)


def _resized(mode: KeyedRandom, func: Function, /, *args: object, **kwargs: object) -> object:
    """Interpolate. The mode "area" computes a mean, and no mean is in the list of autocast."""
    if "area" in (kwargs.get("mode"), *args[3:4]):
        return func(*args, **kwargs)
    return _widened(mode, func, *args, **kwargs)


def _multiplied(mode: KeyedRandom, func: Function, /, *args: object, **kwargs: object) -> object:
    """Multiply in the half precision if the operands differ in dtype, which torch refuses; else as they are."""
    dtypes = {a.dtype for a in args if isinstance(a, Tensor)}
    # The usual call, positional tensors of one dtype, is not searched for tensors in lists and keywords.
    if kwargs or len(dtypes) != 1:
        dtypes = _dtypes(args, kwargs)
        half = next(iter(dtypes & HALVES), None)
        if half is not None and _WIDE in dtypes:
            args, kwargs = _cast(args, kwargs, frozenset({_WIDE}), half)
    return _keyed(mode, func, args, kwargs)


def _promoted(mode: KeyedRandom, func: Function, /, *args: object, **kwargs: object) -> object:
    """Call a function whose operands must have one dtype in float32, if one of them is float32."""
    return _widened(mode, func, *args, **kwargs) if _WIDE in _dtypes(args, kwargs) else func(*args, **kwargs)


def _written(mode: KeyedRandom, func: Function, target: Tensor, /, *args: object, **kwargs: object) -> object:
    """Write to a tensor in its dtype: cast the other operands to it, as torch does where it accepts two dtypes."""
    if target.dtype in HALVES:
        args, kwargs = _cast(args, kwargs, frozenset({_WIDE}), target.dtype)
    elif target.dtype == _WIDE:
        args, kwargs = _cast(args, kwargs, HALVES, _WIDE)
    return func(target, *args, **kwargs)


def _within(mode: KeyedRandom, func: Function, /, *args: object, **kwargs: object) -> object:
    """Run the body of a function of torch under the mode, because it calls functions of several of these lists."""
    with mode:
        if func in handlers():
            return _keyed(mode, func, args, kwargs)
        return undispatched(func, **_VARIADIC)(*args, **kwargs)


def _keyed(mode: KeyedRandom, func: Function, args: Arguments, kwargs: Keywords) -> object:
    handler = handlers().get(func)
    return func(*args, **kwargs) if handler is None else handler(mode, func, *args, **kwargs)


def _cast(
    args: Arguments, kwargs: Keywords, those: frozenset[torch.dtype], dtype: torch.dtype
) -> tuple[Arguments, Keywords]:
    def cast(value: Any) -> Any:
        if isinstance(value, Tensor):
            return value.to(dtype) if value.dtype in those else value
        return type(value)([cast(v) for v in value]) if type(value) in (list, tuple) else value

    return tuple([cast(a) for a in args]), {name: cast(a) for name, a in kwargs.items()}


def _dtypes(args: Arguments, kwargs: Keywords) -> set[torch.dtype]:
    def tensors(values: Iterable[Any]) -> Iterator[Tensor]:
        for value in values:
            if isinstance(value, Tensor):
                yield value
            elif type(value) in (list, tuple):
                yield from tensors(value)

    return {t.dtype for t in tensors([*args, *kwargs.values()])}


_VARIADIC = {"has_torch_function_variadic": lambda *tensors: False}
_NAMESPACES = (torch, torch.Tensor, F, torch.special, torch.linalg)


def _functions(names: str) -> set[Any]:
    """Return the functions and methods of these names in all namespaces of torch that have them."""
    return {getattr(namespace, name) for name in names.split() for namespace in _NAMESPACES if hasattr(namespace, name)}


@functools.cache
def losses() -> Mapping[Any, Handler]:
    """Return the handlers of a policy under which only losses compute in float32, all else in the half precision."""
    return {**handlers(), **dict.fromkeys(_functions(_LOSSES), _widened), **_fused()}


@functools.cache
def autocast_list() -> Mapping[Any, Handler]:
    """Return the handlers of a mixed policy: each function computes in the dtype that autocast would choose for it.

    Functions of the float32 list cast half operands to float32 and return float32. Products of two dtypes are computed
    in the half precision, functions of one dtype in float32, and writes in the dtype of the tensor written to.
    """
    table: dict[Any, Handler] = dict(handlers())
    for names, handler in (
        (" ".join([_LOSSES, _POINTWISE, _NORMS, _REDUCTIONS]), _widened),
        (_WITH_DTYPE, _accumulated),
        (_RESIZED, _resized),
        (_PRODUCTS, _multiplied),
        (_PROMOTED, _promoted),
        (_WRITTEN, _written),
    ):
        table.update(dict.fromkeys(_functions(names), handler))
    return {**table, **_fused(), F.multi_head_attention_forward: _within}


def of(policy: Policy) -> Mapping[Any, Handler] | None:
    """Return the handlers of a policy: None if it computes nothing in a half precision."""
    computed = {policy.compute, *(rule.compute for rule in policy.rules)}
    if not computed & HALVES:
        return None
    if (policy.master or policy.param) not in HALVES:
        return autocast_list()
    return None if policy.output in HALVES else losses()


def _fused() -> dict[Any, Handler]:
    return dict.fromkeys(_functions("linear_cross_entropy"), _within)
