"""Linear layers in float8, by torchao's training conversion (the extra `float8`).

Owns the choice of layers, the refusal of sizes that GPUs cannot multiply, and the converted copy of a model. The user's
module is never changed, and torchao is imported only for a policy with float8.
"""

from __future__ import annotations

import copy
import dataclasses

import torch
from torch import Tensor, nn

from purestep import _torch
from purestep.errors import PrecisionError, explain, import_extra
from purestep.precision import linear_layers
from purestep.precision.rules import Settings

RECIPES = ("tensorwise", "rowwise", "rowwise_with_gw_hp")
"""torchao's recipes: one scale a tensor, one a row, and one a row with the gradient of the weight in high precision."""

_MULTIPLE = 16

# torch 2.11 multiplies with one scale a row on GPUs only.
_SCALES_ROWS_ON_CPU = torch.__version__ >= "2.12"


def converted(module: nn.Module, recipe: str, settings: Settings) -> nn.Module:
    """Return a copy of a model whose linear layers multiply in float8; parameters keep their names and dtypes.

    Args:
        module: the model. It is not changed.
        recipe: one of `RECIPES`.
        settings: resolved rules; `float8=False` leaves a layer out.

    Raises:
        MissingExtra: torchao is not installed.
        PrecisionError: a layer has a size that is no multiple of 16, or there is no layer to convert. Calls of the copy
            raise it for a number of rows to train on that is no multiple of 16, and on a CPU if torch lacks the recipe.
    """
    chosen = linear_layers.chosen(module, settings, "float8")
    for path, linear in chosen.items():
        _check_sizes(path, linear)
    torchao = import_extra("torchao.float8", extra="float8", needed_by='policy("float8")')
    # The first call may be inside of a trace, which would record the initialization of the layers that torchao makes.
    with _torch.disable_current_modes():
        copied = torchao.convert_to_float8_training(
            copy.deepcopy(module),
            config=torchao.Float8LinearConfig.from_recipe_name(recipe),
            module_filter_fn=lambda m, path: path in chosen,
        )
    for path in chosen:
        copied.get_submodule(path).register_forward_pre_hook(CheckInputs(path, recipe))
    return copied


def _check_sizes(path: str, linear: nn.Linear) -> None:
    sizes = {"in_features": linear.in_features, "out_features": linear.out_features}
    odd = [f"{name}={size}" for name, size in sizes.items() if size % _MULTIPLE]
    if odd:
        raise PrecisionError(
            explain(
                f"float8 cannot multiply in a layer whose sizes are no multiples of {_MULTIPLE}",
                where=f"{_shown(path)}: Linear[{linear.out_features}, {linear.in_features}], {', '.join(odd)}",
                why="GPUs refuse it, so it is refused on every device",
                instead=f'policy.where("{path or "*"}", float8=False)',
            )
        )


@dataclasses.dataclass(frozen=True)
class CheckInputs:
    """A forward pre-hook that checks the input of a layer.

    The gradient of a weight is a product over the rows of the input, so their number must be a multiple of 16, too; and
    not every version of torch multiplies by every recipe on every device.
    """

    path: str
    recipe: str

    def __call__(self, module: nn.Module, args: tuple[Tensor, ...]) -> None:
        if self.recipe != "tensorwise" and args[0].device.type == "cpu" and not _SCALES_ROWS_ON_CPU:
            raise PrecisionError(
                explain(
                    f"torch {torch.__version__} cannot multiply by the recipe {self.recipe!r} on CPUs",
                    where=f"{_shown(self.path)}: input {tuple(args[0].shape)} on {args[0].device}",
                    why="it has one scale a row, which torch takes on CPUs from 2.12 on",
                    instead='policy("float8", float8="tensorwise"), or pip install "torch>=2.12"',
                )
            )
        rows = args[0].numel() // max(1, args[0].shape[-1])
        trains = args[0].requires_grad or module.weight.requires_grad
        if trains and rows % _MULTIPLE:
            raise PrecisionError(
                explain(
                    f"float8 cannot train on a number of rows that is no multiple of {_MULTIPLE}",
                    where=f"{_shown(self.path)}: input {tuple(args[0].shape)}, {rows} rows",
                    why="GPUs refuse the product for the gradient of the weight, so it is refused on every device",
                    instead="a batch size, divided by microbatches, that is a multiple of 16, and drop_last=True\n"
                    f'or policy.where("{self.path or "*"}", float8=False)',
                )
            )


def _shown(path: str) -> str:
    return path or "the model itself"
