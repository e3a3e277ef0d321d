"""Which linear layers of a model multiply in a narrow format, float8 or int8: chosen by rule, the same for both."""

from __future__ import annotations

from typing import Literal

from torch import nn

from purestep.errors import PrecisionError, explain
from purestep.precision.rules import Settings

Format = Literal["float8", "int8"]


def converts(module: nn.Module, path: str, settings: Settings, to: Format) -> bool:
    """Tell whether a module is a linear layer that multiplies in a format, under a policy with that format."""
    return type(module) is nn.Linear and bool(settings.of_module(path, to, True))


def chosen(module: nn.Module, settings: Settings, to: Format) -> dict[str, nn.Linear]:
    """Return the linear layers that multiply in a format, by path.

    Raises:
        PrecisionError: there is none.
    """
    layers = {
        path: layer
        for path, layer in module.named_modules()
        if isinstance(layer, nn.Linear) and converts(layer, path, settings, to)
    }
    if not layers:
        raise PrecisionError(
            explain(
                f"{to} finds no linear layer in the model",
                where=type(module).__qualname__,
                why="it multiplies in torch.nn.Linear, and not in subclasses of it",
                instead='policy="bf16-mixed"',
            )
        )
    return layers
