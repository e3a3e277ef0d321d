"""Metrics as monoids: values with `merge` and `compute`. Re-exports only."""

from purestep.metrics.classification import Confusion as Confusion
from purestep.metrics.classification import accuracy as accuracy
from purestep.metrics.classification import confusion as confusion
from purestep.metrics.dicts import are_plain as are_plain
from purestep.metrics.dicts import as_metrics as as_metrics
from purestep.metrics.dicts import compute as compute
from purestep.metrics.dicts import merge as merge
from purestep.metrics.dicts import sample_count as sample_count
from purestep.metrics.metric import Last as Last
from purestep.metrics.metric import Max as Max
from purestep.metrics.metric import Mean as Mean
from purestep.metrics.metric import Metric as Metric
from purestep.metrics.metric import Min as Min
from purestep.metrics.metric import Sum as Sum
from purestep.metrics.metric import mean as mean
from purestep.metrics.recorder import Recorder as Recorder
from purestep.metrics.recorder import Series as Series
from purestep.metrics.recorder import fold as fold
from purestep.metrics.recorder import to_host as to_host
