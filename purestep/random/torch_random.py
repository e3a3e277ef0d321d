"""Randomness inside an `nn.Module`, drawn from a key instead of a global generator.

`KeyedRandom` is what `functional.bind` enters; `host_draws` sees to the generators of Python and numpy. Re-exports, and
the one table that says which handler stands for which function of torch; `torch_layers` has those of dropout,
attention, RNNs, `torch_samplers` those that create and fill tensors.
"""

from __future__ import annotations

from purestep.random import torch_layers, torch_samplers
from purestep.random.torch_mode import KeyedRandom as KeyedRandom
from purestep.random.torch_mode import register

register(torch_layers.HANDLERS)
register(torch_samplers.HANDLERS)
