"""Models of the sharding tests."""

from __future__ import annotations

import torch
from torch import nn


class Attention(nn.Module):
    def __init__(self, width: int, kv: int) -> None:
        super().__init__()
        self.q, self.o = nn.Linear(width, width, bias=False), nn.Linear(width, width, bias=False)
        self.k, self.v = nn.Linear(width, kv, bias=False), nn.Linear(width, kv, bias=False)


class Llama(nn.Module):
    """The parameters of a llama-like transformer; there is nothing to call."""

    def __init__(self, blocks: int, width: int, hidden: int, kv: int, words: int) -> None:
        super().__init__()
        self.embed = nn.Embedding(words, width)
        self.blocks = nn.ModuleList(
            nn.ModuleDict(
                {
                    "attention": Attention(width, kv),
                    "gate": nn.Linear(width, hidden, bias=False),
                    "up": nn.Linear(width, hidden, bias=False),
                    "down": nn.Linear(hidden, width, bias=False),
                    "norm1": nn.RMSNorm(width),
                    "norm2": nn.RMSNorm(width),
                }
            )
            for _ in range(blocks)
        )
        self.norm = nn.RMSNorm(width)
        self.head = nn.Linear(width, words, bias=False)


def llama_70b() -> Llama:
    with torch.device("meta"):
        return Llama(blocks=80, width=8192, hidden=28672, kv=1024, words=128256)


def small() -> nn.Module:
    """Odd and even shapes, a buffer, no dim that everything divides."""
    return nn.Sequential(nn.Linear(8, 6), nn.BatchNorm1d(6), nn.Linear(6, 3), nn.Embedding(12, 5), nn.LayerNorm(5))


TENSOR_RULES = [
    ("*.up.weight", "tensor"),
    ("*.gate.weight", "tensor"),
    ("*.attention.[qkv].weight", "tensor"),
    ("*.down.weight", (None, "tensor")),
    ("*.attention.o.weight", (None, "tensor")),
]
