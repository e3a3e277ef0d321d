"""`Experts`: what the experts of a MoE block are for a plan that splits them over ranks."""

from __future__ import annotations

from typing import Protocol, runtime_checkable

from torch import Tensor


@runtime_checkable
class Experts(Protocol):
    """The experts of a MoE block: a module that is given tokens and their experts. A router is no part of it.

    Its parameters have the experts as dim 0, and it computes with as many of them as `num_experts` says. Called with
    tokens, floating `[n, width]`, the experts of each, int64 `[n, k]`, and their weights, floating `[n, k]`, it returns
    `[n, width]`: for each token the sum over its experts of weight times what the expert makes of the token. It draws
    no random numbers. The experts of transformers 5 (Mixtral, Qwen MoE, ...) are of this kind.

    Examples:
        >>> import torch
        >>> class Scales(torch.nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.num_experts, self.scale = 4, torch.nn.Parameter(torch.arange(4.0))
        ...
        ...     def forward(self, tokens, chosen, weights):
        ...         return tokens * (self.scale[chosen] * weights).sum(1, keepdim=True)
        >>> isinstance(Scales(), Experts)
        True
    """

    num_experts: int

    def __call__(self, tokens: Tensor, chosen: Tensor, weights: Tensor, /) -> Tensor:
        """Return what the experts make of some tokens."""
