"""Four small models for the table of plans: GPT, transformers' Llama, a ResNet, and a mixture of experts.

Each has some hundred thousand parameters, and what makes many processes hard: dropout, statistics of batches, routing
that depends on the data.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import cross_entropy, gelu, scaled_dot_product_attention

SAMPLES, LENGTH, WORDS, WIDTH, HEADS = 8, 16, 256, 96, 4


@dataclasses.dataclass(frozen=True)
class Model:
    """What is trained.

    Attributes:
        make: returns the module.
        loss_fn: `(net, batch) -> loss`.
        batch: returns the batch of a step, the same on every process.
        family: rules of tensor parallelism, None where it has none.
        experts: whether it has experts that `expert_parallel` splits.
        stages: of a pipeline, where the model calls its parts in another order than it defines them.
    """

    make: Callable[[], nn.Module]
    loss_fn: Callable[[Any, Any], Tensor]
    batch: Callable[[int], dict[str, Tensor]]
    family: str | None = None
    experts: bool = False
    stages: tuple[tuple[str, ...], ...] = ()


class Attention(nn.Module):
    """Causal self-attention."""

    def __init__(self) -> None:
        super().__init__()
        self.query, self.key, self.value, self.out = (nn.Linear(WIDTH, WIDTH) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        q, k, v = (
            layer(x).unflatten(-1, (-1, WIDTH // HEADS)).transpose(1, 2) for layer in (self.query, self.key, self.value)
        )
        return self.out(scaled_dot_product_attention(q, k, v, is_causal=True).transpose(1, 2).flatten(2))


class Dense(nn.Module):
    """The two layers between attentions."""

    def __init__(self) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(WIDTH, 4 * WIDTH), nn.Linear(4 * WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(gelu(self.up(x)))


class Feeds(nn.Module):
    """Experts as `ps.sharding.Experts` wants them: dim 0 of each parameter is that of experts."""

    def __init__(self, count: int) -> None:
        super().__init__()
        self.num_experts = count
        self.up = nn.Parameter(torch.randn(count, 2 * WIDTH, WIDTH) / WIDTH**0.5)
        self.down = nn.Parameter(torch.randn(count, WIDTH, 2 * WIDTH) / WIDTH**0.5)

    def forward(self, tokens: Tensor, chosen: Tensor, weights: Tensor) -> Tensor:
        out = torch.zeros_like(tokens)
        for expert in range(self.num_experts):
            rows, place = (chosen == expert).nonzero().unbind(1)
            made = gelu(tokens[rows] @ self.up[expert].T) @ self.down[expert].T
            out = out.index_add(0, rows, made * weights[rows, place, None])
        return out


class Mixture(nn.Module):
    """Each token goes through the two of four experts that a router likes best."""

    def __init__(self, count: int = 4, chosen: int = 2) -> None:
        super().__init__()
        self.router, self.experts, self.chosen = nn.Linear(WIDTH, count, bias=False), Feeds(count), chosen

    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(0, 1)
        weights, chosen = self.router(tokens).softmax(-1).topk(self.chosen)
        return self.experts(tokens, chosen, weights).view_as(x)


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, inner: Callable[[], nn.Module]) -> None:
        super().__init__()
        self.norm1, self.attn, self.norm2, self.mlp = nn.LayerNorm(WIDTH), Attention(), nn.LayerNorm(WIDTH), inner()
        self.drop = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.drop(self.attn(self.norm1(x)))
        return x + self.drop(self.mlp(self.norm2(x)))


class GPT(nn.Module):
    """A language model of two blocks."""

    def __init__(self, inner: Callable[[], nn.Module] = Dense) -> None:
        super().__init__()
        self.token, self.position = nn.Embedding(WORDS, WIDTH), nn.Embedding(LENGTH, WIDTH)
        self.blocks = nn.ModuleList([Block(inner) for _ in range(2)])
        self.norm, self.head = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WORDS)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.token(tokens) + self.position(torch.arange(tokens.shape[1]))
        for block in self.blocks:
            x = block(x)
        return self.head(self.norm(x))


def experts() -> nn.Module:
    """Return a language model with experts in place of dense layers."""
    return GPT(Mixture)


def llama() -> nn.Module:
    """Return transformers' own Llama, from random weights."""
    from transformers import LlamaConfig, LlamaForCausalLM

    heads = {"num_attention_heads": HEADS, "num_key_value_heads": HEADS, "max_position_embeddings": LENGTH}
    sizes = {"vocab_size": WORDS, "hidden_size": WIDTH, "intermediate_size": 3 * WIDTH, "num_hidden_layers": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, **heads, attention_dropout=0.1))


class Residual(nn.Module):
    """Two convolutions with batch norms, around which the input goes as it is."""

    def __init__(self, inputs: int, outputs: int, stride: int) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(inputs, outputs, 3, stride, 1, bias=False)
        self.conv2 = nn.Conv2d(outputs, outputs, 3, 1, 1, bias=False)
        self.bn1, self.bn2 = nn.BatchNorm2d(outputs), nn.BatchNorm2d(outputs)
        self.down = nn.Conv2d(inputs, outputs, 1, stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        return (self.bn2(self.conv2(self.bn1(self.conv1(x)).relu())) + self.down(x)).relu()


def resnet() -> nn.Module:
    """Return a small ResNet for images of 16 x 16."""
    layers = [Residual(3, 32, 2), Residual(32, 64, 2), Residual(64, 128, 2)]
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Dropout(0.1), nn.Linear(128, 10))


def _of_words(net: Any, batch: Any) -> Tensor:
    return cross_entropy(net(batch["x"]).flatten(0, 1), batch["y"].flatten())


def _of_llama(net: Any, batch: Any) -> Tensor:
    return cross_entropy(net(input_ids=batch["x"]).logits.flatten(0, 1), batch["y"].flatten())


def _of_images(net: Any, batch: Any) -> Tensor:
    return cross_entropy(net(batch["x"]), batch["y"])


def _words(step: int) -> dict[str, Tensor]:
    tokens = torch.randint(WORDS, (SAMPLES, LENGTH + 1), generator=torch.Generator().manual_seed(step))
    return {"x": tokens[:, :-1].contiguous(), "y": tokens[:, 1:].contiguous()}


def _images(step: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(SAMPLES, 3, 16, 16, generator=generator)
    return {"x": x, "y": torch.randint(10, (SAMPLES,), generator=generator)}


LLAMA_STAGES = (
    ("model.embed_tokens", "model.rotary_emb", "model.layers.0"),
    ("model.layers.1", "model.norm", "lm_head"),
)
MODELS = {
    "GPT": Model(GPT, _of_words, _words, "gpt"),
    "Llama of transformers": Model(llama, _of_llama, _words, "llama", stages=LLAMA_STAGES),
    "ResNet": Model(resnet, _of_images, _images),
    "MoE": Model(experts, _of_words, _words, experts=True),
}
