"""The layers that `ps.lora` puts in the place of linear layers and embeddings: those, with two thin matrices.

Each has the weight of the layer that it adapts under the name that it had there, and makes that layer again.
"""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from purestep.module_tensors import Adapted


class LoraLayer(Adapted):
    """A layer with a low-rank update `alpha / rank * B A` of its weight, or of the transposed weight.

    Attributes:
        weight: of the layer that it adapts.
        lora_A: [rank, in], float32.
        lora_B: [out, rank], float32. One of the two begins at zero, so that the model begins as it is without adapters.
        scale: alpha / rank.
        transposed: whether the weight is [in, out].
    """

    adapters = ("lora_A", "lora_B")
    transposed: ClassVar[bool] = False
    weight: Tensor
    lora_A: nn.Parameter
    lora_B: nn.Parameter
    rank: int
    scale: float
    dropout: float

    def _adapt(self, layer: nn.Module, sizes: tuple[int, int], rank: int, alpha: float, dropout: float) -> None:
        """Add matrices of zeros for (in, out) features, beside the frozen tensors of a layer."""
        for name, tensor in layer.named_parameters(recurse=False):
            self.register_parameter(name, tensor)
        self.rank, self.scale, self.dropout = rank, alpha / rank, dropout
        device = self.weight.device
        self.lora_A = nn.Parameter(torch.zeros(rank, sizes[0], device=device, dtype=torch.float32))
        self.lora_B = nn.Parameter(torch.zeros(sizes[1], rank, device=device, dtype=torch.float32))
        self.train(layer.training)

    def _draw(self) -> None:
        """Draw A as PEFT does: uniformly, with the variance of the weights of `nn.Linear`."""
        nn.init.kaiming_uniform_(self.lora_A, a=math.sqrt(5))

    def _updated(self, frozen: Tensor, input: Tensor) -> Tensor:
        kept = F.dropout(input, self.dropout, self.training) if self.dropout else input
        update = F.linear(F.linear(kept.to(self.lora_A.dtype), self.lora_A), self.lora_B)
        return frozen + (update * self.scale).to(frozen.dtype)

    @abstractmethod
    def without(self) -> nn.Module:
        """Return the layer without its adapters; it has the same weight."""

    def _restored(self, plain: nn.Module) -> nn.Module:
        for name, tensor in self.named_parameters(recurse=False):
            if name not in self.adapters:
                setattr(plain, name, tensor)
        return plain.train(self.training)

    def _described(self) -> str:
        return f"rank={self.rank}, scale={self.scale}, dropout={self.dropout}"


class LoraLinear(nn.Linear, LoraLayer):
    """A linear layer with a low-rank update: `x W^T + b + alpha / rank * dropout(x) A^T B^T`."""

    def __init__(self, linear: nn.Linear, rank: int, alpha: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self._adapt(linear, (self.in_features, self.out_features), rank, alpha, dropout)
        self.register_parameter("bias", linear.bias)  # of a layer without one, too
        self._draw()

    def forward(self, input: Tensor) -> Tensor:
        return self._updated(F.linear(input.to(self.weight.dtype), self.weight, self.bias), input)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._described()}"

    def without(self) -> nn.Linear:
        plain = nn.Linear(self.in_features, self.out_features, bias=self.bias is not None, device="meta")
        self._restored(plain)
        return plain


class LoraConv1D(LoraLayer):
    """A `Conv1D` of transformers, a linear layer with weight [in, out], with a low-rank update: `x W + b + ...`."""

    transposed = True

    def __init__(self, layer: nn.Module, rank: int, alpha: float, dropout: float) -> None:
        super().__init__()
        self._kind = type(layer)
        self.bias: nn.Parameter
        fan_in, fan_out = layer.get_parameter("weight").shape
        self._adapt(layer, (fan_in, fan_out), rank, alpha, dropout)
        self._draw()

    def forward(self, x: Tensor) -> Tensor:
        rows = x.reshape(-1, x.shape[-1]).to(self.weight.dtype)
        frozen = torch.addmm(self.bias, rows, self.weight).view(*x.shape[:-1], self.weight.shape[1])
        return self._updated(frozen, x)

    def extra_repr(self) -> str:
        return f"{self.lora_A.shape[1]}, {self.lora_B.shape[0]}, {self._described()}"

    def without(self) -> nn.Module:
        with torch.device("meta"):
            plain = self._kind(self.weight.shape[1], self.weight.shape[0])
        return self._restored(plain)


class LoraEmbedding(nn.Embedding, LoraLayer):
    """An embedding with a low-rank update: row i is `W[i] + alpha / rank * B A[:, i]`. A begins at zero, B is drawn."""

    transposed = True

    def __init__(self, embedding: nn.Embedding, rank: int, alpha: float, dropout: float) -> None:
        nn.Module.__init__(self)
        self.num_embeddings, self.embedding_dim = embedding.num_embeddings, embedding.embedding_dim
        self.padding_idx, self.sparse = embedding.padding_idx, False
        self.max_norm, self.norm_type, self.scale_grad_by_freq = None, embedding.norm_type, False
        self._adapt(embedding, (self.num_embeddings, self.embedding_dim), rank, alpha, dropout)
        nn.init.normal_(self.lora_B)

    def forward(self, input: Tensor) -> Tensor:
        frozen = F.embedding(input, self.weight, self.padding_idx)
        update = F.linear(F.embedding(input, self.lora_A.T, self.padding_idx), self.lora_B)
        return frozen + (update * self.scale).to(frozen.dtype)

    def extra_repr(self) -> str:
        return f"{super().extra_repr()}, {self._described()}"

    def without(self) -> nn.Embedding:
        plain = nn.Embedding(self.num_embeddings, self.embedding_dim, self.padding_idx, device="meta")
        self._restored(plain)
        return plain


def conv1d() -> type[nn.Module] | None:
    """Return the `Conv1D` of transformers, None where no module of this process can be one."""
    module = sys.modules.get("transformers.pytorch_utils")
    return None if module is None else module.Conv1D


def linear_kinds() -> tuple[type[nn.Module], ...]:
    """Return the classes of linear layers that can be adapted."""
    return (nn.Linear,) if (found := conv1d()) is None else (nn.Linear, found)


def refusal(layer: nn.Module) -> str | None:
    """Return why a layer of its own cannot be adapted, None if it can."""
    if type(layer) not in (*linear_kinds(), nn.Embedding):
        return f"it is a {type(layer).__qualname__}, whose forward pass is its own"
    if isinstance(layer, nn.Embedding) and (layer.max_norm is not None or layer.scale_grad_by_freq):
        return "max_norm= writes the weight in a forward pass, and scale_grad_by_freq= scales gradients by a count"
    return None


def adapted(layer: nn.Module, rank: int, alpha: float, dropout: float) -> nn.Module:
    """Return a layer with adapters; it shares the tensors of the layer that it is made of."""
    if isinstance(layer, nn.Linear):
        return LoraLinear(layer, rank, alpha, dropout)
    if isinstance(layer, nn.Embedding):
        return LoraEmbedding(layer, rank, alpha, dropout)
    return LoraConv1D(layer, rank, alpha, dropout)
