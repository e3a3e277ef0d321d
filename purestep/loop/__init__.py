"""The loop: a pure machine, the interpreter that performs its effects, and the values they exchange."""

from typing import TYPE_CHECKING

from purestep._lazy import attach

if TYPE_CHECKING:
    from purestep.loop.cadence import every as every
    from purestep.loop.events import Callback as Callback
    from purestep.loop.events import Copied as Copied
    from purestep.loop.events import CopyLost as CopyLost
    from purestep.loop.events import Cursor as Cursor
    from purestep.loop.events import Effect as Effect
    from purestep.loop.events import EpochDone as EpochDone
    from purestep.loop.events import Evaluate as Evaluate
    from purestep.loop.events import Evaluated as Evaluated
    from purestep.loop.events import Event as Event
    from purestep.loop.events import Failed as Failed
    from purestep.loop.events import Horizon as Horizon
    from purestep.loop.events import Interrupted as Interrupted
    from purestep.loop.events import Log as Log
    from purestep.loop.events import LoopState as LoopState
    from purestep.loop.events import Resumed as Resumed
    from purestep.loop.events import Save as Save
    from purestep.loop.events import Saved as Saved
    from purestep.loop.events import SaveLost as SaveLost
    from purestep.loop.events import Started as Started
    from purestep.loop.events import Status as Status
    from purestep.loop.events import StepsDone as StepsDone
    from purestep.loop.events import Stop as Stop
    from purestep.loop.events import Stopped as Stopped
    from purestep.loop.events import Switched as Switched
    from purestep.loop.events import Ticked as Ticked
    from purestep.loop.events import Train as Train
    from purestep.loop.events import Transform as Transform
    from purestep.loop.events import Transformed as Transformed
    from purestep.loop.events import View as View
    from purestep.loop.identity import RunChangedWarning as RunChangedWarning
    from purestep.loop.machine import Machine as Machine
    from purestep.loop.result import Result as Result
    from purestep.preflight.check import PrecisionWarning as PrecisionWarning
    from purestep.preflight.check import ThreadsWarning as ThreadsWarning
    from purestep.preflight.fit_memory import choose_microbatches as choose_microbatches
    from purestep.preflight.guard import BatchChangeWarning as BatchChangeWarning
    from purestep.preflight.hidden_attributes import HiddenStateWarning as HiddenStateWarning
    from purestep.preflight.memory import MemoryEstimateWarning as MemoryEstimateWarning

__getattr__, __dir__ = attach(__name__)
