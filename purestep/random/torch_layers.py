"""Keyed forms of the layers that draw: dropout of all kinds, attention, RNNs, randomised activations and pooling.

Each handler has the signature of the function it stands for, after `(mode, func)`. With nothing to draw it calls
`func`, so the bits are those of torch.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import torch
import torch.nn.functional as F
from torch import Tensor

from purestep import _torch, random
from purestep.random import card_attention, card_dropout
from purestep.random.torch_mode import Function, KeyedRandom, rate, undispatched


def _dropout(
    mode: KeyedRandom, func: Function, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
) -> Tensor:
    if not training or rate(p, "dropout") == 0.0:
        return input
    if card_dropout.takes(input):
        drop = torch.dropout_ if inplace else torch.dropout
        with card_dropout.seeded(mode.next_key("dropout"), input.device), _torch.no_torch_function():
            return drop(input, p, True)
    # In place the elements cannot be chosen by `where`, so a mask of 0 and 1 / (1 - p) is multiplied in.
    if inplace:
        return input.mul_(mode.scaled_mask("dropout", input.shape, p, input))
    return random.dropout(mode.next_key("dropout"), input, p)


def _dropout_(mode: KeyedRandom, func: Function, input: Tensor, p: float, train: bool) -> Tensor:
    return _dropout(mode, func, input, p, train, inplace=True)


def _channel_shape(input: Tensor, spatial: int | None) -> tuple[int, ...]:
    """Shape of a mask with one element a channel; an unbatched input (C, *spatial) has no leading N."""
    lead = 2 if spatial is None or input.ndim == spatial + 2 else 1
    return (*input.shape[:lead], *(1 for _ in input.shape[lead:]))


def _channel_dropout(spatial: int | None) -> Callable[..., Tensor]:
    def handler(
        mode: KeyedRandom, func: Function, input: Tensor, p: float = 0.5, training: bool = True, inplace: bool = False
    ) -> Tensor:
        if not training or rate(p, "dropout") == 0.0:
            return input
        mask = mode.scaled_mask("dropout of channels", _channel_shape(input, spatial), p, input)
        return input.mul_(mask) if inplace else input * mask

    return handler


def _alpha_dropout(per_channel: bool) -> Callable[..., Tensor]:
    def handler(
        mode: KeyedRandom, func: Function, input: Tensor, p: float = 0.5, training: bool = False, inplace: bool = False
    ) -> Tensor:
        if not training or rate(p, "alpha_dropout") == 0.0:
            return input
        shape = _channel_shape(input, None) if per_channel else tuple(input.shape)
        drop = random.bernoulli(mode.next_key("alpha_dropout"), p, shape, device=input.device)
        # Klambauer et al., "Self-normalizing neural networks" (2017): dropped units take alpha', then mean and
        # variance are restored.
        alpha = -1.7580993408473766
        if p == 1.0:
            return torch.zeros_like(input)
        a = 1.0 / math.sqrt((1.0 - p) * (1.0 + p * alpha * alpha))
        out = torch.where(drop, alpha * a, input * a) - a * alpha * p
        return input.copy_(out) if inplace else out

    return handler


@runtime_checkable
class Attending(Protocol):
    """A tensor that draws the dropout of its attention weights in a way of its own, as one that is cut into parts."""

    def keyed_attention(
        self,
        key: Tensor,
        value: Tensor,
        mask: Tensor | None,
        rate: float,
        drawn: Tensor,
        causal: bool,
        scale: float | None,
        gqa: bool,
    ) -> Tensor | None:
        """Return `F.scaled_dot_product_attention` with a mask drawn from the key `drawn`; None by the formula."""


def _attention(
    mode: KeyedRandom,
    func: Function,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Tensor:
    # Without dropout torch's fused kernel, with its bits; with dropout the kernel would draw by itself, so the formula
    # that its documentation gives, unless its bits are asked for.
    if dropout_p == 0.0:
        return func(query, key, value, attn_mask, 0.0, is_causal, scale=scale, enable_gqa=enable_gqa)
    rate(dropout_p, "scaled_dot_product_attention")
    drop_key = mode.next_key("scaled_dot_product_attention")
    if isinstance(query, Attending):
        own = query.keyed_attention(key, value, attn_mask, dropout_p, drop_key, is_causal, scale, enable_gqa)
        if own is not None:
            return own
    given = query, key, value, attn_mask, dropout_p, is_causal
    if card_dropout.takes(query):
        with card_dropout.seeded(drop_key, query.device), _torch.no_torch_function():
            return F.scaled_dot_product_attention(*given, scale=scale, enable_gqa=enable_gqa)
    if card_dropout.traces(query):
        fused = card_attention.attention(drop_key, *given, scale=scale, enable_gqa=enable_gqa)
        if fused is not None:
            return fused
    if enable_gqa:
        repeats = query.shape[-3] // key.shape[-3]
        key, value = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3)
    weight = query @ key.transpose(-2, -1) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if is_causal:
        allowed = torch.ones(weight.shape[-2:], dtype=torch.bool, device=weight.device).tril()
        weight = weight.masked_fill(~allowed, -math.inf)
    if attn_mask is not None:
        boolean = attn_mask.dtype == torch.bool
        weight = weight.masked_fill(~attn_mask, -math.inf) if boolean else weight + attn_mask
    weight = torch.softmax(weight, dim=-1)
    return random.dropout(drop_key, weight, float(dropout_p)) @ value


def _multi_head_attention(mode: KeyedRandom, func: Function, *args: object, **kwargs: object) -> object:
    """Run torch's own function, with the two random functions that it calls replaced by the keyed ones."""
    # Its body does not come back to this mode (see `undispatched`), so the functions that draw are put in by name.
    keyed = undispatched(
        func,
        dropout=lambda *a, **k: _dropout(mode, F.dropout, *a, **k),
        scaled_dot_product_attention=lambda *a, **k: _attention(mode, F.scaled_dot_product_attention, *a, **k),
    )
    return keyed(*args, **kwargs)


def _rnn(mode: KeyedRandom, func: Function, *args: Any) -> tuple[Tensor, ...]:
    """Run an RNN layer by layer, with keyed dropout between the layers."""
    # Torch's kernel draws between its layers, out of reach. One layer at a time it has nothing to draw.
    # Two signatures: `(data, batch_sizes, hidden, weights, ...)` packed, `(data, hidden, weights, ...)` not.
    packed = isinstance(args[3], (list, tuple))
    (data, sizes, hidden, weights), rest = (args[:4], args[4:]) if packed else ((args[0], None, *args[1:3]), args[3:])
    biases, layers, p, train, bidirectional, *layout = rest
    if not train or p == 0.0 or layers == 1:
        return func(*args)
    directions, per_layer = (2 if bidirectional else 1), len(weights) // layers
    several = isinstance(hidden, (list, tuple))
    finals = []
    for layer in range(layers):
        # Dim 0 of a hidden state counts layers, and directions within a layer; weights are in the same order.
        rows = slice(layer * directions, (layer + 1) * directions)
        state = [h[rows] for h in hidden] if several else hidden[rows]
        of_layer = list(weights[layer * per_layer : (layer + 1) * per_layer])
        inputs = (data, sizes, state, of_layer) if packed else (data, state, of_layer)
        data, *final = func(*inputs, biases, 1, 0.0, train, bidirectional, *layout)
        finals.append(final)
        if layer < layers - 1:
            data = _dropout(mode, F.dropout, data, p, True)
    return (data, *(torch.cat(states) for states in zip(*finals, strict=True)))


def _rrelu(
    mode: KeyedRandom,
    func: Function,
    input: Tensor,
    lower: float = 1.0 / 8,
    upper: float = 1.0 / 3,
    training: bool = False,
    inplace: bool = False,
) -> Tensor:
    if not training:
        return func(input, lower, upper, training, inplace)
    key = mode.next_key("rrelu")
    slope = random.uniform(key, input.shape, minval=lower, maxval=upper, dtype=input.dtype, device=input.device)
    out = torch.where(input < 0, input * slope, input)
    return input.copy_(out) if inplace else out


def _gumbel_softmax(
    mode: KeyedRandom,
    func: Function,
    logits: Tensor,
    tau: float = 1,
    hard: bool = False,
    eps: float = 1e-10,
    dim: int = -1,
) -> Tensor:
    # In (0, 1), both ends left out, in float64: the double logarithm of an end would be infinite.
    words = random.bits(mode.next_key("gumbel_softmax"), logits.shape, device=logits.device)
    unit = (words.to(torch.float64) + 0.5) * 2.0**-32
    soft = torch.softmax((logits - torch.log(-torch.log(unit)).to(logits.dtype)) / tau, dim)
    if not hard:
        return soft
    index = soft.max(dim, keepdim=True)[1]
    # The value of the one, the gradient of the other.
    return torch.zeros_like(logits).scatter_(dim, index, 1.0) - soft.detach() + soft


def _native_dropout(
    mode: KeyedRandom, func: Function, input: Tensor, p: float, train: bool | None
) -> tuple[Tensor, Tensor]:
    if train is False:
        return input, torch.ones_like(input, dtype=torch.bool)
    drop_key = mode.next_key("native_dropout")
    kept = ~random.bernoulli(drop_key, rate(p, "native_dropout"), input.shape, device=input.device)
    return torch.where(kept, input * (0.0 if p == 1.0 else 1.0 / (1.0 - p)), 0.0), kept


def _fractional_max_pool(mode: KeyedRandom, func: Function, input: Tensor, *args: object, **kwargs: object) -> object:
    """Draw what says where the pooling regions lie, and pass it on."""
    if kwargs.get("_random_samples") is None:
        spatial = 3 if "3d" in func.__name__ else 2
        lead = (1, input.shape[0]) if input.ndim == spatial + 1 else tuple(input.shape[:2])
        key = mode.next_key(func.__name__)
        kwargs["_random_samples"] = random.uniform(key, (*lead, spatial), dtype=input.dtype, device=input.device)
    return func(input, *args, **kwargs)


HANDLERS: dict[Any, Callable[..., Any]] = {
    F.dropout: _dropout,
    torch.dropout: _dropout,
    torch.dropout_: _dropout_,
    torch.native_dropout: _native_dropout,
    F.dropout1d: _channel_dropout(1),
    F.dropout2d: _channel_dropout(2),
    F.dropout3d: _channel_dropout(3),
    torch.feature_dropout: _channel_dropout(None),
    F.alpha_dropout: _alpha_dropout(per_channel=False),
    torch.alpha_dropout: _alpha_dropout(per_channel=False),
    F.feature_alpha_dropout: _alpha_dropout(per_channel=True),
    torch.feature_alpha_dropout: _alpha_dropout(per_channel=True),
    F.scaled_dot_product_attention: _attention,
    F.multi_head_attention_forward: _multi_head_attention,
    torch.lstm: _rnn,
    torch.gru: _rnn,
    torch.rnn_tanh: _rnn,
    torch.rnn_relu: _rnn,
    F.rrelu: _rrelu,
    torch.rrelu: _rrelu,
    F.gumbel_softmax: _gumbel_softmax,
    F.fractional_max_pool2d: _fractional_max_pool,
    F.fractional_max_pool2d_with_indices: _fractional_max_pool,
    F.fractional_max_pool3d: _fractional_max_pool,
    F.fractional_max_pool3d_with_indices: _fractional_max_pool,
}
