"""Linear layers in int8: products of integers with one scale a row, forward and backward, as a pure function.

Owns the arithmetic and the converted copy of a model; `linear_layers` chooses the layers. The user's module is never
changed. The scheme is that of torchao's int8 mixed-precision training; docs/decisions.md says why it is written here.
"""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import Tensor, nn

from purestep import _torch
from purestep.errors import PrecisionError, explain
from purestep.module_tensors import InParts
from purestep.precision import linear_layers
from purestep.precision.rules import Settings

RECIPES = ("full", "forward")
"""`full`: the product and both products of its gradient in int8. `forward`: only the product; gradients are those of
the product that was not rounded, in the compute dtype, as in quantization-aware training (straight-through)."""

_LARGEST = 127
# Longer sums of products of two int8 may not fit into int32.
MOST_TERMS = (2**31 - 1) // _LARGEST**2


def quantized(rows: Tensor) -> tuple[Tensor, Tensor]:
    """Return each row rounded to int8, and its scale: `rows` is about their product.

    The largest magnitude of a row becomes 127; halves round to even. A row that is not finite has such a scale, so that
    what is computed from it is not finite either.

    Args:
        rows: floating point [m, n], n > 0.

    Returns:
        int8[m, n] and float32[m, 1].

    Examples:
        >>> values, scale = quantized(torch.tensor([[1.0, -2.0, 0.5], [0.0, 0.0, 0.0]]))
        >>> values.tolist(), scale.flatten().mul(127).tolist()
        ([[64, -127, 32], [0, 0, 0]], [2.0, 0.0])
    """
    wide = rows.float()
    scale = wide.abs().amax(1, keepdim=True) / _LARGEST
    # A row of zeros has the scale 0; the smallest normal number in its place leaves it zeros.
    divisor = scale.clamp(min=torch.finfo(torch.float32).tiny)
    return (wide / divisor).round().clamp(-_LARGEST, _LARGEST).to(torch.int8), scale


def product(a: Tensor, b: Tensor) -> Tensor:
    """Return `a @ b.T` of the rows of both, rounded to int8: exact sums in int32, times both scales, in float32.

    Args:
        a: floating point [m, k].
        b: floating point [n, k], k at most `MOST_TERMS`.

    Returns:
        float32[m, n].

    Examples:
        >>> a, b = torch.tensor([[127.0, 1.0]]), torch.tensor([[1.0, 127.0]])
        >>> product(a, b)
        tensor([[254.]])
    """
    if a.shape[1] == 0:
        return a.new_zeros(a.shape[0], b.shape[0], dtype=torch.float32)
    (left, left_scale), (right, right_scale) = quantized(a), quantized(b)
    return _Sums.apply(left, right).float() * left_scale * right_scale.t()


class _Sums(torch.autograd.Function):
    """`a @ b.T` in int32 of int8[m, k] and int8[n, k]. torch has no rule for it under vmap, so there it is a loop."""

    @staticmethod
    def forward(a: Tensor, b: Tensor) -> Tensor:
        return _torch.int8_product(a, b)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor], output: Tensor) -> None:
        ctx.mark_non_differentiable(output)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[None, None]:
        return None, None

    @staticmethod
    def vmap(info: Any, dims: tuple[int | None, int | None], a: Tensor, b: Tensor) -> tuple[Tensor, int]:
        def member(tensor: Tensor, dim: int | None, index: int) -> Tensor:
            return tensor if dim is None else tensor.select(dim, index)

        sums = [_Sums.apply(member(a, dims[0], i), member(b, dims[1], i)) for i in range(info.batch_size)]
        return torch.stack(sums), 0


class _Linear(torch.autograd.Function):
    """`x @ weight.T` with products in int8, of x[m, k] and weight[n, k]."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor, weight: Tensor, recipe: str) -> Tensor:
        return product(x, weight).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, str], output: Tensor) -> None:
        x, weight, ctx.recipe = inputs
        ctx.save_for_backward(x, weight)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, Tensor | None, None]:
        x, weight = ctx.saved_tensors
        of_x = of_weight = None
        full = ctx.recipe == "full"
        if ctx.needs_input_grad[0]:
            of_x = (product(grad, weight.t()) if full else grad @ weight).to(x.dtype)
        if ctx.needs_input_grad[1]:
            of_weight = (product(grad.t(), x.t()) if full else grad.t() @ x).to(weight.dtype)
        return of_x, of_weight, None


def linear(x: Tensor, weight: Tensor, bias: Tensor | None, recipe: str) -> Tensor:
    """Return `x @ weight.T + bias` with the product in int8, and differentiate it by a recipe.

    Args:
        x: floating point [..., k].
        weight: [n, k] of the same dtype.
        bias: [n], or None.
        recipe: one of `RECIPES`.

    Returns:
        [..., n] in the dtype of x.
    """
    rows = _Linear.apply(x.reshape(-1, x.shape[-1]), weight, recipe)
    result = rows.reshape(*x.shape[:-1], weight.shape[0])
    return result if bias is None else result + bias


class Int8Linear(nn.Linear):
    """A linear layer of a converted copy; it has the parameters of the layer that it stands for."""

    path: str
    recipe: str

    def forward(self, input: Tensor) -> Tensor:
        if isinstance(self.weight, InParts):
            raise PrecisionError(
                explain(
                    "int8 does not multiply in a layer that tensor parallelism splits",
                    where=f"{self.path or 'the model itself'}: weight {list(self.weight.shape)}",
                    why="each part of a row would have a scale of its own, other than that of the row",
                    instead=f'policy.where("{self.path or "*"}", int8=False)\nor a plan of ddp or fsdp',
                )
            )
        if self.recipe == "full" and self.weight.requires_grad:
            _check_terms(self.path, "rows of the input", input.numel() // max(1, input.shape[-1]))
        return linear(input, self.weight, self.bias, self.recipe)


def converted(module: nn.Module, recipe: str, settings: Settings) -> nn.Module:
    """Return a copy of a model whose linear layers multiply in int8; parameters keep their names and dtypes.

    Args:
        module: the model. It is not changed.
        recipe: one of `RECIPES`.
        settings: resolved rules; `int8=False` leaves a layer out.

    Raises:
        PrecisionError: there is no layer to convert, or one sums more products than int32 can hold. Calls of the copy
            raise it for so many rows to train on.
    """
    chosen = linear_layers.chosen(module, settings, "int8")
    for path, layer in chosen.items():
        _check_terms(path, "in_features", layer.in_features)
        if recipe == "full":
            _check_terms(path, "out_features", layer.out_features)
    with _torch.disable_current_modes():  # the first call may be inside of a trace
        copied = copy.deepcopy(module)
    for path in chosen:
        converted_layer = copied.get_submodule(path)
        converted_layer.__class__ = Int8Linear
        converted_layer.path, converted_layer.recipe = path, recipe  # type: ignore[assignment]
    return copied


def _check_terms(path: str, what: str, count: int) -> None:
    if count > MOST_TERMS:
        instead = f'policy.where("{path or "*"}", int8=False)'
        raise PrecisionError(
            explain(
                f"int8 cannot sum more than {MOST_TERMS} products",
                where=f"{path or 'the model itself'}: {count} {what}",
                why="the sum may not fit into int32, and would be wrong without a word",
                instead=f"more microbatches\nor {instead}" if what.startswith("rows") else instead,
            )
        )
