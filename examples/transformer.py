"""A transformer of any size on the source code of Python's standard library: `float8_transformer.py`,
`tensor_parallel_gpt.py` and `zero_stages.py` train it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from gpt import read
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, scaled_dot_product_attention, silu

import purestep as ps

BYTES = 256  # the vocabulary


@dataclass(frozen=True)
class Size:
    """The size of a transformer.

    Args:
        width: of its hidden states.
        layers: its blocks.
        heads: of the attention.
        context: bytes that it sees.
    """

    width: int = 64
    layers: int = 2
    heads: int = 4
    context: int = 64


class Block(nn.Module):
    """Attention, and a gated network of two layers, each with a norm before it."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        width, hidden = size.width, 4 * size.width
        self.heads = size.heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.gate, self.up = (nn.Linear(width, hidden, bias=False) for _ in range(2))
        self.down = nn.Linear(hidden, width, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))
        h = self.norm2(x)
        return x + self.down(silu(self.gate(h)) * self.up(h))


class Transformer(nn.Module):
    """Logits of the byte that follows each byte: int64[batch, context] to float[batch, context, 256]."""

    def __init__(self, size: Size) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(BYTES, size.width), nn.Embedding(size.context, size.width)
        self.blocks = nn.ModuleList(Block(size) for _ in range(size.layers))
        self.norm = nn.LayerNorm(size.width)
        self.head = nn.Linear(size.width, BYTES, bias=False)
        for parameter in self.parameters():
            if parameter.ndim == 2:
                nn.init.normal_(parameter, std=0.02)

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position.weight[: x.shape[1]]
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))


def loss_fn(net: nn.Module, batch: dict[str, Tensor]) -> Tensor:
    return cross_entropy(net(batch["x"]).flatten(0, 1), batch["y"].flatten())


def batches(context: int, batch: int, megabytes: float) -> tuple[ps.data.Batches, ps.data.Batches]:
    """Return batches to train on, and batches of the last twentieth of the text, which are held out."""
    text = torch.from_numpy(read(megabytes).astype("int64"))
    count = (len(text) - 1) // context
    samples = {"x": text[: count * context].view(count, -1), "y": text[1 : count * context + 1].view(count, -1)}
    cut = count - count // 20
    train = {name: column[:cut].numpy() for name, column in samples.items()}
    held_out = {name: column[cut:].numpy() for name, column in samples.items()}
    return ps.data.batches(train, batch, seed=0), ps.data.batches(held_out, batch, shuffle=False)


def optimizer(learning_rate: float, steps: int) -> ps.optim.GradientTransformation:
    """Return AdamW under a schedule with a warm-up."""
    schedule = ps.optim.warmup_cosine_decay_schedule(0.0, learning_rate, warmup_steps=steps // 10, decay_steps=steps)
    return ps.optim.chain(ps.optim.clip_by_global_norm(1.0), ps.optim.adamw(schedule, weight_decay=0.1))
