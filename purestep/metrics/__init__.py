"""Metrics as monoids: values with `merge` and `compute`. Re-exports only."""

from purestep.metrics.classes import Confusion as Confusion
from purestep.metrics.classes import accuracy as accuracy
from purestep.metrics.classes import confusion as confusion
from purestep.metrics.kinds import Last as Last
from purestep.metrics.kinds import Max as Max
from purestep.metrics.kinds import Mean as Mean
from purestep.metrics.kinds import Metric as Metric
from purestep.metrics.kinds import Min as Min
from purestep.metrics.kinds import Sum as Sum
from purestep.metrics.kinds import mean as mean
from purestep.metrics.record import are_plain as are_plain
from purestep.metrics.record import as_metrics as as_metrics
from purestep.metrics.record import compute as compute
from purestep.metrics.record import merge as merge
from purestep.metrics.record import sample_count as sample_count
from purestep.metrics.series import Recorder as Recorder
from purestep.metrics.series import Series as Series
from purestep.metrics.series import fold as fold
from purestep.metrics.series import to_host as to_host
