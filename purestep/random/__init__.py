"""Randomness from keys: the same bits eager, compiled, under `vmap`, and for any slice of a larger draw.

Re-exports only, and nothing of it touches a global generator; `global_generators` reads and seeds them, for other
rooms.
"""

from purestep.random.card_dropout import device_dropout as device_dropout
from purestep.random.draws import bernoulli as bernoulli
from purestep.random.draws import bits as bits
from purestep.random.draws import categorical as categorical
from purestep.random.draws import dropout as dropout
from purestep.random.draws import normal as normal
from purestep.random.draws import permutation as permutation
from purestep.random.draws import randint as randint
from purestep.random.draws import uniform as uniform
from purestep.random.keys import fold_in as fold_in
from purestep.random.keys import is_host as is_host
from purestep.random.keys import key as key
from purestep.random.keys import split as split
