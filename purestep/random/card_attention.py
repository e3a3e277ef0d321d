"""Fused attention with dropout in a graph: an operator that takes its seed from a key, so that the graph is pure.

torch's fused kernels seed their dropout from the generator of the card, which is no input of a graph. While a function
is traced, `attention` lets torch choose the kernel, lay out its arguments and differentiate it, and puts the operator
`purestep::fused_attention` in place of the kernel. The operator returns the seed that the kernel used, which torch's
own backward kernel takes.
"""

from __future__ import annotations

import functools
from collections.abc import Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from purestep import _torch
from purestep.random import card_dropout
from purestep.random._torch import CUDNN_ATTENTION, EFFICIENT_ATTENTION, FLASH_ATTENTION

_SCHEMA = (
    "fused_attention(Tensor rng, str kind, Tensor query, Tensor key, Tensor value, Tensor? bias, bool logsumexp, "
    "float dropout_p, bool is_causal, float? scale) -> (Tensor, Tensor, Tensor, Tensor)"
)


def attention(rng: Tensor, *args: Any, **kwargs: Any) -> Tensor | None:
    """Return `F.scaled_dot_product_attention` of a trace, with dropout by a key; None where torch has no fused kernel.

    Args:
        rng: int64[2], the key of this call.
        *args, **kwargs: what torch's function takes.
    """
    _library()
    try:
        with _Seeded(rng), _torch.no_torch_function():
            return F.scaled_dot_product_attention(*args, **kwargs)
    except _NotFused:
        return None


class _NotFused(Exception):
    """torch writes attention out for these arguments; what it has added to the graph so far is not used."""


class _Seeded(_torch.DispatchMode):
    """Puts the operator in place of torch's fused kernels. It runs below autograd, which has its own part by then."""

    def __init__(self, rng: Tensor) -> None:
        super().__init__()
        self.rng = rng

    def __torch_dispatch__(
        self, func: Any, kinds: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _KINDS:
            return _in_place(self.rng, func, args, kwargs or {})
        if torch.Tag.nondeterministic_seeded in func.tags:
            raise _NotFused
        return func(*args, **(kwargs or {}))


# --- the operator in place of torch's kernels -------------------------------------------------------------------------


def _in_place(rng: Tensor, kernel: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
    """Call the operator with the arguments of a kernel, and return what the kernel returns."""
    schema = _torch.schema_of(kernel).arguments
    given: dict[str, Any] = {x.name: x.default_value for x in schema if x.has_default_value()}
    given |= dict(zip([x.name for x in schema], args, strict=False)) | kwargs
    query, key = given["query"], given["key"]
    found: tuple[Any, ...] = _operator()(
        *(rng, _KINDS[kernel], query, key, given["value"], given.get("attn_bias")),
        *(given.get("compute_log_sumexp", True), given["dropout_p"], given["is_causal"], given["scale"]),
    )
    return found if kernel is EFFICIENT_ATTENTION else _with_lengths(query, key, found)


def _with_lengths(query: Tensor, key: Tensor, found: tuple[Tensor, ...]) -> tuple[Any, ...]:
    """Return what two of the kernels return: lengths of sequences besides, and a mask for debugging that is empty."""
    out, logsumexp, seed, offset = found
    return out, logsumexp, None, None, query.shape[2], key.shape[2], seed, offset, query.new_empty(0)


_KINDS = {FLASH_ATTENTION: "flash", EFFICIENT_ATTENTION: "efficient", CUDNN_ATTENTION: "cudnn"}


# --- the operator -----------------------------------------------------------------------------------------------------


@functools.cache
def _library() -> torch.library.Library:
    library = torch.library.Library("purestep", "FRAGMENT")
    library.define(_SCHEMA)
    library.impl("fused_attention", _attended, "CUDA")
    # The key may lie on the host and the rest on the card, so what it returns is said for fake tensors of two devices.
    torch.library.register_fake("purestep::fused_attention", _shapes, lib=library)
    return library


def implement(device: str) -> None:
    """Register torch's kernels as the operator's implementation for another kind of device."""
    _library().impl("fused_attention", _attended, device)


def is_operator(target: object) -> bool:
    """Tell whether a node of a graph calls the operator."""
    return isinstance(target, _torch.OpOverload) and target.name() == "purestep::fused_attention"


def _operator() -> Any:
    return torch.ops.purestep.fused_attention.default


def _attended(rng: Tensor, kind: str, query: Tensor, *rest: Any) -> tuple[Tensor, ...]:
    with card_dropout.seeded(rng, query.device):
        return _shapes(rng, kind, query, *rest)


def _shapes(
    rng: Tensor,
    kind: str,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    bias: Tensor | None,
    logsumexp: bool,
    dropout_p: float,
    is_causal: bool,
    scale: float | None,
) -> tuple[Tensor, ...]:
    """Call the kernel of torch; of fake tensors it makes shapes."""
    if kind == "flash":
        found = FLASH_ATTENTION(query, key, value, dropout_p, is_causal, scale=scale)
    else:
        kernel = EFFICIENT_ATTENTION if kind == "efficient" else CUDNN_ATTENTION
        found = kernel(query, key, value, bias, logsumexp, dropout_p, is_causal, scale=scale)
    return _four(found)


def _four(found: Iterable[Any]) -> tuple[Tensor, ...]:
    """Return output, logarithm of sums, seed and offset of what a kernel returns."""
    out, logsumexp, *rest = found
    seed, offset = rest if len(rest) == 2 else rest[4:6]
    return out, logsumexp, seed, offset
