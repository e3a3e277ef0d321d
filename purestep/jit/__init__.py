"""`jit`: from a pure function to one compiled graph; `donate`: updating the state in place. Re-exports only."""

from purestep.jit.api import jit as jit
from purestep.jit.donated import Donating as Donating
from purestep.jit.donated import donate as donate
from purestep.jit.function import Jit as Jit
from purestep.jit.step import JitStep as JitStep
