"""The models as torch modules. Every one returns logits [samples, classes] for `cross_entropy`."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class Mlp(nn.Module):
    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        widths = sizes["widths"]
        self.count = len(widths) - 1
        for i in range(self.count):
            self.add_module(f"layer{i}", nn.Linear(widths[i], widths[i + 1]))

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.count):
            x = getattr(self, f"layer{i}")(x)
            x = F.relu(x) if i < self.count - 1 else x
        return x


class Block(nn.Module):
    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
        self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)

    def forward(self, x: Tensor) -> Tensor:
        batch, length, width = x.shape
        qkv = self.qkv(self.norm1(x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(qkv[0], qkv[1], qkv[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        return x + self.down(F.gelu(self.up(self.norm2(x)), approximate="tanh"))


class Gpt(nn.Module):
    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        width, self.layers = sizes["width"], sizes["layers"]
        self.embed = nn.Embedding(sizes["vocabulary"], width)
        self.embed_position = nn.Embedding(sizes["length"], width)
        for i in range(self.layers):
            self.add_module(f"block{i}", Block(width, sizes["heads"]))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, sizes["vocabulary"])

    def forward(self, x: Tensor) -> Tensor:
        h = self.embed(x) + self.embed_position(torch.arange(x.shape[1], device=x.device))
        for i in range(self.layers):
            h = getattr(self, f"block{i}")(h)
        return self.head(self.norm(h)).flatten(0, 1)


class Cnn(nn.Module):
    """Convolution, batch norm, ReLU, max pooling, three times; then the mean over the image and a linear layer."""

    def __init__(self, sizes: dict[str, Any]) -> None:
        super().__init__()
        channels = sizes["channels"]
        self.count = len(channels) - 1
        for i in range(self.count):
            self.add_module(f"conv{i}", nn.Conv2d(channels[i], channels[i + 1], 3, padding=1, bias=False))
            self.add_module(f"norm{i}", nn.BatchNorm2d(channels[i + 1]))
        self.head = nn.Linear(channels[-1], 10)

    def forward(self, x: Tensor) -> Tensor:
        for i in range(self.count):
            x = F.max_pool2d(F.relu(getattr(self, f"norm{i}")(getattr(self, f"conv{i}")(x))), 2)
        return self.head(x.mean((2, 3)))


MODELS = {"mlp": Mlp, "gpt": Gpt, "cnn": Cnn}
