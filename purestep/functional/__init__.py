"""Calling an `nn.Module` as a pure function: the one room that does it. Re-exports only.

`bind` puts tensors in the places of a module's parameters and buffers for the duration of a `with` block and takes
them out again; `apply` is one such call. Buffers go in as clones, randomness comes from a key, and nothing of the
module is left changed. `grad`, `step` and users' own steps call it.
"""

from purestep.functional.active import checkpoint as checkpoint
from purestep.functional.backward import GradientScope as GradientScope
from purestep.functional.binding import Binding as Binding
from purestep.functional.pure_call import apply as apply
from purestep.functional.pure_call import bind as bind
from purestep.module_tensors import Definition as Definition
from purestep.module_tensors import Slots as Slots
from purestep.module_tensors import slots as slots
