"""What people look at: the progress bar, the table of a model, learning curves."""

from typing import TYPE_CHECKING

from purestep._lazy import attach

if TYPE_CHECKING:
    from purestep.display.plots import learning_curves as learning_curves
    from purestep.display.plots import plot as plot
    from purestep.display.progress import ProgressSink as ProgressSink
    from purestep.display.summary import Summary as Summary
    from purestep.display.summary import summary as summary

__getattr__, __dir__ = attach(__name__)
