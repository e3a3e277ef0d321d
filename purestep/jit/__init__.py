"""`jit`: from a pure function to one compiled graph, with donation of the state. Re-exports only."""

from purestep.jit.call import Jit as Jit
from purestep.jit.make import jit as jit
from purestep.jit.pieces import JitStep as JitStep
