"""What people look at: the progress bar, the table of a model, learning curves."""

from __future__ import annotations

from purestep.ui.plots import learning_curves as learning_curves
from purestep.ui.progress import ProgressSink as ProgressSink
from purestep.ui.summary import Summary as Summary
from purestep.ui.summary import summary as summary
