"""Randomness inside an `nn.Module`, drawn from a key instead of a global generator.

`KeyedRandom` is what `functional.bind` enters; `host` sees to the generators of Python and numpy. Re-exports, and the
one table that says which handler stands for which function of torch; `layers` has those of dropout, attention, RNNs,
`samplers` those that create and fill tensors.
"""

from __future__ import annotations

from purestep.keyed import layers, samplers
from purestep.keyed.mode import KeyedRandom as KeyedRandom
from purestep.keyed.mode import register

register(layers.HANDLERS)
register(samplers.HANDLERS)
