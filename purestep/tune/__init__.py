"""What is chosen before a training: learning rate, batch size, number of microbatches, and settings by a sweep."""

from typing import TYPE_CHECKING

from purestep._lazy import attach

if TYPE_CHECKING:
    from purestep.tune.fit_in_memory import BatchSize as BatchSize
    from purestep.tune.fit_in_memory import Microbatches as Microbatches
    from purestep.tune.fit_in_memory import Trial as Trial
    from purestep.tune.fit_in_memory import batch_size as batch_size
    from purestep.tune.fit_in_memory import microbatches as microbatches
    from purestep.tune.lr_range import LearningRateRange as LearningRateRange
    from purestep.tune.lr_range import lr_range as lr_range
    from purestep.tune.search import search as search
    from purestep.tune.sweep import SweepWarning as SweepWarning
    from purestep.tune.sweep import sweep as sweep
    from purestep.tune.table import Sweep as Sweep

__getattr__, __dir__ = attach(__name__)
