"""Context parallelism inside of a step: sequences cut into runs of positions, and the rules that such tensors have.

The first tensor that the model is called with is cut along its positions; all else follows from the rules of split
tensors. What is here needs a run of positions: attention of some queries to all keys, embeddings of some ids, the loss
of some tokens.
"""

from __future__ import annotations

import contextlib
import inspect
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purestep import tree
from purestep.errors import ConfigError, explain
from purestep.parallel import ring_attention
from purestep.parallel.split_tensor import Split, aligned, each, rule, split, whole
from purestep.parallel.team import Team

# --- the model's input ------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def cutting(team: Team, module: nn.Module) -> Iterator[None]:
    """Cut what a model is called with, while the block runs: the first tensor of two dims or more, along dim 1.

    Other arguments (positions, masks, labels) are cut where they meet it.

    Raises:
        ConfigError: the parts do not divide the positions, or there are none.
    """

    def cut(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
        team.met = True
        return _cut(team, module, args, kwargs)

    handle = module.register_forward_pre_hook(cut, prepend=True, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def check_called(team: Team, model: str) -> None:
    """Refuse a loss function that has not called the model since the team was asked to `forget`.

    Raises:
        ConfigError: says what to call.
    """
    if team.context and not team.met:
        raise ConfigError(
            explain(
                "the loss function did not call the model, so no sequence was cut",
                where=f"{model} under context parallelism",
                why="positions are cut in the arguments of the model; where the loss function calls a method of it, or "
                "a submodule, every rank computes all positions",
                instead="net(batch['x']) in the loss function, and the rest in the forward of the model",
            )
        )


def _cut(team: Team, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, Any]:
    names = [name for name in inspect.signature(module.forward).parameters if name in kwargs]
    ordered = {name: kwargs[name] for name in dict.fromkeys([*names, *kwargs])}
    leaves, structure = tree.flatten((args, list(ordered.values())))
    first = next((i for i, x in enumerate(leaves) if isinstance(x, Tensor) and x.ndim > 1), None)
    if first is None:
        raise ConfigError(
            explain(
                "the model was called without a tensor of two dims or more, so there are no positions to cut",
                where=f"{type(module).__name__}.forward under context parallelism",
                instead="net(ids) with ids int64[batch, position]",
            )
        )
    given = leaves[first]
    if isinstance(given, Split):
        return args, kwargs
    positions = given.shape[1]
    if positions % team.parts:
        raise ConfigError(
            explain(
                f"{positions} positions cannot be cut into {team.parts} equal parts",
                where=f"{tree.describe(given)}, the first argument of {type(module).__name__}.forward",
                instead=f"sequences of {positions - positions % team.parts or team.parts} positions, "
                "ps.sharding.context_parallel(parts=...) with another number, or net(ids[:, :-1]) where the loss "
                "looks one token ahead",
            )
        )
    leaves[first] = split(team.cut(given, 1, (positions,)), 1, (positions,), team)
    args, values = tree.unflatten(structure, leaves)
    return args, dict(zip(ordered, values, strict=True))


# --- rules ------------------------------------------------------------------------------------------------------------


def embedding(func: Any, ids: Split, weight: Tensor, *rest: Any) -> Any:
    """Look up the ids of each part in the whole table."""
    if isinstance(weight, Split) or weight.is_sparse:
        return NotImplemented
    outs = each(lambda part, table: func(part, table, *rest), [ids.parts, ids.team.enter(weight)])
    return split(outs, ids.at, ids.blocks, ids.team)


def attention(
    func: Any, query: Split, key: Any, value: Any, mask: Any, rate: float, causal: bool, scale: float | None, gqa: bool
) -> Any:
    """Attend with the queries of each part to all keys: `[..., positions, width]`.

    Keys and values are gathered, or go round as `ring_attention` has it; of causal attention a part computes with those
    up to its last position.
    """
    team = query.team
    if len(query.blocks) > 1 or query.cut[0] != -2 or not all(_follows(x, query) for x in (key, value)):
        return NotImplemented
    if causal and (mask is not None or key.shape[-2] != query.shape[-2]):
        return NotImplemented
    if _goes_round(query, key, value, gqa):
        return ring_attention.attention(query, key, value, mask, causal, scale, gqa)
    length = query.shape[-2] // team.parts
    keys, values = entered(key, team), entered(value, team)
    masks = aligned(mask, query)

    def one(number: int, q: Tensor, k: Tensor, v: Tensor, m: Any) -> Tensor:
        if causal:
            stop = (number + 1) * length
            k, v, m = k[..., :stop, :], v[..., :stop, :], _causal(q, stop)
        out: Tensor = func(q, k, v, m, rate, False, scale=scale, enable_gqa=gqa)
        return out

    outs = each(one, [team.numbers, query.parts, keys, values, masks])
    return split(outs, query.at, query.blocks, team)


def _causal(query: Tensor, stop: int) -> Tensor:
    """Return which of the first `stop` keys the last positions see: bool[length, stop]."""
    length = query.shape[-2]
    return torch.ones(length, stop, dtype=torch.bool, device=query.device).tril(stop - length)


@rule(Split.keyed_attention)
def keyed_attention(
    query: Split,
    key: Any,
    value: Any,
    mask: Any,
    rate: float,
    drawn: Tensor,
    causal: bool,
    scale: float | None,
    gqa: bool,
) -> Split | None:
    """Attend with dropout of the weights where keys and values go round; elsewhere by the formula: None."""
    if (causal and mask is not None) or not _goes_round(query, key, value, gqa):
        return None
    return ring_attention.attention(query, key, value, mask, causal, scale, gqa, rate, drawn)


def _goes_round(query: Split, key: Any, value: Any, gqa: bool) -> bool:
    """Tell whether keys and values are cut as the queries are, and are passed on part by part."""
    cut = all(isinstance(x, Split) and x.cut[0] == -2 and len(x.blocks) == 1 for x in (query, key, value))
    outer = slice(-3) if gqa else slice(-2)
    alike = query.shape[outer] == key.shape[outer] and key.shape[:-1] == value.shape[:-1]
    return query.team.ring and cut and alike and query.dtype == key.dtype == value.dtype


def _follows(x: Any, query: Split) -> bool:
    return not isinstance(x, Split) or (x.cut[0] == -2 and len(x.blocks) == 1)


def entered(x: Any, team: Team) -> Sequence[Tensor]:
    """Return a tensor whole for each part, of which each uses it in another way."""
    return team.gather_each(x.parts, x.at) if isinstance(x, Split) else team.enter(x)


def matmul(func: Any, a: Split, b: Split) -> Any:
    """Multiply the rows of each part `[..., m, k]` by all of `[..., k, n]`."""
    if len(b.blocks) > 1:
        return NotImplemented
    outs = each(torch.matmul, [a.parts, entered(b, a.team)])
    return split(outs, outs[0].ndim - 2, a.blocks, a.team)


def cross_entropy(
    logits: Split, target: Any, ignore_index: int, reduction: str, smoothing: float, func: Any = F.cross_entropy
) -> Any:
    """Compare the logits of some samples `[samples, classes, ...]` with their classes; the mean is that over all."""
    team, at = logits.team, logits.at - (logits.at > 1)
    blocks = logits.blocks
    targets = aligned(target, split(_like_target(logits), at, blocks, team))

    def one(part: Tensor, ids: Tensor) -> Tensor:
        loss: Tensor = func(part, ids, ignore_index=ignore_index, reduction="none", label_smoothing=smoothing)
        return loss

    losses = each(one, [logits.parts, targets])
    if reduction == "none":
        return split(losses, at, blocks, team)
    total = team.sum([x.sum() for x in losses])
    # Counted on every rank: the ids are whole, or small.
    return total if reduction == "sum" else total / (whole(target) != ignore_index).sum()


def _like_target(logits: Split) -> list[Tensor]:
    return [part.detach().select(1, 0) for part in logits.parts]


def is_run(value: Any) -> bool:
    """Tell whether a tensor is cut into runs of positions."""
    return isinstance(value, Split) and value.team.context
