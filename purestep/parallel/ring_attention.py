"""Ring attention: keys and values go round the ranks of a team, and each folds them into the output of its queries.

A part attends to one part of the keys at a time. What it has so far is joined with the next block by the log-sum-exp of
their scores, so no rank has scores, keys or values of a whole sequence. Part i folds the parts i, i - 1, ..., 0, and
then those from the last down to i + 1; gradients of keys are added in the reverse order. That is the order in which
they arrive on any number of ranks, so the bits depend on the number of parts alone.

References: Liu et al., "Ring Attention with Blockwise Transformers for Near-Infinite Context", arXiv 2310.01889; Dao et
al., "FlashAttention", arXiv 2205.14135.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from purestep import _torch, random
from purestep.errors import ConfigError, explain
from purestep.parallel._torch import arrived, pass_on
from purestep.parallel.split_tensor import Split, aligned, split
from purestep.parallel.team import Team

Rows = Sequence[Sequence[Tensor]]  # for each part of a run its tensors

# Elements to a multiple of which each tensor is filled up in a message: at least a line of the cache, because the bits
# of a product depend on where in memory its operands lie.
_LINE = 64


@dataclasses.dataclass(frozen=True)
class _How:
    """What is computed of each block.

    Attributes:
        causal: whether a query sees the keys up to its own position only.
        scale: of the scores.
        queries, keys: positions, of the whole sequence.
        parts: into how many it is cut.
        shared: heads of queries that share one of keys.
        rate: of dropout.
    """

    causal: bool
    scale: float
    queries: int
    keys: int
    parts: int
    shared: int
    rate: float


def attention(
    query: Split,
    key: Split,
    value: Split,
    mask: Any,
    causal: bool,
    scale: float | None,
    gqa: bool,
    rate: float = 0.0,
    drawn: Tensor | None = None,
) -> Split:
    """Attend with the queries of each part to the keys of all parts: `[..., positions, width]`.

    Args:
        query, key, value: cut into the same number of runs of positions.
        mask: bool or floating-point, `[..., positions, positions]`; or None.
        causal: whether a query sees the keys up to its own position only.
        scale: of the scores; `width ** -0.5` by default.
        gqa: whether several heads of queries share one of keys.
        rate: of dropout of the weights.
        drawn: key of that draw, int64[2]. The mask is that of one process.

    Raises:
        ConfigError: the mask is trained.
    """
    team = query.team
    if isinstance(mask, Tensor) and mask.requires_grad and torch.is_grad_enabled():
        _refuse_trained(mask)
    masks = (None,) * team.own if mask is None else aligned(mask, query)
    shared = query.shape[-3] // key.shape[-3] if gqa else 1
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    how = _How(causal, scale, query.shape[-2], key.shape[-2], team.parts, shared, rate)
    outs = _Ring.apply(team, how, drawn, *masks, *query.parts, *key.parts, *value.parts)
    return split(outs, query.at, query.blocks, team)


def _refuse_trained(mask: Tensor) -> None:
    raise ConfigError(
        explain(
            "ring attention has no gradient of an attention mask",
            where=f"attn_mask: {mask.dtype}{list(mask.shape)} requires gradients",
            why="scores exist a block at a time, and only gradients of queries, keys and values are kept of them",
            instead='ps.sharding.context_parallel(..., attention="gather")\nor attn_mask=bias.detach()',
        )
    )


class _Ring(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, team: Team, how: _How, drawn: Tensor | None, *given: Any) -> tuple[Tensor, ...]:
        masks, queries, keys, values = (given[i * team.own : (i + 1) * team.own] for i in range(4))
        # Alike on every number of ranks: queries in memory of their own, keys and values as they lie in a message.
        queries, rows = tuple(x.contiguous() for x in queries), list(zip(keys, values, strict=True))
        kinds = [x.shape for x in rows[0]]
        ctx.how, ctx.kinds, kept = (team, how), kinds, _packed(rows)
        found: dict[int, tuple[Tensor, Tensor]] = {}

        def fold(turn: int, run: Rows) -> None:
            for i, j, n, m in _pairs(team, turn, how.causal):
                new = _Block(how, i, j, masks[n], drawn).attend(queries[n], *run[m])
                found[n] = _joined(found[n], new) if n in found else (new[0].to(new[1].dtype), new[1])

        # A function mode, such as one that casts, has seen the call: it is not to see what the call is made of.
        with _torch.no_torch_function():
            sent = kept
            for turn in range(team.size):
                coming = _begun(team, sent) if turn + 1 < team.size else None
                fold(turn, _unpacked(sent, kinds))
                sent = kept if coming is None else arrived(coming).view(kept.shape)
            fold(team.size, _unpacked(kept, kinds))
            outs = [found[n][0].to(queries[0].dtype) for n in range(team.own)]
        sums = [found[n][1] for n in range(team.own)]
        ctx.save_for_backward(drawn, kept, *masks, *queries, *outs, *sums)
        return tuple(outs)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Any, ...]:
        (team, how), kinds = ctx.how, ctx.kinds
        drawn, kept, *saved = ctx.saved_tensors
        masks, queries, outs, sums = (saved[i * team.own : (i + 1) * team.own] for i in range(4))
        grads, sums = tuple(x.contiguous() for x in grads), [_finite(x) for x in sums]
        wide = sums[0].dtype
        to_queries = [torch.zeros_like(q, dtype=wide) for q in queries]
        flow: list[Sequence[Tensor]] = [[kept.new_zeros(shape, dtype=wide) for shape in kinds] for _ in range(team.own)]

        def fold(turn: int, run: Rows) -> None:
            for i, j, n, m in _pairs(team, turn, how.causal):
                block = _Block(how, i, j, masks[n], drawn)
                key, value = run[m]
                new = block.gradients(grads[n], queries[n], key, value, outs[n], sums[n])
                to_queries[n] = to_queries[n] + new[0]
                flow[m] = [x + y for x, y in zip(flow[m], new[1:], strict=True)]

        with _torch.no_torch_function():
            sent = kept
            for turn in range(team.size):
                coming = _begun(team, sent) if turn + 1 < team.size else None
                fold(turn, _unpacked(sent, kinds))
                sent = kept if coming is None else arrived(coming).view(kept.shape)
                if team.size > 1:  # the sums go along with what they are gradients of, and come home
                    leaving, flow = _packed(flow), []
                    flow = _unpacked(arrived(_begun(team, leaving)).view(team.own, -1), kinds)
                    del leaving
            fold(team.size, _unpacked(kept, kinds))
        to_rows = [x.to(kept.dtype) for which in (0, 1) for x in [pair[which] for pair in flow]]
        return None, None, None, *(None,) * team.own, *(x.to(kept.dtype) for x in to_queries), *to_rows


def _pairs(team: Team, turn: int, causal: bool) -> list[tuple[int, int, int, int]]:
    """Return the numbers of the parts of queries and keys that meet in a turn, in order; and their places in the runs.

    In turn 0 a rank has its own keys, in turn 1 those of the rank before it, and after as many turns as there are ranks
    what it had put off: its own keys that follow its queries.
    """
    mine = team.numbers
    start = (team.rank - turn) % team.size * team.own
    met = [(i, j) for i in mine for j in reversed(range(start, start + team.own)) if not causal or j <= i]
    if turn in (0, team.size):
        met = [(i, j) for i, j in met if (j <= i) == (turn == 0)]
    return [(i, j, i - mine.start, j - start) for i, j in met]


def _joined(a: tuple[Tensor, Tensor], b: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Return the output over the keys of two blocks, and the log of the sum of their scores."""
    total = torch.logaddexp(a[1], b[1])
    one, other = ((x[1] - _finite(total)).exp().unsqueeze(-1) for x in (a, b))
    return a[0] * one + b[0] * other, total


def _finite(sums: Tensor) -> Tensor:
    """Where a query sees no key, 0 in place of the log of 0: its weights are then 0, and no NaN."""
    return sums.masked_fill(sums == -math.inf, 0.0)


# --- messages ---------------------------------------------------------------------------------------------------------


def _packed(rows: Rows) -> Tensor:
    """Return `[parts, n]`: the keys and the values of each part of a run."""
    pieces = [y for row in rows for x in row for y in (x.reshape(-1), x.new_zeros(-x.numel() % _LINE))]
    return torch.cat(pieces).view(len(rows), -1)


def _unpacked(sent: Tensor, kinds: Sequence[torch.Size]) -> list[Sequence[Tensor]]:
    lengths = [kind.numel() + -kind.numel() % _LINE for kind in kinds]
    return [
        [x[: kind.numel()].view(kind) for x, kind in zip(row.split(lengths), kinds, strict=True)]
        for row in sent.unbind()
    ]


def _begun(team: Team, sent: Tensor) -> Tensor:
    return pass_on(sent.view(-1), team.size, team.rank, team.name)


# --- one part of the queries and one of the keys ----------------------------------------------------------------------


class _Block:
    """Attention of one part of the queries to one part of the keys.

    Args:
        how: what is computed.
        i, j: numbers of the parts.
        mask: of the queries of the part and all keys.
        drawn: key of dropout.
    """

    def __init__(self, how: _How, i: int, j: int, mask: Tensor | None, drawn: Tensor | None) -> None:
        self.how, self.drawn, self.diagonal = how, drawn, how.causal and i == j
        self.start = i * (how.queries // how.parts), j * (how.keys // how.parts)
        if mask is not None and mask.shape[-1] > 1:
            mask = mask.narrow(-1, self.start[1], how.keys // how.parts)
        self.mask = mask

    def attend(self, q: Tensor, k: Tensor, v: Tensor) -> tuple[Tensor, Tensor]:
        """Return the output `[..., m, width]`, and log-sums of scores `[..., m]`, -inf where it sees none."""
        k, v = self._repeated(k), self._repeated(v)
        if self._fused(q, v):
            bias = self._bias(q, k)
            out, sums = _torch.cpu_attention(q, k, v, 0.0, self.diagonal, attn_mask=bias, scale=self.how.scale)
            if bias is not None:  # the kernel has a sum of 1 there
                sums = sums.masked_fill((bias == -math.inf).all(-1), -math.inf)
            return out, sums
        scores = self._scores(q, k)
        sums = scores.logsumexp(-1)
        weights = (scores - _finite(sums).unsqueeze(-1)).exp()
        return self._dropped(weights) @ v.to(weights.dtype), sums

    def gradients(self, grad: Tensor, q: Tensor, k: Tensor, v: Tensor, out: Tensor, sums: Tensor) -> list[Tensor]:
        """Return the gradients of queries, keys and values, of output and log-sums over all keys, which are finite."""
        k, v = self._repeated(k), self._repeated(v)
        if self._fused(q, v):
            found: Sequence[Tensor] = _torch.cpu_attention_backward(
                grad, q, k, v, out, sums, 0.0, self.diagonal, attn_mask=self._bias(q, k), scale=self.how.scale
            )
        else:
            weights = (self._scores(q, k) - sums.unsqueeze(-1)).exp()
            q, k, v, out, grad = (x.to(weights.dtype) for x in (q, k, v, out, grad))
            of_weights = self._dropped(grad @ v.mT) - (grad * out).sum(-1, keepdim=True)
            scores = weights * of_weights * self.how.scale
            found = scores @ k, scores.mT @ q, self._dropped(weights).mT @ grad
        to_q, to_k, to_v = (x.to(sums.dtype) for x in found)
        return [to_q, self._summed(to_k), self._summed(to_v)]

    def _fused(self, q: Tensor, v: Tensor) -> bool:
        return q.device.type == "cpu" and self.drawn is None and q.ndim == 4 and q.shape[-1] == v.shape[-1]

    def _repeated(self, x: Tensor) -> Tensor:
        return x if self.how.shared == 1 else x.repeat_interleave(self.how.shared, -3)

    def _summed(self, x: Tensor) -> Tensor:
        return x if self.how.shared == 1 else x.unflatten(-3, (-1, self.how.shared)).sum(-3)

    def _bias(self, q: Tensor, k: Tensor) -> Tensor | None:
        if self.mask is None:
            return None
        bias = self.mask
        if bias.dtype == torch.bool:
            bias = torch.zeros(bias.shape, dtype=q.dtype, device=q.device).masked_fill(~bias, -math.inf)
        bias = bias.to(q.dtype).expand(*bias.shape[:-1], k.shape[-2])
        return bias[(None,) * (4 - bias.ndim)]

    def _scores(self, q: Tensor, k: Tensor) -> Tensor:
        wide = torch.promote_types(q.dtype, torch.float32)
        scores = q.to(wide) @ k.to(wide).mT * self.how.scale
        if self.diagonal:
            seen = torch.ones(scores.shape[-2:], dtype=torch.bool, device=q.device).tril()
            scores = scores.masked_fill(~seen, -math.inf)
        if self.mask is None:
            return scores
        return scores.masked_fill(~self.mask, -math.inf) if self.mask.dtype == torch.bool else scores + self.mask

    def _dropped(self, weights: Tensor) -> Tensor:
        """Drop what one process drops: an element of the weights is drawn by its place in those of all positions."""
        if self.drawn is None:
            return weights
        how, (m, n), device = self.how, weights.shape[-2:], weights.device
        rows = torch.arange(self.start[0], self.start[0] + m, device=device)
        columns = torch.arange(self.start[1], self.start[1] + n, device=device)
        outer = torch.arange(weights.shape[:-2].numel(), device=device).view(*weights.shape[:-2], 1, 1)
        index = (outer * how.queries + rows.unsqueeze(-1)) * how.keys + columns
        drop = random.bernoulli(self.drawn, how.rate, index.shape, index=index, device=device)
        return torch.where(drop, 0.0, weights * (0.0 if how.rate == 1.0 else 1.0 / (1.0 - how.rate)))
