"""`jit`: from a pure function to one compiled graph; `donate`: updating the state in place. Re-exports only."""

from purestep.jit.call import Jit as Jit
from purestep.jit.give import Donating as Donating
from purestep.jit.give import donate as donate
from purestep.jit.make import jit as jit
from purestep.jit.pieces import JitStep as JitStep
