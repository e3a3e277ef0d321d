"""The same models in flax, and the way from torch's weights to flax's."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from flax import linen as nn

EPS = 1e-5  # torch's, of both norms


class Mlp(nn.Module):
    sizes: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        widths = self.sizes["widths"][1:]
        for i, width in enumerate(widths):
            x = nn.Dense(width, name=f"layer{i}")(x)
            x = nn.relu(x) if i < len(widths) - 1 else x
        return x


class Block(nn.Module):
    width: int
    heads: int

    @nn.compact
    def __call__(self, x: Any) -> Any:
        batch, length, width = x.shape
        qkv = nn.Dense(3 * width, name="qkv")(nn.LayerNorm(EPS, name="norm1")(x))
        q, k, v = jnp.moveaxis(qkv.reshape(batch, length, 3, self.heads, width // self.heads), 2, 0)
        mixed = jax.nn.dot_product_attention(q, k, v, is_causal=True).reshape(batch, length, width)
        x = x + nn.Dense(width, name="out")(mixed)
        up = nn.Dense(4 * width, name="up")(nn.LayerNorm(EPS, name="norm2")(x))
        return x + nn.Dense(width, name="down")(nn.gelu(up, approximate=True))


class Gpt(nn.Module):
    sizes: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        s = self.sizes
        positions = nn.Embed(s["length"], s["width"], name="embed_position")(jnp.arange(x.shape[1]))
        h = nn.Embed(s["vocabulary"], s["width"], name="embed")(x) + positions
        for i in range(s["layers"]):
            h = Block(s["width"], s["heads"], name=f"block{i}")(h)
        logits = nn.Dense(s["vocabulary"], name="head")(nn.LayerNorm(EPS, name="norm")(h))
        return logits.reshape(-1, s["vocabulary"])


class Cnn(nn.Module):
    sizes: Any

    @nn.compact
    def __call__(self, x: Any) -> Any:
        for i, width in enumerate(self.sizes["channels"][1:]):
            x = nn.Conv(width, (3, 3), use_bias=False, name=f"conv{i}")(x)
            x = nn.BatchNorm(use_running_average=False, momentum=0.9, epsilon=EPS, name=f"norm{i}")(x)
            x = nn.max_pool(nn.relu(x), (2, 2), (2, 2))
        return nn.Dense(10, name="head")(x.mean((1, 2)))


MODELS = {"mlp": Mlp, "gpt": Gpt, "cnn": Cnn}


def from_torch(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
    """Turn weights by torch name into flax's nested dict, in flax's layouts."""
    params: dict[str, Any] = {}
    for name, array in arrays.items():
        *path, leaf = name.split(".")
        node = params
        for part in path:
            node = node.setdefault(part, {})
        if leaf == "bias":
            node["bias"] = jnp.asarray(array)
        elif "embed" in path[-1]:
            node["embedding"] = jnp.asarray(array)
        elif array.ndim == 1:
            node["scale"] = jnp.asarray(array)
        else:
            node["kernel"] = jnp.asarray(array.T if array.ndim == 2 else array.transpose(2, 3, 1, 0))
    return params


def images_last(x: np.ndarray) -> np.ndarray:
    """Turn [N, C, H, W] into flax's [N, H, W, C]; leave the rest as it is."""
    return x.transpose(0, 2, 3, 1).copy() if x.ndim == 4 else x
