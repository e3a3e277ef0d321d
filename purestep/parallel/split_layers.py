"""Rules of split tensors for layers: embeddings, attention, norms, and the loss of a split vocabulary."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from purestep.parallel import split_positions
from purestep.parallel.split_math import summed
from purestep.parallel.split_tensor import Split, aligned, each, named, rule, split, split_of, whole


@rule(F.embedding, torch.embedding)
def embedding(
    func: Any,
    ids: Any,
    weight: Any,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> Any:
    """Look up rows `[rows, width]`: each part those that it has, or the columns of all."""
    if func is F.embedding and isinstance(ids, Split) and not max_norm and not sparse and not isinstance(weight, Split):
        return split_positions.embedding(func, ids, weight, padding_idx, None, norm_type, scale_grad_by_freq)
    if func is not F.embedding or not isinstance(weight, Split) or max_norm or scale_grad_by_freq or sparse:
        return NotImplemented
    ids, team = whole(ids), weight.team
    if weight.at == 1:
        return split([F.embedding(ids, part, padding_idx) for part in weight.parts], -1, weight.blocks, team)
    if len(weight.blocks) > 1:
        return NotImplemented
    rows = weight.shape[0] // team.parts
    if padding_idx is not None and padding_idx < 0:
        padding_idx += weight.shape[0]
    found = []
    for number, part in zip(team.numbers, weight.parts, strict=True):
        here = ids - number * rows
        absent = (here < 0) | (here >= rows)
        if padding_idx is not None:
            padding = padding_idx - number * rows
            padded: int | None = padding if 0 <= padding < rows else None
        else:
            padded = None
        found.append(F.embedding(here.masked_fill(absent, 0), part, padded).masked_fill(absent.unsqueeze(-1), 0.0))
    return summed(found, team)


@rule(F.scaled_dot_product_attention)
def attention(
    func: Any,
    query: Any,
    key: Any,
    value: Any,
    attn_mask: Any = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> Any:
    """Attend with the heads, or the samples, of a part: `[..., heads, positions, width]`."""
    like = split_of((query, key, value, attn_mask))
    back = like.cut[0]
    if like is query and back == -2:
        return split_positions.attention(func, query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa)
    if back > -3 or like is attn_mask:
        return NotImplemented
    alike = _cut_alike(query, key) and _cut_alike(query, value)
    if enable_gqa and not alike and back == -3:
        repeats = query.shape[-3] // key.shape[-3]
        key, value, enable_gqa = key.repeat_interleave(repeats, -3), value.repeat_interleave(repeats, -3), False
    # Heads of keys are fewer than those of queries where several share them, and parts of both belong together.
    columns = [x.parts if alike else aligned(x, like) for x in (query, key, value)] + [aligned(attn_mask, like)]
    outs = each(lambda q, k, v, m: func(q, k, v, m, dropout_p, is_causal, scale=scale, enable_gqa=enable_gqa), columns)
    return split(outs, back, like.blocks, like.team)


def _cut_alike(a: Any, b: Any) -> bool:
    """Tell whether parts of two tensors are the same shares of one dim."""
    return (
        isinstance(a, Split) and isinstance(b, Split) and a.cut[0] == b.cut[0] and len(a.blocks) == len(b.blocks) == 1
    )


@rule(F.layer_norm, torch.layer_norm)
def layer_norm(
    func: Any, x: Any, shape: Sequence[int], weight: Any = None, bias: Any = None, *rest: Any, **kw: Any
) -> Any:
    """Normalise the last dims, of which none is cut."""
    if not isinstance(x, Split) or x.at >= x.ndim - len(shape):
        return NotImplemented
    columns = [_same(weight, x), _same(bias, x)]
    outs = each(lambda part, w, b: func(part, shape, w, b, *rest, **kw), [x.parts, *columns])
    return split(outs, x.at, x.blocks, x.team)


@rule(F.rms_norm, torch.rms_norm)
def rms_norm(func: Any, x: Any, shape: Sequence[int], weight: Any = None, eps: float | None = None) -> Any:
    """Normalise the last dims, of which none is cut."""
    if not isinstance(x, Split) or x.at >= x.ndim - len(shape):
        return NotImplemented
    outs = each(lambda part, w: func(part, shape, w, eps), [x.parts, _same(weight, x)])
    return split(outs, x.at, x.blocks, x.team)


def _same(value: Any, like: Split) -> Sequence[Any]:
    return (None,) * like.team.own if value is None else like.team.enter(whole(value))


@rule(*named("glu"))
def _glu(func: Any, x: Any, dim: int = -1) -> Any:
    first, second = torch.chunk(x, 2, dim)
    return first * torch.sigmoid(second)


@rule(F.cross_entropy)
def cross_entropy(
    func: Any,
    logits: Any,
    target: Any,
    weight: Any = None,
    size_average: Any = None,
    ignore_index: int = -100,
    reduce: Any = None,
    reduction: str = "mean",
    label_smoothing: float = 0.0,
) -> Any:
    """Compare logits `[samples, classes]` whose classes are split with classes, int64[samples].

    No rank has all logits of a sample: three numbers of each sample are summed over the parts.
    """
    legacy = size_average is not None or reduce is not None or weight is not None
    if legacy or not isinstance(logits, Split) or logits.ndim < 2 or reduction not in ("mean", "sum", "none"):
        return NotImplemented
    if target.is_floating_point() or (logits.at == 1 and len(logits.blocks) > 1):
        return NotImplemented
    if logits.at != 1:
        return split_positions.cross_entropy(logits, target, ignore_index, reduction, label_smoothing)
    if logits.ndim > 2:  # [samples, classes, ...]
        shape = target.shape
        flat = logits.movedim(1, -1).reshape(-1, logits.shape[1])
        loss = F.cross_entropy(
            flat, whole(target).reshape(-1), None, None, ignore_index, None, reduction, label_smoothing
        )
        return loss.view(shape) if reduction == "none" else loss
    loss, counted = _each_sample(logits, whole(target), ignore_index, label_smoothing)
    if reduction == "none":
        return loss
    return loss.sum() if reduction == "sum" else loss.sum() / counted.sum()


def _each_sample(logits: Split, target: Tensor, ignored: int, smoothing: float) -> tuple[Tensor, Tensor]:
    """Return the loss of each sample, 0 for those that do not count, and which of them count."""
    team, classes = logits.team, logits.shape[1]
    width = classes // team.parts
    top = team.maximum([part.detach().amax(1) for part in logits.parts])
    counted = target != ignored
    found = []
    for number, part in zip(team.numbers, logits.parts, strict=True):
        shifted = part - top.unsqueeze(1)
        here = target - number * width
        absent = (here < 0) | (here >= width)
        chosen = shifted.gather(1, here.masked_fill(absent, 0).unsqueeze(1)).squeeze(1).masked_fill(absent, 0.0)
        sums = [shifted.exp().sum(1), chosen]
        found.append(torch.stack([*sums, shifted.sum(1)] if smoothing else sums))
    total = team.sum(found)
    log_sum = total[0].log()
    loss = log_sum - total[1]
    if smoothing:
        loss = (1.0 - smoothing) * loss + smoothing * (log_sum - total[2] / classes)
    return loss.masked_fill(~counted, 0.0), counted
