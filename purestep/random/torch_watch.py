"""Torch's own generator, watched around the calls of a function on a model that draw nothing.

A function mode sees every operation of a call, which takes a tenth of a small eager step, and most models draw
nothing. So what a call under the mode has shown is remembered, and from then on the state of the generator is compared
around each call instead (`torch_generator`). One that moves it after all is done again under the mode, from its key. A
draw from a generator of the model's own moves nothing there, so now and then a call is under the mode nevertheless.
"""

from __future__ import annotations

import dataclasses
import sys

import torch

from purestep import _torch
from purestep.random.torch_mode import KeyedRandom, handlers

_EVERY = 64  # calls, of which one is under the mode


@dataclasses.dataclass
class TorchHabits:
    """What is known of the random operations of torch in the calls of one function on one model.

    Attributes:
        draws: whether a call had any, drawing or not (a dropout of rate 0); None before the first call.
        calls: how many calls went without the mode.
    """

    draws: bool | None = None
    calls: int = 0

    def watched(self, mode: KeyedRandom) -> bool:
        """Tell whether the generator may be watched in the next call, in place of entering the mode."""
        if self.draws is not False or mode.handlers is not handlers() or not _only_the_default_generator():
            return False
        self.calls += 1
        return self.calls % _EVERY != 0

    def learn(self, mode: KeyedRandom) -> None:
        """Remember what a call under the mode has shown."""
        if self.draws is None or mode.met:
            self.draws = mode.met


def _only_the_default_generator() -> bool:
    """Tell whether what draws moves torch's generator of the CPU: no device, no trace, no transform and no mode."""
    return not (
        _torch.function_modes()
        or _torch.all_modes()
        or _torch.transform_level() is not None
        or torch.cuda.is_initialized()
        or torch.xpu.is_initialized()
        or _METAL
    )


_METAL = sys.platform == "darwin"  # its device needs no initialization
