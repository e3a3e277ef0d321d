"""Loss scales: values that keep small gradients of half precision away from zero.

Owns `DynamicLossScale`, `StaticLossScale`, `NoLossScale` and `all_finite`. A scale is a pytree in the train state;
nothing here is global, and no function synchronizes with the device. The step scales the loss, unscales the gradients
and adjusts.
"""

from __future__ import annotations

from typing import Any, Self, TypeVar

import torch
from torch import Tensor

from purestep import tree
from purestep.arguments import checked
from purestep.errors import PrecisionError, explain
from purestep.optim.kernels import foreach as fx
from purestep.tree import pytree, static

T = TypeVar("T")


class LossScale:
    """Base of the three: `scale`, `unscale`, `adjust`, and `on`, which turns the numbers into tensors."""

    value: Any

    def scale(self, values: T) -> T:
        """Return a loss, or a tree of tensors, multiplied by the scale."""
        return tree.map(lambda x: x * self.value, values)

    def unscale(self, grads: T) -> T:
        """Return a tree of gradients divided by the scale, in float32 or wider, because float16 may underflow again."""
        leaves, structure = tree.flatten(grads)
        wide = [torch.promote_types(x.dtype, torch.float32) for x in leaves]
        inverse = 1.0 / self.value
        return tree.unflatten(structure, fx.mul(fx.convert(leaves, wide), inverse))

    def adjust(self, finite: Tensor) -> Self:
        """Return the scale of the next step.

        Args:
            finite: bool [], whether all gradients of this step were finite.
        """
        return self

    def on(self, device: torch.device | str | None = None) -> Self:
        """Return the scale with its numbers as 0-d tensors on a device, as a state holds it."""
        return self


@checked(PrecisionError)
@pytree(eq=True)
class DynamicLossScale(LossScale):
    r"""A scale that falls when a gradient overflows and rises after a number of steps without overflow.

    $$ s_{t+1} = \begin{cases} \max(s_t / f, s_\min) & \text{if a gradient is not finite} \\\\
       s_t f & \text{after } p \text{ finite steps in a row, if that is finite} \\\\ s_t & \text{else} \end{cases} $$

    Attributes:
        value: the scale $s$; a number in a policy, float32 [] in a state.
        counter: finite steps since the last change; a number in a policy, int64 [] in a state.
        period: the finite steps $p$ before the scale rises.
        factor: $f$, above 1.
        min_scale: $s_\min$.

    Examples:
        >>> scale, values = DynamicLossScale(8.0, period=2).on("cpu"), []
        >>> for finite in (False, True, True, True):
        ...     scale = scale.adjust(torch.tensor(finite))
        ...     values.append(float(scale.value))
        >>> values
        [4.0, 4.0, 8.0, 8.0]

    Reference: `jmp.DynamicLossScale`; the defaults are those of `torch.amp.GradScaler`.
    """

    value: Any = 2.0**16
    counter: Any = 0
    period: int = static(default=2000, kw_only=True)
    factor: float = static(default=2.0, kw_only=True)
    min_scale: float = static(default=1.0, kw_only=True)

    def __post_init__(self) -> None:
        _check_number("value", self.value)
        if self.period < 1 or self.factor <= 1 or self.min_scale <= 0:
            where = f"period={self.period!r}, factor={self.factor!r}, min_scale={self.min_scale!r}"
            why = "period is at least 1, factor above 1, min_scale above 0"
            raise PrecisionError(explain("this loss scale cannot move", where=where, why=why))

    def adjust(self, finite: Tensor) -> Self:
        counted = self.counter + 1
        grown = self.value * self.factor
        full = counted >= self.period
        up = torch.where(full & torch.isfinite(grown), grown, self.value)
        down = torch.clamp(self.value / self.factor, min=self.min_scale)
        return self.replace(  # type: ignore[attr-defined]
            value=torch.where(finite, up, down),
            counter=torch.where(finite & ~full, counted, torch.zeros_like(counted)),
        )

    def on(self, device: torch.device | str | None = None) -> Self:
        value, counter = _number(self.value, torch.float32, device), _number(self.counter, torch.int64, device)
        return self.replace(value=value, counter=counter)  # type: ignore[attr-defined]


@checked(PrecisionError)
@pytree(eq=True)
class StaticLossScale(LossScale):
    """A constant scale. Steps with gradients that are not finite are skipped as under the dynamic one.

    Attributes:
        value: the scale; a number in a policy, float32 [] in a state.

    Examples:
        >>> scale = StaticLossScale(4.0).on("cpu")
        >>> scale.unscale({"w": scale.scale(torch.ones(2))})
        {'w': tensor([1., 1.])}

    Reference: `jmp.StaticLossScale`.
    """

    value: Any

    def __post_init__(self) -> None:
        _check_number("value", self.value)

    def on(self, device: torch.device | str | None = None) -> Self:
        return self.replace(value=_number(self.value, torch.float32, device))  # type: ignore[attr-defined]


@pytree(eq=True)
class NoLossScale(LossScale):
    """No scale: for float32, float64 and bfloat16, whose exponent range is that of float32. No step is skipped.

    Examples:
        >>> NoLossScale().scale(torch.tensor(3.0))
        tensor(3.)

    Reference: `jmp.NoOpLossScale`.
    """

    def scale(self, values: T) -> T:
        return values

    def unscale(self, grads: T) -> T:
        return grads


@checked(PrecisionError, failed=True)
def all_finite(values: object) -> Tensor:
    """Tell, as a 0-d bool tensor, whether a tree of tensors holds no infinity and no NaN.

    Examples:
        >>> all_finite({"w": torch.ones(2), "b": torch.tensor([0.0, float("inf")])})
        tensor(False)

    Reference: `jmp.all_finite`.
    """
    return fx.all_finite(tree.leaves(values))


def _number(value: Tensor | float, dtype: torch.dtype, device: torch.device | str | None) -> Tensor:
    # Always a new tensor: of two states that share one, only one could be donated.
    if isinstance(value, Tensor):
        return value.detach().clone().to(device=device or value.device, dtype=dtype)
    return torch.tensor(value, dtype=dtype, device=device)


def _check_number(name: str, value: object) -> None:
    if isinstance(value, (int, float)) and not 0 < value < float("inf"):
        raise PrecisionError(explain("a loss scale is a positive finite number", where=f"{name}={value!r}"))
