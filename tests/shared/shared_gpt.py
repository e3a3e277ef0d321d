"""A GPT small enough to run on fake tensors many times: 2 blocks, tied embeddings, a prime vocabulary."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

TOKENS = {"x": torch.zeros(8, 8, dtype=torch.int64), "y": torch.zeros(8, 8, dtype=torch.int64)}


class Block(nn.Module):
    """Attention and a multilayer perceptron, each after a norm and with dropout at its end."""

    def __init__(self, width: int, heads: int, p: float) -> None:
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (nn.Linear(width, width, bias=False) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
        self.drop = nn.Dropout(p)

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm1(x)
        q, k, v = (f(h).unflatten(-1, (self.heads, -1)).transpose(1, 2) for f in (self.query, self.key, self.value))
        x = x + self.drop(self.out(F.scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2)))
        return x + self.drop(self.down(F.gelu(self.up(self.norm2(x)))))


class TinyGPT(nn.Module):
    """The whole model; `p` is its dropout."""

    def __init__(self, width: int = 12, heads: int = 4, p: float = 0.0) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(17, width), nn.Embedding(8, width)
        self.blocks = nn.ModuleList(Block(width, heads, p) for _ in range(2))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, 17, bias=False)
        self.head.weight = self.token.weight

    def forward(self, x: Tensor) -> Tensor:
        h = self.token(x) + self.position(torch.arange(x.shape[1], device=x.device))
        for block in self.blocks:
            h = block(h)
        return self.head(self.norm(h))
